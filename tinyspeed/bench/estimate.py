"""Memory and time of a recipe before anything is loaded, and the settings with which it fits a GPU.

    memory of a run      the largest peak of its stages and modes, by the formulas of `memory.py`
    FLOPs of a sample    a weight and row: 2 forward, 2 back to the input, and 2 to the weight where that trains;
                         + attention, recomputing, tower, logits of the answers, and a slow step's teacher

Only the model's configuration is read, and the lengths of the data where it is there. Each mode is taken at its worst:
the longest sample, or one with more visual rows, as often as a micro-batch holds it. Advice is found by estimating
again, with the most harmless changes first, so what is advised does fit. Time is FLOPs divided by what a GPU sustains:
an assumption, a third to a half of the number on its box.
"""

from bisect import bisect_left
from dataclasses import dataclass, replace
from functools import cached_property, partial
from math import inf, isqrt
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig

from ..data import conversations, digits, digits_model
from ..data.examples import Sample, Source
from ..models import loading, memory, precision
from ..models.memory import GIB, RESERVE, MicroBatch, Settings, Shape, Step
from ..recipe import Recipe
from ..recipe.schedules import rows_schedule, skipper_of
from ..util.errors import UserError, counted
from ..util.tables import table

TFLOPS = 20.0  # sustained in half precision: about what an RTX 3060 to 4070 does
TEXT, ANSWERS, EPOCH = 100, 60, 1000  # text rows and tokens to learn of assumed samples, and their number
SEVERAL, GRAIN = 2000, 64  # samples whose FLOPs are averaged; and what advised numbers of rows are multiples of
BYTES = ("GiB", 2**30), ("MiB", 2**20)
FLOPS = ("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)
SKIPPED = " All answers are counted: what ReGATE skips depends on the run, and comes off."
ON_A_CPU = "On a CPU what is measured is the whole process, libraries and all."
TIMES = ("days", 86400), ("h", 3600), ("min", 60), ("s", 1)


@dataclass(frozen=True)
class Mode:
    """The worst micro-batch of a mode of a stage."""

    samples: int
    rows: int
    recompute: bool
    peak: int  # bytes


@dataclass(frozen=True)
class Case:
    """What stays as it is when a recipe is changed."""

    shape: Shape
    samples: list[Sample]
    epoch: int
    data: str  # how that is known
    precision: str
    gpu: float | None  # GiB

    @property
    def most(self) -> float:  # bytes
        return inf if self.gpu is None else self.gpu * GIB - RESERVE

    @cached_property
    def worst(self) -> list[Sample]:
        """Those samples beside which no other has as many visual rows and more text."""
        found: list[Sample] = []
        for sample in sorted(self.samples, key=lambda sample: (-sum(sample[1]), -sample[0])):
            if not found or sample[0] > found[-1][0]:
                found.append(sample)
        return found

    def mode(self, recipe: Recipe, name: str, mode: str) -> Mode:
        every = (self.micro_batch(recipe, name, mode, sample) for sample in self.worst)
        return max(every, key=lambda found: (found.peak, found.rows))

    def micro_batch(self, recipe: Recipe, name: str, mode: str, sample: Sample, samples: int = 0) -> Mode:
        """`samples` samples like this one; 0: as many as the row budget allows."""
        s, stage, (text, images, answers) = Settings.of(recipe, name, self.precision), getattr(recipe, name), sample
        text = max(1, min(text, (recipe.data.max_rows or inf) - sum(images)))  # where it is max_rows that was changed
        rows = MicroBatch.of(mode, text, images, answers, s).rows
        samples = samples or min(stage.batch, max(1, stage.row_budget // rows) if stage.row_budget else stage.batch)
        batch = MicroBatch.of(mode, text, images, min(text, answers), s, samples)
        fixed = memory.fixed(self.shape, s)
        fit = memory.rows_within(self.most - fixed.weights - fixed.moments, self.shape, s)  # when a stage begins
        most = {"on": 0, "off": inf, "auto": fit}[stage.checkpointing]
        step = Step(self.shape, s, batch, recompute=batch.rows > most)
        return Mode(samples, batch.rows, step.recompute, fixed.total + step.peak)

    def used(self, recipe: Recipe) -> dict[tuple[str, str], Mode]:
        names = [name for name, _ in recipe.stages()]
        return {(name, mode): self.mode(recipe, name, mode) for name in names for mode in shares(recipe, name)}

    def too_large(self, recipe: Recipe) -> list[str]:
        """The stages that do not fit."""
        return [name for (name, _), mode in self.used(recipe).items() if mode.peak > self.most]

    def largest(self, recipe: Recipe, key: str) -> int:
        """The largest value of this key, up to the rows of a batch, with which a recipe fits; and if it is a row
        budget, without recomputing more than with the smallest."""
        longest = max(text + sum(images) for text, images, _ in self.worst)
        values = range(GRAIN, max(stage.batch for _, stage in recipe.stages()) * longest + GRAIN, GRAIN)

        def cost(value: int) -> tuple[bool, int]:
            larger = changed(recipe, {key: value})
            again = sum(mode.recompute for mode in self.used(larger).values())
            return bool(self.too_large(larger)), again * key.endswith("row_budget")

        return GRAIN * bisect_left(values, True, key=lambda value: cost(value) > (False, cost(GRAIN)[1]))


@dataclass(frozen=True)
class Estimate:
    recipe: Recipe
    case: Case
    tflops: float
    peak: int  # bytes
    changes: dict[str, object] | None  # with which it fits the GPU; None: nothing helps
    room: dict[str, object]  # larger row budgets that still fit

    def work(self, name: str) -> tuple[int, float, float]:
        """Samples in all steps of a stage, their FLOPs in full training, and in the recipe's."""
        case, recipe, mix, stage = self.case, self.recipe, shares(self.recipe, name), getattr(self.recipe, name)
        s, some = Settings.of(recipe, name, case.precision), case.samples[:: -(-len(case.samples) // SEVERAL)]
        again = {mode: case.mode(recipe, name, mode).recompute for mode in {**mix, "full": 0}}
        each = lambda mode, layers: fmean(flops(case.shape, s, mode, sample, again[mode], layers) for sample in some)
        ours = sum(share * each(mode, depth(recipe, name, mode, case.shape.layers)) for mode, share in mix.items())
        samples = stage.total(case.epoch) * stage.batch
        return samples, samples * each("full", case.shape.layers), samples * ours


def estimate(
    recipe: Recipe, gpu: float | None = None, tflops: float | None = None, source: Source | None = None
) -> Estimate:
    """`gpu`: GiB of the GPU it shall fit; without it this machine's, if it has one. `tflops`: what that sustains.
    `source`: the data, where it has been read already."""
    for name, value in (("--gpu", gpu), ("--tflops", tflops)):
        if value is not None and not 0 < value < inf:
            raise UserError(f"{name} {value:g}: must be above 0")
    name = "bf16" if recipe.model.precision == "auto" else recipe.model.precision
    if gpu is None:
        device = torch.device("cuda" if torch.cuda.is_available() and recipe.run.device != "cpu" else "cpu")
        name = precision.resolve(recipe.model.precision, device)
        gpu = torch.cuda.get_device_properties(device).total_memory / GIB if device.type == "cuda" else None
    shape = shape_of(recipe)
    case = Case(shape, *lengths_of(recipe, shape, source), name, gpu)
    peak = max(mode.peak for mode in case.used(recipe).values())
    changes = _mend(case, recipe) if case.too_large(recipe) else {}
    budgets = {f"{name}.row_budget": stage.row_budget for name, stage in recipe.stages() if gpu and stage.row_budget}
    room = {key: most for key, now in budgets.items() if (most := case.largest(recipe, key)) > now}
    return Estimate(recipe, case, tflops or TFLOPS, peak, changes, room)


def shape_of(recipe: Recipe) -> Shape:
    """From a configuration; a model from parts, and the embedded default's, are put together as they will be."""
    model = recipe.model
    if model.path:
        return Shape(loading.load_config(model.path))
    if not model.llm:
        return Shape(digits_model.build_model(0, **recipe.digits.sizes).config)
    with loading.explaining(f"cannot read the configuration of {model.llm} or {model.tower}"):
        text = AutoConfig.from_pretrained(model.llm, trust_remote_code=False)
        vision = CLIPVisionConfig.from_pretrained(model.tower)
    text.vocab_size = -(-(text.vocab_size + 2) // 64) * 64  # <image>, <pad>, and padding
    return Shape(LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=text.tie_word_embeddings))


def lengths_of(recipe: Recipe, shape: Shape, source: Source | None = None) -> tuple[list[Sample], int, str]:
    """Lengths of samples, how many make an epoch, and how that is known."""
    data, path = recipe.data, recipe.model.path
    if data.kind == "digits":
        source = digits.from_recipe(recipe)
        return [source.lengths(0)], len(source), "the embedded digits"
    if path and Path(data.file).is_file():
        source = source or conversations.from_recipe(recipe, path)
        every = [source.lengths(i) for i in range(len(source))]
        return every, len(every), f"{counted(len(every), 'sample')} of {data.file}"
    text, (picture,), answers = assumed(recipe, shape)
    why = "there is no such file" if path else "the model has no processor yet"
    said = f"{EPOCH:,} samples of {text} text rows, {picture:,} visual rows and {answers} tokens to learn, assumed"
    return [(text, [picture], answers)], EPOCH, f"{said} in place of {data.file}: {why}"


def assumed(recipe: Recipe, shape: Shape) -> Sample:
    """A short conversation about one large picture, where there is no data."""
    crops, side = min(shape.crops, 5), shape.pixels // shape.patch
    picture = crops * shape.patches + shape.newline * side * isqrt(crops - 1)
    return TEXT, [max(1, min(picture, (recipe.data.max_rows or inf) - TEXT))], ANSWERS


def shares(recipe: Recipe, name: str) -> dict[str, float]:
    """The modes of a stage, and their shares of its steps. A slow step without a teacher is a full one."""
    schedule = rows_schedule(recipe, name)
    slow = getattr(schedule, "slow", None)
    found = {"fast": 1 - slow, "slow" if recipe.dualspeed.distill else "full": slow} if slow else None
    return {mode: share for mode, share in (found or {schedule.plan(0).mode: 1.0}).items() if share}


def depth(recipe: Recipe, name: str, mode: str, layers: int) -> float:
    """Of the LLM's layers, how many a step of this mode runs on average. A slow step runs all of them."""
    skipper = skipper_of(recipe, name, layers)
    slow = mode == "slow" or (mode == "full" and recipe.dualspeed.schedule != "full")  # one without a teacher
    return layers if slow or not skipper else skipper.on_average


def flops(shape: Shape, s: Settings, mode: str, sample: Sample, recompute: bool, layers: float | None = None) -> float:
    """Of one sample, forward and backward, through so many layers of the LLM: all, if nothing is said."""
    layers = layers or shape.layers
    batch, fast = (MicroBatch.of(which, *sample, s) for which in (mode, "fast"))
    weights = sum(out * into for out, into in shape.linears)
    adapters = sum(out * into for out, into in shape.adapters(s.rank))
    step = Step(shape, s, batch, recompute)
    hidden, tower, crops = shape.hidden, shape.tower, step.crops
    forward = lambda rows: rows * (weights + adapters) + rows**2 * shape.queries  # causal: half of all pairs, twice
    backward = batch.rows * (weights * (1 + s.full) + adapters * (1 + (s.stage == "train")))
    backward += 2.5 * batch.rows**2 * shape.queries
    head = batch.answers * hidden * shape.vocab  # runs again in the backward, a teacher's too
    again = (forward(batch.rows) - batch.rows * hidden * shape.inner * (not s.rank)) * recompute  # all but the end
    total = layers * (forward(batch.rows) + again + backward) + head * (3 + s.full)
    if mode == "slow":
        total += layers * forward(fast.rows) + 2 * head
    if mode != "full":
        total += sum(n**2 * hidden for n in sample[1])  # which rows are alike
    patches, tokens = crops * shape.patches, crops * (shape.patches + shape.clip)
    layer = tokens * (4 * tower**2 + 2 * tower * shape.tower_inner) + 2 * tokens**2 // max(1, crops) * tower
    total += shape.tower_layers * layer + patches * 3 * shape.patch**2 * tower
    projector = patches * (shape.read + hidden) * step.projects_twice
    projector += (step.seen if step.projects_twice else patches) * (2 * shape.read + 3 * hidden)
    return 2 * (total + projector * hidden)


def changed(recipe: Recipe, *changes: dict[str, object]) -> Recipe:
    for key, value in (item for change in changes for item in change.items()):
        section, name = key.split(".")
        recipe = replace(recipe, **{section: replace(getattr(recipe, section), **{name: value})})
    return recipe


def _mend(case: Case, recipe: Recipe) -> dict[str, object] | None:
    """The first change with which a recipe fits, or it and those of the ones before it that are needed."""
    names, rank = case.too_large(recipe), recipe.lora.rank
    options = [
        {f"{name}.row_budget": GRAIN for name in names},  # less than a sample: one at a time
        {f"{name}.checkpointing": "on" for name in names},
        {f"{name}.optimizer": "paged_adamw8bit" for name in names},
        {**({} if rank else {"lora.rank": 16}), "model.quantise": "nf4"},
        {"lora.rank": min(rank or 8, 8)},
        {"data.max_rows": max(sum(images) for _, images, _ in case.worst) + GRAIN, "data.too_long": "cut"},
    ]
    firsts = (options[: n + 1] for n in range(len(options)))
    needed = next((first for first in firsts if not case.too_large(changed(recipe, *first))), None)
    if needed is None:
        return None
    for option in needed[-2::-1]:
        without = [other for other in needed if other is not option]
        needed = needed if case.too_large(changed(recipe, *without)) else without
    changes = {key: value for option in needed for key, value in option.items()}
    for key in ("data.max_rows", "align.row_budget", "train.row_budget"):
        if key in changes:  # no sample shorter, and no micro-batch smaller, than it must be
            changes[key] = max(changes[key], case.largest(changed(recipe, changes), key))
    return changes


def describe(found: Estimate) -> str:
    """Everything, as tables and one sentence."""
    case, recipe, fixed, steps, work = found.case, found.recipe, [], [], []
    for name, _ in recipe.stages():
        f, (samples, full, ours) = memory.fixed(case.shape, Settings.of(recipe, name, case.precision)), found.work(name)
        sizes = [_said(n, BYTES) for n in (f.weights, f.gradients, f.moments)]
        fixed.append([name, f"{f.parameters:,}", f"{f.trainable:,}", *sizes])
        for mode in {**(used := shares(recipe, name)), "full": 0}:
            m = case.mode(recipe, name, mode)
            sizes = [_said(n, BYTES) for n in (m.peak - f.total, m.peak)]
            said = mode if mode in used else f"{mode} (to compare)"
            steps.append([name, said, m.samples, f"{m.rows:,}", "yes" if m.recompute else "no", *sizes])
        times = [_said(n / found.tflops / 1e12, TIMES) for n in (full, ours)]
        work.append([name, f"{samples:,}", _said(full, FLOPS), _said(ours, FLOPS), f"{full / ours:.2f}x", *times])
    model, rank = recipe.model, recipe.lora.rank
    lora = f"LoRA of rank {rank}{' for each mode' * recipe.dualspeed.views}"
    how = [case.precision, *["LLM in 4 bits"] * (model.quantise != "none"), *[lora] * bool(rank)]
    parts = [
        f"{model.path or model.llm or 'the embedded default'}: {', '.join(how)}\ndata: {case.data}",
        table(["stage", "parameters", "trained", "weights", "gradients", "optimizer"], fixed),
        table(["stage", "mode", "samples", "rows", "recompute", "activations", "peak"], steps),
        table(["stage", "samples", "full training", "this recipe", "speed-up", "time of full", "time"], work),
        f"Times assume {found.tflops:g} TFLOP/s sustained (--tflops)." + SKIPPED * (recipe.regate.keep < 1),
    ]
    return "\n\n".join([*parts, _verdict(found)])


def _verdict(found: Estimate) -> str:
    needs = f"{_said(found.peak, BYTES)}, and {_said(RESERVE, BYTES)} for CUDA and gaps in its memory"
    if found.case.gpu is None:
        return f"A GPU would need {needs}. --gpu says whether one fits, and what to change if not."
    flags = " ".join(f"--set {key}={value}" for key, value in (found.changes or found.room).items())
    if found.changes == {}:
        return f"Fits {found.case.gpu:g} GiB: {needs}." + f" So do larger micro-batches, with {flags}" * bool(flags)
    mend = f"It fits with {flags}" if found.changes else "Nothing that was tried mends that; take a smaller model."
    return f"Does not fit {found.case.gpu:g} GiB: {needs}. {mend}"


def compare_measured(found: Estimate, measured: list[dict]) -> str:
    """What a dry run (`train.dry_run`) measured, beside the estimate of the same micro-batches."""
    rows = []
    for m in measured:
        same = partial(found.case.micro_batch, found.recipe, m["stage"], m["mode"], samples=m["samples"])
        same = max(map(same, found.case.worst), key=lambda batch: batch.rows)
        got, want = m["memory_mib"], same.peak / 2**20
        off = None if got is None else f"{100 * (want / got - 1):+.0f}"
        rows.append([m["stage"], m["mode"], f"{same.rows:,}", got and f"{got / 1024:.2f}", f"{want / 1024:.2f}", off])
    said = table(["stage", "mode", "rows", "measured GiB", "estimated GiB", "off by %"], rows)
    return said if found.case.gpu else f"{said}\n\n{ON_A_CPU}"


def _said(n: float, units: tuple[tuple[str, float], ...]) -> str:
    unit, size = next((unit for unit in units if n >= unit[1]), units[-1])
    return f"{n / size:,.{(n < 10 * size) + (n < 100 * size)}f} {unit}"
