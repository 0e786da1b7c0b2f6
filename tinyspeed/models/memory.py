"""How much memory a training step needs, from shapes alone: no weights are loaded.

    peak    = weights + gradients + AdamW's moments + the largest phase of a step
    phase   = what autograd keeps for the backward + temporary tensors

In half precision and with a frozen LLM of width H and MLP width I, autograd keeps for each row in each layer (`lean.py`
says how)

    two norms             4 H    their input
    attention             8 H    queries, keys, values and output (of the softmax only a number per head)
    MLP                   4 I    gate and up
    LoRA of rank r       14 r    of 7 linear layers, what comes out of the first matrix

which is 95 kB in LLaVA-1.5-7B. 676 rows in 32 layers take 1.9 GiB. That is why a long micro-batch is *recomputed*
(activation checkpointing): only the input of each layer is kept, and one layer at a time runs again in the backward.

Where CPU and GPU differ, the formulas follow the GPU: packed attention repeats grouped keys, masks are bytes, norms of
the tower return fp32. RESERVE and MARGIN stand for the CUDA context and the gaps between the allocator's blocks. The
tests compare the formulas with what autograd saves in real steps, with what is alive at their peak, and with replays of
every recipe in its true size (`tutorials/guide/memory.md`).
"""

import bisect
import math
from dataclasses import dataclass
from functools import cache, cached_property

import torch
from torch import cuda

from ..distill import CHUNK
from ..pruning import entry, keep_count, make
from ..rows import plan_rows
from ..scheduler import Plan
from ..util import require
from .families import FAMILIES

GIB = 2**30
RESERVE = int(0.7 * GIB)  # of a GPU: the CUDA context, and gaps between the allocator's blocks
MARGIN = 0.05  # the share of free memory that `rows_within` leaves alone


def is_known(config) -> bool:
    """Whether these formulas are those of this model. Of the other families nothing is known beforehand."""
    return config.model_type.startswith("llava")


class Shape:
    """The parts of a LLaVA's configuration that memory depends on. A tower other than SigLIP's is treated as CLIP's."""

    def __init__(self, config):
        what = f"what a {config.model_type!r} model needs is not known beforehand, as for LLaVA's families it is"
        require(is_known(config), f"{what}: `tinyspeed train --dry-run` measures it")
        text, vision, layer = config.text_config, config.vision_config, config.vision_feature_layer
        self.hidden, self.inner, self.layers = text.hidden_size, text.intermediate_size, text.num_hidden_layers
        head = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        self.heads, self.queries = text.num_attention_heads, text.num_attention_heads * head
        h, i, q, kv = self.hidden, self.inner, self.queries, text.num_key_value_heads * head
        # (out, in) of the linear layers in one layer of the LLM. They are quantised, and adapters are put on them.
        self.linears = [(q, h), (kv, h), (kv, h), (h, q), (i, h), (i, h), (h, i)]
        self.biases = (q + 2 * kv) * (text.model_type == "qwen2")
        self.vocab, self.tied = text.vocab_size, config.tie_word_embeddings
        self.tower, self.tower_inner = vision.hidden_size, vision.intermediate_size
        self.tower_layers, self.clip = vision.num_hidden_layers, vision.model_type != "siglip_vision_model"
        self.read = vision.hidden_size * (len(layer) if isinstance(layer, list | tuple) else 1)  # by the projector
        self.pixels, self.patch = vision.image_size, vision.patch_size
        self.patches = (self.pixels // self.patch) ** 2  # rows of a crop
        grids = getattr(config, "image_grid_pinpoints", None) or []
        self.rowwise = FAMILIES[config.model_type].rowwise
        self.newline, cells = bool(grids), [height * width // self.pixels**2 for height, width in grids]
        self.crops = 1 + max(cells, default=0)  # at most

    def adapters(self, rank: int) -> list[tuple[int, int]]:
        """(out, in) of LoRA's matrices in one layer of the LLM."""
        return [size for out, into in self.linears for size in ((rank, into), (out, rank)) if rank]

    @cached_property
    def parameters(self) -> dict[str, int]:
        h, t, inner = self.hidden, self.tower, self.tower_inner
        tower = self.tower_layers * (4 * (t + 1) * t + (t + 1) * inner + (inner + 1) * t + 4 * t)
        # Patches and positions; then CLIP's class token and two norms, or SigLIP's bias of the patches and one norm.
        tower += (3 * self.patch**2 + self.patches + (6 if self.clip else 3)) * t
        return {
            "tower": tower,
            "projector": (self.read + 1) * h + (h + 1) * h,
            "newline": h * self.newline,
            "embeddings": self.vocab * h,
            "layers": self.layers * sum(out * into for out, into in self.linears),
            "norms": self.layers * (2 * h + self.biases) + h,  # and biases
            "head": 0 if self.tied else self.vocab * h,
        }


@dataclass(frozen=True)
class Settings:
    """Those settings of a recipe that memory depends on."""

    precision: str = "bf16"
    quantise: str = "none"
    rank: int = 0
    dropout: float = 0.0
    optimizer: str = "adamw"
    stage: str = "train"
    keep: float = 0.1
    isolator: int = 4
    views: int = 1  # adapters on each layer; a step uses and changes one of them
    plugin: str = "divprune"
    weighs: bool = False  # kept tokens as many as they stand for

    @classmethod
    def of(cls, recipe, stage: str, precision: str) -> "Settings":
        """The settings of a `Recipe`; `precision` is never "auto"."""
        lora, optimizer, dual = recipe.lora, getattr(recipe, stage).optimizer, recipe.dualspeed
        (plugin, keep), views = recipe.pruning(stage), 1 + dual.views
        how = (recipe.model.quantise, lora.rank, lora.dropout, optimizer, stage, keep, dual.isolator, views, plugin)
        return cls(precision, *how, weighs=dual.weights != "none" and dual.power > 0)

    @property
    def half(self) -> bool:
        return self.precision != "fp32"

    @property
    def width(self) -> int:  # bytes of a number in a matrix product, and in a frozen weight
        return 2 if self.half else 4

    @property
    def full(self) -> bool:
        """Whether the LLM's own weights train. They are fp32 then, and so is what flows from layer to layer."""
        return self.stage == "train" and not self.rank

    @property
    def stream(self) -> int:  # bytes of a number between two layers of the LLM
        return 4 if self.full else self.width


@dataclass(frozen=True)
class Fixed:
    parameters: int
    trainable: int
    weights: int  # bytes, from here on
    gradients: int  # from the second micro-batch of a step on
    moments: int  # AdamW's

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.moments


def trained(shape: Shape, s: Settings) -> list[tuple[int, int]]:
    """Returns (how many, numbers in each) of the tensors that train."""
    h, newlines = shape.hidden, int(shape.newline and not s.rank)  # a peft adapter cannot carry the newline
    found = [(1, shape.read * h), (1, h * h), (2, h), (newlines, h), (1, s.isolator * h)]
    found += [(1, size.numel()) for size in learned(shape, s)]
    if s.full:
        found += [(1 if shape.tied else 2, shape.vocab * h), (1, shape.parameters["norms"])]
    if s.stage == "train":
        found += [(shape.layers * s.views, out * into) for out, into in shape.adapters(s.rank) or shape.linears]
    return found


def learned(shape: Shape, s: Settings) -> list[torch.Size]:
    """The shapes of a learned plugin's parameters."""
    with torch.device("meta"):
        module = make(s.plugin, shape.hidden, keep_count(s.keep, shape.patches * shape.crops))
    return [p.shape for p in module.parameters()] if module else []


def fixed(shape: Shape, s: Settings) -> Fixed:
    view = shape.layers * sum(out * into for out, into in shape.adapters(s.rank))
    adapters, idle = s.views * view, (s.views - 1) * view * (s.stage == "train")
    parameters = sum(shape.parameters.values()) + adapters + s.isolator * shape.hidden
    parameters += sum(size.numel() for size in learned(shape, s))
    tensors = trained(shape, s)
    trainable = sum(count * n for count, n in tensors)
    weights = 4 * trainable + s.width * (parameters - trainable)
    if s.stage == "align":
        weights += (4 - s.width) * adapters  # frozen, but fp32 as always
    if s.quantise == "nf4":
        weights -= s.width * shape.parameters["layers"]
        weights += shape.layers * sum(nf4(out * into) for out, into in shape.linears)
    moments = sum(count * _moments(n, s.optimizer) for count, n in tensors)
    return Fixed(parameters, trainable, weights, 4 * (trainable - idle), moments)


def nf4(n: int) -> int:
    """Bytes of n weights in 4 bits: a byte of scale for every 64, four bytes for 256 of those, tables and an offset."""
    scales = math.ceil(n / 64)
    return math.ceil(n / 2) + scales + 4 * math.ceil(scales / 256) + 4 * (16 + 256 + 1)


def _moments(n: int, optimizer: str) -> int:
    """Bytes of both moments of a tensor of n numbers. bitsandbytes leaves small tensors in 32 bits and can move the
    pages of large ones out of the GPU."""
    if optimizer == "adamw" or n < 4096:
        return 8 * n
    scales = 8 * math.ceil(n / 256)
    return scales if optimizer == "paged_adamw8bit" and n >= 100_000 else 2 * n + scales


@dataclass(frozen=True)
class MicroBatch:
    """What memory depends on in the samples that go through a step together."""

    mode: str
    rows: int  # that the LLM learns from, padding included
    ids: int  # words and placeholders, padding included
    visual: int  # feature rows of all images
    images: int
    answers: int

    @property
    def text(self) -> int:
        return self.ids - self.visual

    @classmethod
    def of(cls, mode: str, text: int, images: list[int], answers: int, s: Settings, samples: int = 1) -> "MicroBatch":
        """`samples` samples with this many text rows, visual rows per image, and tokens to learn."""
        rows = plan_rows(text, images, Plan(mode, keep=s.keep), s.isolator)
        return cls(mode, *(samples * n for n in (rows, text + sum(images), sum(images), len(images), answers)))


@dataclass(frozen=True)
class Step:
    """The forward and backward of a micro-batch: bytes beside the fixed ones."""

    shape: Shape
    s: Settings
    batch: MicroBatch
    recompute: bool

    @cached_property
    def crops(self) -> int:
        """The crops of all images. Unpadding removes less than half of a picture's rows."""
        more = max(0, self.batch.visual - self.batch.images * self.shape.patches)
        return min(self.batch.images * self.shape.crops, self.batch.images + math.ceil(2 * more / self.shape.patches))

    @cached_property
    def row(self) -> int:
        """What autograd keeps for one row in one layer of the LLM."""
        shape, s = self.shape, self.s
        weighs = s.weighs and self.batch.mode == "fast"  # heads are wider by one column of weights, filled up to eight
        attention = 4 * (shape.queries + 8 * shape.heads * weighs) * s.width + 4 * shape.heads
        inputs = sum(into for _, into in shape.linears)  # of linear layers that train or have adapters
        masks = inputs if s.rank and s.dropout and not s.half else 0
        if s.half:  # autocast copies each fp32 row once; attention's output is in half precision already
            inputs = (inputs - shape.queries * (not weighs)) * s.full  # but a copy of it is kept where that is wider
            inputs += shape.queries * (weighs and not s.full and s.stage == "train")
        elif not masks:
            inputs = 2 * shape.hidden + shape.inner  # one for q, k and v, one for gate and up, one for down
            inputs += shape.queries * weighs
        inputs = (inputs + len(shape.linears) * s.rank) * s.width * (s.half or s.stage == "train")
        return 2 * self._norm + attention + (2 if s.half else 3) * shape.inner * s.width + masks + inputs

    @cached_property
    def _norm(self) -> int:
        """What autograd keeps for one row in a norm: in fp32, one that trains also keeps the normalised input."""
        return self.shape.hidden * (self.s.stream if self.s.half else 4 * (2 if self.s.full else 1))

    @cached_property
    def _copies(self) -> int:
        """Autocast's half-precision copies of the fp32 matrices in one layer of the LLM."""
        return 2 * (self.s.half and self.s.full) * sum(out * into for out, into in self.shape.linears)

    @cached_property
    def projects_twice(self) -> bool:
        """Whether all rows are projected without a graph and those that stay once more with one (`chooser.py`)."""
        return self.batch.mode == "fast" and self.shape.rowwise and entry(self.s.plugin).merges != "features"

    @cached_property
    def seen(self) -> int:
        """Feature rows that the LLM sees."""
        batch = self.batch
        kept = max(0, batch.rows - batch.text - batch.images * self.s.isolator)
        return kept if batch.mode == "fast" else batch.visual

    @cached_property
    def _projector(self) -> int:
        rows = self.seen if self.projects_twice else self.crops * self.shape.patches
        return rows * (self.shape.read + 2 * self.shape.hidden) * self.s.width

    @cached_property
    def _learned(self) -> int:
        """What a learned plugin keeps of the visual rows: fp32 copies, its layers' outputs, and the rows it weighs."""
        outs = sum(size[0] for size in learned(self.shape, self.s) if len(size) == 2)
        row = self.shape.hidden * (4 + self.s.width) + 2 * 4 * outs if outs and self.batch.mode == "fast" else 0
        return self.batch.visual * row

    @cached_property
    def kept(self) -> int:
        """What autograd keeps of the whole forward."""
        shape, s, rows = self.shape, self.s, self.batch.rows
        layer = rows * shape.hidden * s.stream if self.recompute else rows * self.row + self._copies
        answers = self.batch.answers * shape.hidden * s.stream * (2 if self.batch.mode == "slow" else 1)
        projector = self._projector + 2 * s.half * shape.hidden**2
        return projector + self._learned + shape.layers * layer + rows * self._norm + answers

    @cached_property
    def phases(self) -> dict[str, int]:
        """What is alive in each phase that may be the peak. A teacher needs less than the student after it."""
        shape, s, batch, h, b = self.shape, self.s, self.batch, self.shape.hidden, self.s.width
        rows, pixels = batch.rows, self.crops * 3 * shape.pixels**2 * 4
        tower = self.crops * (shape.patches + 1) * (3 * shape.tower_inner * b + 4 * shape.tower * 4)
        # Features, twice; an fp32 copy; and what the plugin holds of each pair.
        pruning = batch.visual * h * (2 * b + 4 * s.half)
        pruning += int(entry(s.plugin).pair_bytes(s.keep) * batch.visual**2) // max(batch.images, 1)
        chosen = self.crops * shape.patches * shape.read * b if self.projects_twice else self._projector
        features, gathered = self.seen * h * b, rows * h * s.stream
        table = (2 * batch.text + self.seen) * h * s.stream  # words, and words with the features after them
        loss = (6 if batch.mode == "slow" else 3) * 4 * min(batch.answers, CHUNK) * shape.vocab  # fp32 logits
        loss += 2 * s.half * h * shape.vocab * s.full  # autocast's copy of the head
        mlp = rows * shape.inner * b  # one of gate, silu(gate) and up, or of their gradients
        # The adapter at the end of a layer: what dropout leaves of its input if nothing keeps that, and a mask.
        if s.half:
            end = mlp * (not s.full) + (mlp + rows * shape.inner) * bool(s.rank and s.dropout)
        else:
            end = mlp * (2 if s.stage == "align" else 1) * bool(s.rank and s.dropout)
        end += rows * 6 * h * b
        forward, backward = end + gathered * (s.stream == 2), rows * 2 * h * b
        backward += mlp * (5 - s.full if s.half else 2 if s.stage == "train" else 3)
        if self.recompute:
            forward = max(end, 3 * mlp)
            backward = max(end, backward) + rows * (self.row - h * s.stream) + self._copies
        # The largest weight: its 16-bit copy, made from 4 bits, or its gradient before it is added to the others.
        weight = h * max(shape.inner, shape.vocab * s.full) * (6 if s.full else 2 * (s.quantise == "nf4"))
        return {
            "tower": pixels * (2 if shape.newline else 1) + tower,
            "pruning": (pixels + chosen + pruning) * (batch.mode != "full"),
            "table": pixels + self._projector + features + table + gathered,
            "forward": pixels + self.kept + features + max(forward, loss),
            "backward": pixels + self.kept + max(backward, loss, weight),
        }

    @property
    def peak(self) -> int:
        return max(self.phases.values())


@cache
def rows_within(free: float, shape: Shape, s: Settings, coming: int | None = None) -> int:
    """Returns how many rows of any kind a micro-batch may have without recomputing: all visual and all answers, or what
    pruning has left of pictures. Weights and moments are allocated already, `coming` bytes (default: gradients) not."""
    free = (1 - MARGIN) * free - (fixed(shape, s).gradients if coming is None else coming)

    def needs(rows: int, mode: str, visual: int) -> int:
        batch = MicroBatch(mode, rows, visual, visual, math.ceil(visual / shape.patches / shape.crops), rows)
        return Step(shape, s, batch, recompute=False).peak

    worse = lambda rows: max(needs(rows, "slow", rows), needs(rows, "fast", int(rows / s.keep)))
    return bisect.bisect_right(range(1, 2**20), free, key=worse)


def rows_that_fit(model, s: Settings, coming: int | None = None) -> float:
    """Returns `rows_within` what the model's device has left and this process may take; infinity on a CPU. Of a model
    whose needs are not known none fit for sure, and all are recomputed."""
    device = model.device
    if device.type != "cuda":
        return math.inf
    if not is_known(model.config):
        return 0
    (free, total), reserved = cuda.mem_get_info(device), cuda.memory_reserved(device)
    free = min(free, cuda.get_per_process_memory_fraction(device.index) * total - reserved)
    return rows_within(free + reserved - cuda.memory_allocated(device), Shape(model.config), s, coming)
