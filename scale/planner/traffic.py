"""What of a model travels between ranks, and what a rank holds of it: from shapes alone, in bytes.

a layer of the LLM   gathered when it runs, dropped, gathered again for its backward; its gradients are reduced
the root             embeddings, head, projector, isolator: gathered once a micro-batch
the tower            frozen, in no group: whole on every rank
"""

from dataclasses import dataclass
from functools import cached_property

from tinyspeed.models import memory
from tinyspeed.models.memory import Settings, Shape


@dataclass(frozen=True)
class Model:
    """What of a model is gathered, and what of it trains: bytes and numbers."""

    shape: Shape
    s: Settings

    @cached_property
    def layer(self) -> int:
        """Bytes of a gathered layer."""
        shape = self.shape
        linears = [memory.nf4(a * b) if self.s.quantise == "nf4" else 2 * a * b for a, b in shape.linears]
        adapters = self.s.views * sum(a * b for a, b in shape.adapters(self.s.rank))
        return sum(linears) + 2 * (adapters + 2 * shape.hidden)

    @cached_property
    def root(self) -> int:
        parts = self.shape.parameters
        return 2 * (sum(parts[name] for name in ("embeddings", "head", "projector", "newline")) + self.shape.hidden)

    @cached_property
    def trained(self) -> tuple[int, int]:
        """Numbers that a step trains in a layer, and in the root."""
        matrices = self.shape.adapters(self.s.rank) or self.shape.linears
        layer = sum(a * b for a, b in matrices) * (self.s.stage == "train")
        return layer, memory.fixed(self.shape, self.s).gradients // 4 - self.shape.layers * layer

    @property
    def borrowed(self) -> int:
        """Bytes of what is gathered, or on its way to be reduced: a layer and the next one, and the root."""
        reducing = (2 + 4) * max(self.trained)  # a gradient, and its copy in fp32
        return 2 * self.layer + self.root + reducing

    def held(self, shards: int) -> int:
        """Bytes on a GPU beside activations."""
        fixed, tower = memory.fixed(self.shape, self.s), self.s.width * self.shape.parameters["tower"]
        if shards == 1:
            return fixed.total
        return (fixed.total - tower) // shards + tower + self.borrowed

    def coming(self, shards: int) -> int:
        """Those of them that are not there before the first step."""
        return memory.fixed(self.shape, self.s).gradients // shards + self.borrowed * (shards > 1)

    def micro_batch(self, mode: str, layers: float | None = None) -> tuple[float, float]:
        """Bytes that a micro-batch gathers and reduces, and in how many turns, if so many layers run, or all."""
        layers, gathers = layers or self.shape.layers, 3 if mode == "slow" else 2
        size = gathers * layers * self.layer + self.root + 4 * (layers * self.trained[0] + self.trained[1])
        return size, gathers * layers + 1 + layers * (self.trained[0] > 0) + 1
