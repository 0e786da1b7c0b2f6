"""The sections of a recipe, with their keys, defaults and checks.

    [run] [model] [lora] [data] [digits] [dualspeed] [sts] [regate] [align] [train] [scale]

`align` and `train` are LLaVA's two stages. First the projector alone is trained and every step is fast; then the LLM is
trained too, by fast and slow steps. The same recipe runs on one CPU and on a cluster.
"""

import dataclasses
import json
import math
from dataclasses import dataclass, field
from pathlib import Path

from ..adaptive import AdaptiveSchedule
from ..regate import Settings as RegateSettings
from ..scheduler import KINDS, Plan
from ..util import paths, require, require_known, require_range

PRECISIONS = ("auto", "fp32", "bf16", "fp16")
QUANTISATIONS = ("none", "nf4")
OPTIMIZERS = ("adamw", "adamw8bit", "paged_adamw8bit")
LARGEST = 2**31 - 1  # the largest whole number of any key but the seed
LAST = ("dualspeed", "sts")  # their checks may import torch, so those of other sections come first
INPUTS = {  # the keys that say where a run's inputs are
    "model": ("path", "tower", "llm"), "data": ("file", "images"), "dualspeed": ("isolator_from",),
    "regate": ("reference",),
}  # fmt: skip


@dataclass(frozen=True)
class RunSection:
    name: str = "run"  # Name of the run; its folder is run.folder/NAME.
    folder: str = "runs"  # The folder that holds the folders of all runs.
    seed: int = 0  # Another seed draws another order of the data, other slow steps and other new weights.
    threads: int = 0  # CPU threads; 0 = torch's choice. A resumed run gives the same bits only with the same number.
    device: str = "auto"  # "cpu", "cuda", or "auto": CUDA where there is a GPU.
    save_every: int = 200  # Most steps between checkpoints.
    save_minutes: float = 10.0  # Most minutes between checkpoints; at an epoch's end, a tenth of them.
    keep_checkpoints: int = 2  # How many checkpoints are kept; older ones are deleted.
    cache: str = "~/.cache/tinyspeed"  # Folder for unpacked parquet files, tower features, reference losses.

    def __post_init__(self):
        good = self.name and not self.name.startswith(".") and "/" not in self.name and "\\" not in self.name
        good = good and not paths.CONTROL.search(self.name) and len(self.name.encode()) <= 200
        require(bool(good), f"run.name = {self.name!r}: must be a plain folder name")
        require_range(self, "run.", seed=(0, 2**32 - 1), threads=(0, 1024))
        require_range(self, "run.", save_every=(1, LARGEST), save_minutes=(0, 10**9), keep_checkpoints=(1, LARGEST))
        require_known("run.device", self.device, ("auto", "cpu", "cuda"))


@dataclass(frozen=True)
class ModelSection:
    path: str = ""  # Hub id or folder. Empty: the tiny LLaVA of the digits is built, and its tower trained.
    tower: str = ""  # Instead of model.path: a CLIP tower, which becomes a LLaVA with model.llm and a new projector.
    llm: str = ""  # The Llama, Vicuna or Mistral that goes with model.tower.
    precision: str = "auto"  # "fp32", "bf16", "fp16", or "auto": bf16 on a GPU that has it, else fp16; fp32 on a CPU.
    quantise: str = "none"  # "nf4" holds the LLM's frozen weights in 4 bits, to save memory; tuning needs lora.rank.

    def __post_init__(self):
        require_known("model.precision", self.precision, PRECISIONS)
        require_known("model.quantise", self.quantise, QUANTISATIONS)
        require(bool(self.tower) == bool(self.llm), "model.tower and model.llm: a model from parts needs both")
        require(not (self.path and self.tower), "model.path and model.tower: a model comes from one or the other")


@dataclass(frozen=True)
class LoraSection:
    rank: int = 0  # Rank of the LoRA adapters on the LLM; 0 = no adapters, [train] trains the whole LLM.
    alpha: float = 0.0  # Scale of the adapters; 0 = twice the rank.
    dropout: float = 0.05  # Share of the adapters' inputs that training drops.

    def __post_init__(self):
        require_range(self, "lora.", rank=(0, 2**16), alpha=(0, 10**9))
        require(self.rank > 0 or not self.alpha, "lora.alpha is given: set lora.rank too")
        require(0 <= self.dropout < 1, f"lora.dropout = {self.dropout}: must be between 0 and 1")

    @property
    def scale(self) -> float:
        """What an adapter's product is multiplied with."""
        return (self.alpha or 2 * self.rank) / max(self.rank, 1)


@dataclass(frozen=True)
class DataSection:
    kind: str = "digits"  # "digits": the built-in pictures of digits; "chat": conversations about your own pictures.
    turns: int = 6  # Digits: questions about each picture in training.
    eval_pictures: int = 1000  # Digits: pictures that the model is asked about after training, one question each.
    file: str = ""  # Chat: LLaVA's JSON, or chat messages as JSON, JSONL or parquet.
    images: str = ""  # Chat: the folder that the names of pictures start from; empty = the folder of the file.
    template: str = "chat"  # "chat": the processor's chat template; "plain": a picture and its caption, for aligning.
    system: str = ""  # A system message for conversations that have none, and for questions to the model.
    max_rows: int = 0  # Longest sample in tokens, image tokens included; 0 = the model's context.
    too_long: str = "error"  # "error" refuses longer samples; "cut" cuts the end of their text off, never a picture.
    min_pixels: int = 0  # Qwen-VL: smaller pictures are enlarged to so many pixels; 0 = as the model's processor does.
    max_pixels: int = 0  # Qwen-VL: larger pictures are scaled down to so many pixels; 0 = as its processor does.
    skip_bad: bool = False  # Leave bad records out and list them in skipped.txt; otherwise they are an error.
    workers: int = 2  # Processes that decode pictures ahead of training; 0 = none. Add some if the GPU waits.
    feature_cache_gb: float = 0.0  # GB of disk for the frozen tower's features, which save time after the first epoch.

    def __post_init__(self):
        require_known("data.kind", self.kind, ("digits", "chat"))
        require_known("data.template", self.template, ("chat", "plain"))
        require_known("data.too_long", self.too_long, ("error", "cut"))
        require_range(self, "data.", turns=(1, LARGEST), eval_pictures=(1, LARGEST), max_rows=(0, LARGEST))
        require_range(self, "data.", workers=(0, LARGEST), feature_cache_gb=(0, 10**9))
        require_range(self, "data.", min_pixels=(0, LARGEST), max_pixels=(0, LARGEST))
        require(self.kind == "chat" or not self.file, 'data.file is given: set data.kind = "chat" too')
        require(self.kind != "chat" or bool(self.file), 'data.file: data.kind = "chat" needs a file of conversations')

    @property
    def system_message(self) -> str:
        """What is written into the chat template; captions and digits do without."""
        return self.system if (self.kind, self.template) == ("chat", "chat") else ""


@dataclass(frozen=True)
class DigitsSection:
    """The pictures of the built-in digits, and the sizes of their model."""

    side: int = 12  # A picture has side x side cells, each an image token; 24 makes 576, as LLaVA-1.5 has.
    regions: int = 2  # 2, 3 or 4: a picture has 2 x 2, 3 x 3 or 4 x 4 regions, each with one digit or none.
    pictures: int = 1_000_000  # Different pictures in training; with few, a run sees them again.
    width: int = 128  # Width of the tiny LLM, a multiple of 8.
    layers: int = 2  # Layers of the tiny LLM.
    tower_width: int = 64  # Width of its vision tower, a multiple of 8.
    tower_layers: int = 2  # Layers of its vision tower.
    tower_steps: int = 500  # Steps that train the vision tower before the run begins.

    def __post_init__(self):
        require_range(self, "digits.", side=(1, 96), pictures=(1, LARGEST), tower_steps=(1, LARGEST))
        require_range(self, "digits.", width=(1, 8192), tower_width=(1, 8192), layers=(1, 128), tower_layers=(1, 128))
        for name in ("width", "tower_width"):
            require(getattr(self, name) % 8 == 0, f"digits.{name} = {getattr(self, name)}: must be a multiple of 8")
        require(self.regions in (2, 3, 4), f"digits.regions = {self.regions}: must be 2, 3 or 4")
        require(self.side % self.regions == 0, f"digits.side = {self.side}: must be a multiple of digits.regions")

    @property
    def sizes(self) -> dict[str, int]:
        """What the model is built with."""
        return {name: n for name, n in dataclasses.asdict(self).items() if name not in ("pictures", "tower_steps")}


@dataclass(frozen=True)
class DualSpeedSection:
    plugin: str = "divprune"  # What chooses the image tokens of fast steps; `tinyspeed look` draws each choice.
    keep: float = 0.1  # Share of the image tokens that fast steps see; fewer tokens are faster.
    schedule: str = "bernoulli"  # Slow steps: "bernoulli", "periodic", "adaptive", none ("fast"); "full": no pruning.
    slow: float = 0.1  # Share of slow steps, which see all image tokens; an adaptive schedule begins there.
    gap: float = 0.05  # Adaptive: how much higher the loss on full tokens may be than on pruned ones, in nats a token.
    isolator: int = 4  # Learned tokens in front of each picture that mark a fast step; 0 = none.
    isolator_from: str = ""  # Folder of a finished run whose isolator this run goes on with.
    views: bool = False  # One LoRA for fast steps and one for slow steps, instead of one for both; needs lora.rank.
    distill: float = 1.0  # Weight of slow steps' distillation loss; 0 = none, which saves the teacher's forward.
    temperature: float = 1.0  # Temperature of the distillation loss; above 1 it softens teacher and student alike.
    positions: str = "original"  # "original": kept tokens keep their places; "compact": they close up, as published.
    weights: str = "none"  # What a kept token weighs in attention: "uniform", or "cells": the tokens nearest to it.
    power: float = 1.0  # That number to this power; 0 = no weights.
    weights_after: int = 0  # Steps without weights at the beginning.
    layout: str = "auto"  # Samples "padded" to one length, "packed" end to end, or "auto": whichever is cheaper.

    def __post_init__(self):
        require_known("dualspeed.schedule", self.schedule, KINDS)
        Plan("slow", keep=self.keep, distill=self.distill)  # refuses a bad share or weight
        require_range(self, "dualspeed.", slow=(0, 1))
        require(0 < self.gap < math.inf, f"dualspeed.gap = {self.gap}: must be above 0")
        if self.schedule == "adaptive":
            AdaptiveSchedule(self.slow, self.keep, self.distill)  # refuses what it cannot follow
        # Far outside of this range fp32 cannot hold the scaled logits, or cannot tell them apart.
        require_range(self, "dualspeed.", isolator=(0, 4096), temperature=(0.01, 100))
        require_range(self, "dualspeed.", power=(0, 1), weights_after=(0, LARGEST))
        defaults = type(self)
        if any(getattr(self, key) != getattr(defaults, key) for key in ("plugin", "positions", "weights", "layout")):
            from .. import pruning, rows  # here, for they import torch: other mistakes are named without it

            require_known("dualspeed.plugin", self.plugin, pruning.names())
            require_known("dualspeed.positions", self.positions, rows.POSITIONS)
            require_known("dualspeed.weights", self.weights, pruning.WEIGHTS)
            require_known("dualspeed.layout", self.layout, rows.LAYOUTS)


@dataclass(frozen=True)
class StsSection:
    skip: float = 0.0  # Share of the LLM's layers that a step of [train] leaves out, rounded down; 0 = STS is off.
    layers: str = "random"  # "random" (deeper ones more often), or "influence": those that change answers least.
    protect_first: int = 1  # Layers at the start that always run.
    protect_last: int = 1  # Layers at the end that always run.
    every: int = 10  # One step in this many runs all layers, in addition to the slow steps; 0 = only slow steps do.
    compress: float = 0.0  # Share of the image tokens that [align] sees; 0 = dualspeed.keep.
    compressor: str = ""  # Plugin that chooses them; empty = dualspeed.plugin.

    def __post_init__(self):
        require_range(self, "sts.", skip=(0, 1), compress=(0, 1), every=(0, LARGEST))
        require_range(self, "sts.", protect_first=(0, LARGEST), protect_last=(0, LARGEST))
        require(not self.skip or self.every != 1, "sts.every = 1: every step would run all layers and skip none")
        require(bool(self.compress) or not self.compressor, "sts.compressor is given: set sts.compress too")
        if self.layers != type(self).layers or self.compressor:
            from .. import pruning, sts  # here, for they import torch

            require_known("sts.layers", self.layers, sts.CHOICES)
            if self.compressor:
                require_known("sts.compressor", self.compressor, pruning.names())


@dataclass(frozen=True)
class StageSection:
    steps: int = 0  # Optimizer steps; 0 = as many as epochs asks for. A stage with neither is left out.
    epochs: float = 0.0  # Passes over the data, unless steps is given. With few records, train for more.
    batch: int = 32  # Samples in an optimizer step. With few records, use a smaller batch.
    lr: float = 1e-3  # Learning rate after the warm-up; from there it falls to 0 along half a cosine.
    warmup: float = 0.03  # Share of the steps in which the learning rate rises.
    weight_decay: float = 0.0  # AdamW's weight decay.
    clip: float = 1.0  # Largest norm of the gradient; larger ones are scaled down to it.
    beta2: float = 0.999  # AdamW's second decay rate; short runs may need a smaller one.
    connector_lr: float = 0.0  # Learning rate of projector and isolator; 0 = lr.
    optimizer: str = "adamw"  # "adamw", or with moments in 8 bits, to save memory: "adamw8bit", "paged_adamw8bit".
    row_budget: int = 0  # Tokens of a micro-batch after pruning; 0 = the whole batch. Lower it to save memory.
    checkpointing: str = "auto"  # Recompute activations to save memory: "on", "off", or "auto": where they do not fit.

    def __post_init__(self):
        require(self.lr > 0, f"lr = {self.lr}: must be above 0")
        require_range(self, "", steps=(0, 10**9), epochs=(0, 10**6), batch=(1, 10**6), row_budget=(0, LARGEST))
        # AdamW moves a weight by about lr a step, so 10 is far beyond anything that learns.
        require_range(self, "", warmup=(0, 1), lr=(0, 10), connector_lr=(0, 10), weight_decay=(0, 10**9))
        left = 1 - max(self.lr, self.connector_lr) * self.weight_decay
        require(left > 0, f"weight_decay = {self.weight_decay}: a step leaves {left:.3g} of a weight; set it lower")
        require(self.clip > 0, f"clip = {self.clip}: must be above 0")
        require_known("optimizer", self.optimizer, OPTIMIZERS)
        require_known("checkpointing", self.checkpointing, ("auto", "on", "off"))
        require(0 < self.beta2 < 1, f"beta2 = {self.beta2}: must be between 0 and 1")

    def total(self, samples: int) -> int:
        return self.steps or math.ceil(self.epochs * samples / self.batch)


@dataclass(frozen=True)
class ScaleSection:
    """How `scale` spreads a run over processes; `tinyspeed` itself reads none of it."""

    shard: int = 0  # Ranks that share one copy of the model; 0 = all. 8 = one copy in each node of 8 GPUs (HSDP).
    reshard: bool = True  # Drop a layer's weights between forward and backward; false = less traffic, more memory.
    offload: bool = False  # Keep each rank's slice of the weights in CPU memory.
    window: int = 1  # So many batches are drawn together and sorted by length before they are cut; 1 = no sorting.
    check_every: int = 50  # Steps between checks that all ranks are about to do the same.
    timeout: float = 600.0  # Seconds without progress, or without a sign of another rank, after which all ranks stop.

    def __post_init__(self):
        require_range(self, "scale.", shard=(0, LARGEST), window=(1, 10_000))
        require_range(self, "scale.", check_every=(1, LARGEST), timeout=(1, 10**7))


@dataclass(frozen=True)
class Recipe:
    run: RunSection = field(default_factory=RunSection)
    model: ModelSection = field(default_factory=ModelSection)
    lora: LoraSection = field(default_factory=LoraSection)
    data: DataSection = field(default_factory=DataSection)
    digits: DigitsSection = field(default_factory=DigitsSection)
    dualspeed: DualSpeedSection = field(default_factory=DualSpeedSection)
    sts: StsSection = field(default_factory=StsSection)
    regate: RegateSettings = field(default_factory=RegateSettings)
    align: StageSection = field(default_factory=StageSection)
    train: StageSection = field(default_factory=StageSection)
    scale: ScaleSection = field(default_factory=ScaleSection)

    def replaced(self, **sections: dict) -> "Recipe":
        """Returns the recipe with other values: `recipe.replaced(train={"steps": 5})`."""
        changed = {name: dataclasses.replace(getattr(self, name), **values) for name, values in sections.items()}
        return dataclasses.replace(self, **changed)

    def __post_init__(self):
        tunes, aligns = (bool(stage.steps or stage.epochs) for stage in (self.train, self.align))
        require(tunes or aligns, "the recipe trains nothing: set train.steps or train.epochs")
        require(aligns or not self.sts.compress, "sts.compress is for aligning: set align.steps or align.epochs")
        require(tunes or not self.sts.skip, "sts.skip is for tuning: set train.steps or train.epochs")
        slow = self.dualspeed.slow if self.dualspeed.schedule not in ("fast", "full") else 0
        once = self.sts.skip and self.sts.layers == "influence" and not (self.sts.every or slow)
        require(not once, "sts.every = 0: without slow steps influence is measured in step 1 alone; set it above 0")
        frozen = '4-bit weights cannot be trained: set lora.rank, or model.quantise = "none"'
        require(self.lora.rank > 0 or self.model.quantise == "none" or not tunes, frozen)
        views, kind = self.dualspeed.views, self.dualspeed.schedule
        require(self.lora.rank > 0 or not views, "dualspeed.views is a LoRA for each mode: set lora.rank too")
        trains = not views or slow or kind == "full"
        require(trains, "dualspeed.views: slow steps train what is exported, and there are none")
        require(slow < 1 or not self.sts.skip, "sts.skip: with dualspeed.slow = 1 every step runs every layer")
        require(self.regate.keep == 1 or tunes, "regate.keep: answers are skipped in tuning; set train.steps")
        plugins = sorted({self.pruning(name)[0] for name, _ in self.stages()})
        if plugins != [DualSpeedSection.plugin]:
            from .. import pruning

            asking = [name for name in plugins if "cls_attention" in pruning.entry(name).needs]
            uncached = f"{asking} need [CLS] attention, and features on disk are without: set data.feature_cache_gb = 0"
            require(not (asking and self.data.feature_cache_gb), uncached)
            apart = len(plugins) > 1 and any(pruning.entry(name).learned for name in plugins)
            require(not apart, f"sts.compressor: of {plugins} one learns, and is then the same in all stages")
        most = self.digits.regions**2 + 10  # a region's digit, or the presence of one
        require(self.data.kind != "digits" or self.data.turns <= most, f"data.turns: a picture has {most} questions")
        named = self.data.kind != "chat" or bool(self.model.path or self.model.llm)
        require(named, 'model.path: data.kind = "chat" needs a model')

    @property
    def folder(self) -> Path:
        return paths.expanded(self.run.folder) / self.run.name

    def stages(self) -> list[tuple[str, StageSection]]:
        """The stages that run, each with its name, "align" or "train"."""
        return [(name, s) for name, s in (("align", self.align), ("train", self.train)) if s.steps or s.epochs]

    def pruning(self, stage: str) -> tuple[str, float]:
        """The plugin of a stage's fast steps, and the share of visual rows that it keeps."""
        d, s = self.dualspeed, self.sts
        return (s.compressor or d.plugin, s.compress) if stage == "align" and s.compress else (d.plugin, d.keep)

    def to_toml(self) -> str:
        lines = []
        for section, values in dataclasses.asdict(self).items():
            lines += [f"[{section}]", *(f"{key} = {_toml(value)}" for key, value in values.items()), ""]
        return "\n".join(lines)


def _toml(value) -> str:
    text = json.dumps(value, ensure_ascii=False) if isinstance(value, str | bool) else repr(value)
    return text.replace("\x7f", "\\u007f")  # which JSON takes as it is, and TOML does not
