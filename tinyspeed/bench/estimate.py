"""Memory and time of a recipe before anything is loaded, and the settings with which it fits a GPU.

    memory of a run      the largest peak of its stages and modes, by the formulas of `models/memory.py`
    FLOPs of a sample    for each weight and row: 2 forward, 2 back to the input, and 2 to the weight if that trains;
                         + attention, recomputing, the tower, logits of the answers, and a slow step's teacher

Only the model's configuration is read, and the lengths of the data if it is there. Each mode is taken at its worst:
with the longest sample, or one with more visual rows, as often as a micro-batch holds it. Advice is found by estimating
again with the most harmless changes first, so the recipe does fit with what is advised. Time is FLOPs divided by what a
GPU sustains, which is an assumption: a third to a half of the number on its box.
"""

from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property, partial
from math import inf, isqrt
from pathlib import Path
from statistics import fmean

import torch
from transformers import AutoConfig, CLIPVisionConfig, LlavaConfig

from ..data import conversations, digits, digits_model
from ..data.examples import Sample, Source
from ..models import loading, memory, precision
from ..models.memory import GIB, RESERVE, MicroBatch, Settings, Shape, Step, is_known
from ..recipe import Recipe
from ..recipe.schedules import rows_schedule, skipper_of
from ..util import UserError, counted, tables

TFLOPS = 20.0  # sustained in half precision: about what an RTX 3060 to 4070 does
TEXT, ANSWERS, EPOCH = 100, 60, 1000  # assumed without data: text rows and answers of a sample, samples of an epoch
SAMPLED = 2000  # at most so many samples are averaged for the FLOPs
GRAIN = 64  # advised numbers of rows are multiples of this
BYTES = ("GiB", 2**30), ("MiB", 2**20)
FLOPS = ("EFLOP", 1e18), ("PFLOP", 1e15), ("TFLOP", 1e12), ("GFLOP", 1e9)
TIMES = ("days", 86400), ("h", 3600), ("min", 60), ("s", 1)
REGATE = " All answers are counted: how many ReGATE skips depends on the run, and reduces the time."
SIZES = ("measured GiB", "estimated GiB", "off by %")
ON_A_CPU = "On a CPU the whole process is measured, with all its libraries, and not compared with the estimate."


@dataclass(frozen=True)
class BatchMemory:
    """A micro-batch, and what the device needs for it."""

    samples: int
    rows: int
    recompute: bool
    peak: int  # bytes, with weights, gradients and moments


@dataclass(frozen=True)
class Case:
    """What does not change when settings of a recipe are tried."""

    shape: Shape
    samples: list[Sample]
    epoch: int  # samples
    data: str  # where the lengths of the samples come from
    precision: str
    gpu: float | None  # GiB

    @property
    def available(self) -> float:  # bytes
        return inf if self.gpu is None else self.gpu * GIB - RESERVE

    @cached_property
    def longest(self) -> list[Sample]:
        """The samples of which no other has as many visual rows and more text."""
        found: list[Sample] = []
        for sample in sorted(self.samples, key=lambda sample: (-sum(sample[1]), -sample[0])):
            if not found or sample[0] > found[-1][0]:
                found.append(sample)
        return found

    def worst_batch(self, recipe: Recipe, stage: str, mode: str) -> BatchMemory:
        """Returns the micro-batch of a stage's mode that needs the most."""
        batches = (self.micro_batch(recipe, stage, mode, sample) for sample in self.longest)
        return max(batches, key=lambda batch: (batch.peak, batch.rows))

    def micro_batch(self, recipe: Recipe, name: str, mode: str, sample: Sample, samples: int = 0) -> BatchMemory:
        """Returns a micro-batch of `samples` samples like this one; 0: as many as the row budget allows."""
        s, stage, (text, images, answers) = Settings.of(recipe, name, self.precision), getattr(recipe, name), sample
        text = max(1, min(text, (recipe.data.max_rows or inf) - sum(images)))  # max_rows may be a setting that is tried
        rows = MicroBatch.of(mode, text, images, answers, s).rows
        samples = samples or min(stage.batch, max(1, stage.row_budget // rows) if stage.row_budget else stage.batch)
        batch = MicroBatch.of(mode, text, images, min(text, answers), s, samples)
        fixed = memory.fixed(self.shape, s)
        fit = memory.rows_within(self.available - fixed.weights - fixed.moments, self.shape, s)  # as a stage begins
        recompute = batch.rows > {"on": 0, "off": inf, "auto": fit}[stage.checkpointing]
        step = Step(self.shape, s, batch, recompute)
        return BatchMemory(samples, batch.rows, step.recompute, fixed.total + step.peak)

    def worst_batches(self, recipe: Recipe) -> dict[tuple[str, str], BatchMemory]:
        """Returns the worst batch of each stage and mode."""
        stages = [name for name, _ in recipe.stages()]
        return {(s, mode): self.worst_batch(recipe, s, mode) for s in stages for mode in shares(recipe, s)}

    def too_large(self, recipe: Recipe) -> list[str]:
        """Returns the stages that do not fit."""
        return [name for (name, _), batch in self.worst_batches(recipe).items() if batch.peak > self.available]

    def largest_value(self, recipe: Recipe, key: str) -> int:
        """Returns the largest value of this key, up to the rows of a batch, with which the recipe fits; for a row
        budget, with which it also recomputes no more than with the smallest one."""
        longest = max(text + sum(images) for text, images, _ in self.longest)
        values = range(GRAIN, max(stage.batch for _, stage in recipe.stages()) * longest + GRAIN, GRAIN)

        def cost(value: int) -> tuple[bool, int]:
            tried = changed(recipe, {key: value})
            recomputing = sum(batch.recompute for batch in self.worst_batches(tried).values())
            return bool(self.too_large(tried)), recomputing * key.endswith("row_budget")

        return GRAIN * bisect_left(values, True, key=lambda value: cost(value) > (False, cost(GRAIN)[1]))


@dataclass(frozen=True)
class Estimate:
    recipe: Recipe
    case: Case
    tflops: float
    peak: int  # bytes
    changes: dict[str, object] | None  # with which the recipe fits the GPU; None: nothing helps
    room: dict[str, object]  # larger row budgets that still fit

    def work(self, stage: str) -> tuple[int, float, float]:
        """Returns the samples of all steps of a stage, their FLOPs in full training, and in the recipe's."""
        case, recipe, mix, settings = self.case, self.recipe, shares(self.recipe, stage), getattr(self.recipe, stage)
        s, some = Settings.of(recipe, stage, case.precision), case.samples[:: -(-len(case.samples) // SAMPLED)]
        recompute = {mode: case.worst_batch(recipe, stage, mode).recompute for mode in {**mix, "full": 0}}
        mean = lambda mode, layers: fmean(flops(case.shape, s, mode, one, recompute[mode], layers) for one in some)
        ours = sum(share * mean(mode, depth(recipe, stage, mode, case.shape.layers)) for mode, share in mix.items())
        samples = settings.total(case.epoch) * settings.batch
        return samples, samples * mean("full", case.shape.layers), samples * ours


def estimate(
    recipe: Recipe, gpu: float | None = None, tflops: float | None = None, source: Source | None = None
) -> Estimate:
    """`gpu`: GiB of the GPU that it should fit (default: this machine's, if it has one). `tflops`: what that sustains.
    `source`: the data, if it has been read already."""
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
    peak = max(batch.peak for batch in case.worst_batches(recipe).values())
    changes = _find_changes(case, recipe) if case.too_large(recipe) else {}
    budgets = {f"{name}.row_budget": stage.row_budget for name, stage in recipe.stages() if gpu and stage.row_budget}
    room = {key: most for key, now in budgets.items() if (most := case.largest_value(recipe, key)) > now}
    return Estimate(recipe, case, tflops or TFLOPS, peak, changes, room)


def is_possible(recipe: Recipe) -> bool:
    """Whether the needs of the recipe's model are known beforehand."""
    return not recipe.model.path or is_known(loading.load_config(recipe.model.path))


def shape_of(recipe: Recipe) -> Shape:
    """Returns the shape of a recipe's model from configurations alone, also where the run will put it together."""
    model = recipe.model
    if model.path:
        return Shape(loading.load_config(model.path))
    if not model.llm:
        return Shape(digits_model.build_model(0, **recipe.digits.sizes).config)
    with loading.explaining(f"cannot read the configuration of {model.llm} or {model.tower}"):
        text = AutoConfig.from_pretrained(model.llm, trust_remote_code=False)
        vision = CLIPVisionConfig.from_pretrained(model.tower)
    text.vocab_size = -(-(text.vocab_size + 2) // 64) * 64  # <image> and <pad>, rounded up to a multiple of 64
    return Shape(LlavaConfig(vision_config=vision, text_config=text, tie_word_embeddings=text.tie_word_embeddings))


def lengths_of(recipe: Recipe, shape: Shape, source: Source | None = None) -> tuple[list[Sample], int, str]:
    """Returns lengths of samples, how many samples make an epoch, and where this comes from."""
    data, path = recipe.data, recipe.model.path
    if data.kind == "digits":
        source = digits.from_recipe(recipe)
        return [source.lengths(0)], len(source), "the built-in digits"
    if path and Path(data.file).is_file():
        source = source or conversations.from_recipe(recipe, path)
        every = [source.lengths(i) for i in range(len(source))]
        return every, len(every), f"{counted(len(every), 'sample')} of {data.file}"
    text, (picture,), answers = assumed(recipe, shape)
    why = "there is no such file" if path else "the model has no processor yet"
    said = f"{EPOCH:,} samples of {text} text tokens, {picture:,} image tokens and {answers} tokens to learn, assumed"
    return [(text, [picture], answers)], EPOCH, f"{said} in place of {data.file}: {why}"


def assumed(recipe: Recipe, shape: Shape) -> Sample:
    """Returns a short conversation about one large picture, for a recipe whose data is not there."""
    crops, side = min(shape.crops, 5), shape.pixels // shape.patch
    picture = crops * shape.patches + shape.newline * side * isqrt(crops - 1)
    return TEXT, [max(1, min(picture, (recipe.data.max_rows or inf) - TEXT))], ANSWERS


def shares(recipe: Recipe, stage: str) -> dict[str, float]:
    """Returns the modes of a stage with their shares of its steps. A slow step without a teacher is a full one."""
    schedule = rows_schedule(recipe, stage)
    slow = getattr(schedule, "slow", None)
    found = {"fast": 1 - slow, "slow" if recipe.dualspeed.distill else "full": slow} if slow else None
    return {mode: share for mode, share in (found or {schedule.plan(0).mode: 1.0}).items() if share}


def depth(recipe: Recipe, stage: str, mode: str, layers: int) -> float:
    """Returns how many of the LLM's layers a step of this mode runs on average. A slow step runs all of them."""
    skipper = skipper_of(recipe, stage, layers)
    slow = mode == "slow" or (mode == "full" and recipe.dualspeed.schedule != "full")  # one without a teacher
    return layers if slow or not skipper else skipper.on_average


def flops(shape: Shape, s: Settings, mode: str, sample: Sample, recompute: bool, layers: float | None = None) -> float:
    """Returns the FLOPs of one sample, forward and backward, through so many layers of the LLM (default: all)."""
    layers, hidden, tower = layers or shape.layers, shape.hidden, shape.tower
    batch, fast = (MicroBatch.of(which, *sample, s) for which in (mode, "fast"))
    step = Step(shape, s, batch, recompute)
    weights = sum(out * into for out, into in shape.linears)
    adapters = sum(out * into for out, into in shape.adapters(s.rank))

    # Multiplications, each with an addition. Attention is causal: two products, of half of all pairs.
    forward = lambda rows: rows * (weights + adapters) + rows**2 * shape.queries
    backward = batch.rows * (weights * (1 + s.full) + adapters * (1 + (s.stage == "train")))
    backward += 2.5 * batch.rows**2 * shape.queries
    if recompute:  # all of a layer but its last product
        backward += forward(batch.rows) - batch.rows * hidden * shape.inner * (not s.rank)
    head = batch.answers * hidden * shape.vocab  # runs again in the backward, a teacher's too
    total = layers * (forward(batch.rows) + backward) + head * (3 + s.full)
    if mode == "slow":
        total += layers * forward(fast.rows) + 2 * head
    if mode != "full":
        # The plugin compares all rows of an image, and weights all of them with those that stay.
        total += sum(n**2 * hidden * (1 + s.keep * s.weighs) for n in sample[1])
    patches, tokens = step.crops * shape.patches, step.crops * (shape.patches + shape.clip)
    layer = tokens * (4 * tower**2 + 2 * tower * shape.tower_inner) + 2 * tokens**2 // max(1, step.crops) * tower
    total += shape.tower_layers * layer + patches * 3 * shape.patch**2 * tower
    projector = patches * (shape.read + hidden) * step.projects_twice
    projector += (step.seen if step.projects_twice else patches) * (2 * shape.read + 3 * hidden)
    return 2 * (total + projector * hidden)


def changed(recipe: Recipe, *changes: dict[str, object]) -> Recipe:
    for key, value in (item for change in changes for item in change.items()):
        section, name = key.split(".")
        recipe = recipe.replaced(**{section: {name: value}})
    return recipe


def _find_changes(case: Case, recipe: Recipe) -> dict[str, object] | None:
    """Returns the first change with which a recipe fits, with those of the changes before it that are needed too."""
    stages, rank = case.too_large(recipe), recipe.lora.rank
    options = [
        {f"{stage}.row_budget": GRAIN for stage in stages},  # less than a sample: one at a time
        {f"{stage}.checkpointing": "on" for stage in stages},
        {f"{stage}.optimizer": "paged_adamw8bit" for stage in stages},
        {**({} if rank else {"lora.rank": 16}), "model.quantise": "nf4"},
        {"lora.rank": min(rank or 8, 8)},
        {"data.max_rows": max(sum(images) for _, images, _ in case.longest) + GRAIN, "data.too_long": "cut"},
    ]
    tried = (options[: n + 1] for n in range(len(options)))
    needed = next((some for some in tried if not case.too_large(changed(recipe, *some))), None)
    if needed is None:
        return None
    for option in needed[-2::-1]:
        fewer = [other for other in needed if other is not option]
        needed = needed if case.too_large(changed(recipe, *fewer)) else fewer
    changes = {key: value for option in needed for key, value in option.items()}
    for key in ("data.max_rows", "align.row_budget", "train.row_budget"):
        if key in changes:  # samples are cut no shorter, and micro-batches made no smaller, than necessary
            changes[key] = max(changes[key], case.largest_value(changed(recipe, changes), key))
    return changes


def describe(found: Estimate) -> str:
    """Returns everything as tables, and the verdict."""
    case, recipe, fixed, steps, work = found.case, found.recipe, [], [], []
    for name, _ in recipe.stages():
        f, (samples, full, ours) = memory.fixed(case.shape, Settings.of(recipe, name, case.precision)), found.work(name)
        sizes = [_with_unit(n, BYTES) for n in (f.weights, f.gradients, f.moments)]
        fixed.append([name, f"{f.parameters:,}", f"{f.trainable:,}", *sizes])
        for mode in {**(used := shares(recipe, name)), "full": 0}:
            batch = case.worst_batch(recipe, name, mode)
            sizes = [_with_unit(n, BYTES) for n in (batch.peak - f.total, batch.peak)]
            shown = mode if mode in used else f"{mode} (to compare)"
            steps.append([name, shown, batch.samples, f"{batch.rows:,}", "yes" if batch.recompute else "no", *sizes])
        times = [_with_unit(n / found.tflops / 1e12, TIMES) for n in (full, ours)]
        flop = [_with_unit(n, FLOPS) for n in (full, ours)]
        work.append([name, f"{samples:,}", *flop, f"{full / ours:.2f}x", *times])
    model, rank = recipe.model, recipe.lora.rank
    lora = f"LoRA of rank {rank}{' for each mode' * recipe.dualspeed.views}"
    how = [case.precision, *["LLM in 4 bits"] * (model.quantise != "none"), *[lora] * bool(rank)]
    parts = [
        f"{model.path or model.llm or 'the built-in digits'}: {', '.join(how)}\ndata: {case.data}",
        tables.table(["stage", "parameters", "trained", "weights", "gradients", "optimizer"], fixed),
        tables.table(["stage", "mode", "samples", "tokens", "recompute", "activations", "peak"], steps),
        tables.table(["stage", "samples", "full training", "this recipe", "speed-up", "time of full", "time"], work),
        f"Times assume {found.tflops:g} TFLOP/s sustained (--tflops)." + REGATE * (recipe.regate.keep < 1),
    ]
    return "\n\n".join([*parts, _verdict(found)])


def _verdict(found: Estimate) -> str:
    gpu = found.case.gpu
    needs = f"{_with_unit(found.peak, BYTES)}, and {_with_unit(RESERVE, BYTES)} for CUDA and gaps in its memory"
    if gpu is None:
        return f"A GPU would need {needs}. --gpu says whether one fits, and what to change if not."
    flags = " ".join(f"--set {key}={value}" for key, value in (found.changes or found.room).items())
    if found.changes == {}:
        return f"Fits {gpu:g} GiB: {needs}." + f" So do larger micro-batches, with {flags}" * bool(flags)
    advice = f"It fits with {flags}" if found.changes else "No change that was tried helps; take a smaller model."
    return f"Does not fit {gpu:g} GiB: {needs}. {advice}"


def compare_measured(found: Estimate | None, measured: list[dict]) -> str:
    """Returns a table of what a dry run measured, beside the estimate of the same micro-batches if there is one."""
    rows = []
    if not found:
        gib = [None if m["memory_mib"] is None else f"{m['memory_mib'] / 1024:.2f}" for m in measured]
        rows = [[m["stage"], m["mode"], size] for m, size in zip(measured, gib, strict=True)]
        return tables.table(["stage", "mode", SIZES[0]], rows)
    for m in measured:
        same = partial(found.case.micro_batch, found.recipe, m["stage"], m["mode"], samples=m["samples"])
        same = max(map(same, found.case.longest), key=lambda batch: batch.rows)
        cells = measured_cells(beside_estimate(m["memory_mib"], same, found.case.gpu), "+.0f")
        rows.append([m["stage"], m["mode"], f"{same.rows:,}", *cells])
    text = tables.table(["stage", "mode", "tokens", *SIZES], rows)
    return text if found.case.gpu else f"{text}\n\n{ON_A_CPU}"


def beside_estimate(mib: float | None, same: BatchMemory, gpu: float | None) -> dict:
    """Returns what a micro-batch took, if that could be measured, and the estimate of it; on a GPU they compare."""
    measured, estimated = None if mib is None else mib / 1024, same.peak / GIB
    off = None if measured is None or gpu is None else 100 * (estimated / measured - 1)
    return {"measured_gib": measured, "estimated_gib": estimated, "off_percent": off}


def measured_cells(m: dict, percent: str = "+.1f") -> list[str | None]:
    """Returns the cells of a table with the headers SIZES."""
    cells = [(m["measured_gib"], ".2f"), (m["estimated_gib"], ".2f"), (m["off_percent"], percent)]
    return [None if n is None else f"{n:{how}}" for n, how in cells]


def _with_unit(n: float, units: tuple[tuple[str, float], ...]) -> str:
    unit, size = next((unit for unit in units if n >= unit[1]), units[-1])
    return f"{n / size:,.{(n < 10 * size) + (n < 100 * size)}f} {unit}"
