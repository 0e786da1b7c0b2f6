"""A sharded model in bytes, from shapes alone: what a rank holds of it, and what travels between ranks.

a layer of the LLM   is gathered when it runs, dropped, and gathered again for its backward; its gradients are reduced
the root             embeddings, head, projector and isolator: gathered once per micro-batch
the tower            is frozen and in no group: every rank holds all of it
"""

from dataclasses import dataclass
from functools import cached_property

from tinyspeed.models import memory
from tinyspeed.models.memory import Settings, Shape


@dataclass(frozen=True)
class ShardedModel:
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
        """Bytes of the gathered root."""
        parts = self.shape.parameters
        return 2 * (sum(parts[name] for name in ("embeddings", "head", "projector", "newline")) + self.shape.hidden)

    @cached_property
    def trained(self) -> tuple[int, int]:
        """How many numbers a step trains in a layer and in the root."""
        matrices = self.shape.adapters(self.s.rank) or self.shape.linears
        layer = sum(a * b for a, b in matrices) * (self.s.stage == "train")
        return layer, memory.fixed(self.shape, self.s).gradients // 4 - self.shape.layers * layer

    @property
    def borrowed(self) -> int:
        """Bytes that are gathered or on their way to be reduced: a layer and the next one, and the root."""
        reducing = (2 + 4) * max(self.trained)  # a gradient, and its copy in fp32
        return 2 * self.layer + self.root + reducing

    def held(self, shards: int) -> int:
        """Bytes on a GPU beside activations."""
        fixed, tower = memory.fixed(self.shape, self.s), self.s.width * self.shape.parameters["tower"]
        return fixed.total if shards == 1 else (fixed.total - tower) // shards + tower + self.borrowed

    def coming(self, shards: int) -> int:
        """The part of `held` that is allocated only in the first step."""
        return memory.fixed(self.shape, self.s).gradients // shards + self.borrowed * (shards > 1)

    def traffic(self, mode: str, layers: float | None = None) -> tuple[float, float]:
        """Bytes that a micro-batch gathers and reduces, and in how many collectives, if so many layers run, or all."""
        layers, gathers = layers or self.shape.layers, 3 if mode == "slow" else 2
        size = gathers * layers * self.layer + self.root + 4 * (layers * self.trained[0] + self.trained[1])
        return size, gathers * layers + 1 + layers * (self.trained[0] > 0) + 1
