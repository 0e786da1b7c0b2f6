"""What a recipe costs on many GPUs, before any of them is rented.

    python -m scale plan RECIPE --gpus 8,64,512 --gpu h100

    compute   FLOPs of the rank that has most, forward by forward (assigned by `balancing.py`), / (peak x SUSTAINED)
    network   bytes that a rank receives / bandwidth + hops x HOP
    step      max(compute + ends, network) + between: nothing is computed beside the first gather and the last reduction
              of a micro-batch, nor beside the all-reduce between replicas

FLOPs and activations come from `bench/estimate.py` and `models/memory.py`, bandwidths from `hardware.py`. Lengths are
those of the recipe's data if it is there, otherwise LLaVA's mix (`data/llava_mix.py`). With s shards, a micro-batch
gathers (s - 1) / s of every layer in half precision: once for the forward, once more for the backward, and once for a
slow step's teacher. The root (embeddings, head, projector) is gathered once. Gradients are reduced in fp32. With
replicas (HSDP) a model's shards stay inside a node, and gradient shards are all-reduced between nodes once a step.

A GPU holds its share of weights, gradients and moments; the whole frozen tower; two gathered layers and the root; the
gradients on their way; and the largest micro-batch. scale/README.md says what this arithmetic was checked against.
"""

import json
import sys
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import cache, cached_property
from itertools import product
from pathlib import Path

import numpy as np

from tinyspeed import cli, recipe
from tinyspeed.bench import estimate
from tinyspeed.data import llava_mix
from tinyspeed.data.examples import Sample
from tinyspeed.models.memory import GIB, RESERVE, MicroBatch, Settings, Step
from tinyspeed.recipe import Recipe, StageSection
from tinyspeed.rows import plan_rows
from tinyspeed.scheduler import Plan
from tinyspeed.util import UserError, plots, require, tables
from tinyspeed.util.files import write_atomically

from ..balancing import WINDOW, LengthGroupedOrder, assign
from . import curves, hardware
from .hardware import Sharding
from .sharded_model import ShardedModel

SUSTAINED = 0.4  # the share of a GPU's peak that training sustains
SEED = 0


class ShardedStep(Step):
    """Activations under FSDP: its gathered layers are in half precision already, so autocast copies nothing."""

    _copies = 0


@dataclass(frozen=True, eq=False)
class Job:
    """A stage of a recipe, and samples that it sees."""

    recipe: Recipe
    stage: str
    model: ShardedModel
    samples: list[Sample]  # as many as are needed to plan with
    epoch: int  # samples
    source: str  # where their lengths come from

    @property
    def settings(self) -> StageSection:
        return getattr(self.recipe, self.stage)

    @property
    def steps(self) -> int:
        return self.settings.total(self.epoch)

    @cached_property
    def batches(self) -> list[list[int]]:
        """The samples of each step of a window."""
        order = LengthGroupedOrder(self.samples.__getitem__, len(self.samples), SEED, self.settings.batch)
        return [order.batch(step, order.size) for step in range(min(self.steps, WINDOW))]

    @cache  # noqa: B019
    def assigned(self, mode: str, gpus: int) -> list[list[list[list[int]]]]:
        """The samples of each micro-batch of each rank of each batch."""
        plan, found = Plan(mode, keep=self.model.s.keep), []
        for chosen in self.batches:
            rows = [plan_rows(*self.samples[i][:2], plan, self.model.s.isolator) for i in chosen]
            ranks = assign(rows, gpus, self.settings.row_budget)
            found.append([[[chosen[i] for i in part] for part in rank] for rank in ranks])
        return found

    @cache  # noqa: B019
    def largest(self, mode: str, gpus: int) -> MicroBatch:
        every = {tuple(part) for step in self.assigned(mode, gpus) for rank in step for part in rank if part}
        return max((self._micro_batch(mode, part) for part in every), key=lambda batch: (batch.rows, batch.ids))

    def _micro_batch(self, mode: str, part: Iterable[int]) -> MicroBatch:
        """The micro-batch of these samples, padded."""
        each = [MicroBatch.of(mode, *self.samples[i], self.model.s) for i in part]
        rows, ids = (len(each) * max(getattr(batch, name) for batch in each) for name in ("rows", "ids"))
        total = {name: sum(getattr(batch, name) for batch in each) for name in ("visual", "images", "answers")}
        return MicroBatch(mode, rows, ids, **total)

    def depth(self, mode: str) -> float:
        """How many layers of the LLM a step runs on average."""
        return estimate.depth(self.recipe, self.stage, mode, self.model.shape.layers)

    @cache  # noqa: B019
    def each(self, mode: str, recompute: bool, layers: float | None) -> list[float]:
        """The FLOPs of every sample."""
        model, flops = self.model, estimate.flops
        of = cache(lambda *sample: flops(model.shape, model.s, mode, sample, recompute, layers))
        return [of(text, tuple(images), answers) for text, images, answers in self.samples]

    def flops(self, mode: str, gpus: int, recompute: bool, layers: float | None = None) -> tuple[float, float]:
        """FLOPs of a step: those of the rank that has most in each forward, and those of the mean rank."""
        each, steps = self.each(mode, recompute, layers), self.assigned(mode, gpus)
        most = mean = 0.0
        for step in steps:
            work = np.array([[sum(each[i] for i in part) for part in rank] for rank in step])
            most, mean = most + work.max(0).sum() / len(steps), mean + work.sum() / gpus / len(steps)
        return most, mean


@dataclass(frozen=True)
class ModeCost:
    share: float  # of the stage's steps
    forwards: float
    recompute: bool
    peak: int  # bytes of a GPU
    sent: float  # bytes that a GPU receives in a step
    compute: float  # seconds
    network: float
    ends: float  # seconds of the network beside which nothing can be computed
    between: float  # seconds of the all-reduce between replicas
    waiting: float  # arithmetic of the rank that has most / of the mean rank

    @property
    def step(self) -> float:
        return max(self.compute + self.ends, self.network) + self.between


@dataclass(frozen=True)
class Cost:
    """A stage on a number of GPUs."""

    sharding: Sharding
    job: Job
    modes: dict[str, ModeCost]  # those of the recipe, and "full", which is full training

    @property
    def peak(self) -> int:
        return max(mode.peak for mode in self.modes.values() if mode.share)

    @property
    def fits(self) -> bool:
        return self.peak <= self.sharding.gpu.gib * GIB - RESERVE

    @property
    def hours(self) -> float:
        return self.job.steps / 3600 * sum(mode.share * mode.step for mode in self.modes.values())

    @property
    def full_hours(self) -> float:
        return self.job.steps / 3600 * self.modes["full"].step

    @property
    def waiting(self) -> float:
        times = [(mode.share * mode.compute, mode.waiting) for mode in self.modes.values()]
        return sum(time for time, _ in times) / sum(time / waiting for time, waiting in times)


def cost(job: Job, sharding: Sharding) -> Cost:
    modes, every = {}, job.model.shape.layers
    for mode, share in estimate.shares(job.recipe, job.stage).items():
        layers = job.depth(mode)
        name = "skipping" if mode == "full" and layers < every else mode
        modes[name] = _mode(job, sharding, mode, share, layers)
    if "full" not in modes:
        modes["full"] = _mode(job, sharding, "full", 0.0, every)
    return Cost(sharding, job, modes)


def _mode(job: Job, sharding: Sharding, mode: str, share: float, layers: float) -> ModeCost:
    """`layers` is how many run on average. Now and then all of them run, which decides the peak."""
    model, held, batch = job.model, job.model.held(sharding.shards), job.largest(mode, sharding.gpus)
    kind = Step if sharding.shards == 1 else ShardedStep
    peaks = {again: held + kind(model.shape, model.s, batch, again).peak for again in (False, True)}
    fits = peaks[False] <= sharding.gpu.gib * GIB - RESERVE
    again = {"on": True, "off": False, "auto": not fits}[job.settings.checkpointing]
    most, mean = job.flops(mode, sharding.gpus, again, layers)
    forwards = float(np.mean([len(step[0]) for step in job.assigned(mode, sharding.gpus)]))
    size, collectives = model.traffic(mode, layers)
    trained = 4 * (layers * model.trained[0] + model.trained[1]) / sharding.shards
    ring, rings = (sharding.shards - 1) / sharding.shards, 2 * (sharding.replicas - 1) / sharding.replicas
    return ModeCost(
        share=share,
        forwards=forwards,
        recompute=again,
        peak=peaks[again],
        sent=forwards * ring * size + rings * trained,
        compute=most / (sharding.gpu.tflops * 1e12 * SUSTAINED),
        network=forwards * sharding.seconds(size, collectives),
        ends=forwards * sharding.seconds(model.root + model.layer + 4 * max(model.trained), 3),
        between=sharding.all_reduce(trained, layers + 1),
        waiting=most / mean,
    )


def jobs(chosen: Recipe, samples: int | None = None) -> list[Job]:
    """The stages of a recipe. `samples` of an epoch default to the data's number, or LLaVA's."""
    name = "bf16" if chosen.model.precision == "auto" else chosen.model.precision
    require(name != "fp32", 'the planner knows what GPUs do in half precision: set model.precision = "bf16"')
    shape, path = estimate.shape_of(chosen), chosen.model.path  # a model from parts has no processor yet to read data
    there = chosen.data.kind == "digits" or (path and Path(chosen.data.file).is_file())
    read, found = estimate.lengths_of(chosen, shape) if there else None, []  # once, since checking all records is slow
    for stage, settings in chosen.stages():
        if read:
            known, epoch, source = read
        else:
            pool, family = WINDOW * settings.batch, "next" if shape.newline else "1.5"
            if chosen.data.template == "plain":
                known, epoch, kind = llava_mix.captions(pool, SEED, family), llava_mix.CAPTIONS, "captions"
            else:
                known = llava_mix.mix(pool, SEED, family, chosen.data.max_rows)
                epoch, kind = llava_mix.SAMPLES, "instruction mix"
            source = f"lengths as in LLaVA's {kind}, in place of {chosen.data.file}"
            known = [(text, [n * shape.patches // 576 for n in images], answers) for text, images, answers in known]
        model = ShardedModel(shape, Settings.of(chosen, stage, name))
        found.append(Job(chosen, stage, model, known, samples or epoch, source))
    return found


def plan(found: list[Job], over: list[Sharding]) -> list[Cost]:
    for job, sharding in product(found, over):
        if (batch := job.settings.batch) < (gpus := sharding.gpus):
            few = f"{job.stage}.batch = {batch} is less than {gpus} GPUs, and some would have no sample"
            raise UserError(f"{few}: set {job.stage}.batch={gpus} or more")
    return [cost(job, sharding) for job, sharding in product(found, over)]


def describe(found: list[Cost], gpu: str) -> str:
    parts = []
    for job in dict.fromkeys(c.job for c in found):
        costs = [c for c in found if c.job is job]
        modes = list(costs[0].modes)
        head = ["GPUs", "sharding", "GiB", *(f"{mode}, s" for mode in modes), *(f"{mode}, GB" for mode in modes)]
        head += ["recompute", "bound by", "waiting", "hours", "GPU-hours", "full: hours", "GPU-hours", "speed-up"]
        rows = []
        for c in costs:
            every = c.modes.values()
            again = ", ".join(name for name, m in c.modes.items() if m.recompute) or "no"
            network = ", ".join(name for name, m in c.modes.items() if m.network > m.compute + m.ends)
            bound = f"network ({network})" if network else "compute"
            row = [f"{c.sharding.gpus:,}", str(c.sharding), f"{c.peak / GIB:.1f}{'' if c.fits else ' !'}"]
            row += [f"{m.step:.3g}" for m in every] + [f"{m.sent / 1e9:,.0f}" for m in every]
            row += [again, bound, f"{100 * (c.waiting - 1):.1f} %"]
            row += [_hours(n) for n in (c.hours, c.hours * c.sharding.gpus, c.full_hours)]
            rows.append([*row, _hours(c.full_hours * c.sharding.gpus), f"{c.full_hours / c.hours:.2f}x"])
        about = f"{job.stage}: {job.steps:,} steps of {job.settings.batch:,} samples; {job.source}"
        parts += [about, tables.table(head, rows)]
    over = "" if all(c.fits for c in found) else f"! does not fit {found[0].sharding.gpu.gib:g} GiB. "
    rates = f"{found[0].sharding.gpu.tflops:g} TFLOP/s, of which {SUSTAINED:.0%} are sustained; {hardware.LINKS:.0%}"
    parts.append(f"{over}{gpu}: {rates} of every link. Assumptions, and what was measured: scale/README.md.")
    return "\n\n".join(parts)


def _hours(n: float) -> str:
    return f"{n:,.1f}" if n >= 0.995 else f"{n:.2g}"


def draw(found: list[Cost]):
    """Draws hours and GPU-hours over the number of GPUs, of full training and of the recipe, as a matplotlib Figure."""
    counts = sorted({c.sharding.gpus for c in found})
    panels = {"hours, by the faster sharding": [], "GPU-hours, by the faster sharding": []}
    for n, job in enumerate(dict.fromkeys(c.job for c in found)):
        for m, (name, hours) in enumerate({"full": "full_hours", "this recipe": "hours"}.items()):
            best = [min(getattr(c, hours) for c in found if c.job is job and c.sharding.gpus == k) for k in counts]
            look = {"color": plots.COLOURS[m], "linestyle": plots.DASHES[n], "marker": plots.MARKERS[m]}
            for curve, values in zip(panels.values(), (best, np.multiply(best, counts)), strict=True):
                curve.append((f"{job.stage}, {name}", values, look))
    return curves.draw(counts, panels, "GPUs", log=True)


def as_json(found: list[Cost]) -> list[dict]:
    return [
        {
            "stage": c.job.stage, "gpus": c.sharding.gpus, "sharding": str(c.sharding), "steps": c.job.steps,
            "peak_bytes": c.peak, "fits": c.fits, "waiting": c.waiting, "hours": c.hours, "full_hours": c.full_hours,
            "modes": {name: asdict(m) | {"step": m.step} for name, m in c.modes.items()},
        }
        for c in found
    ]  # fmt: skip


def main(argv: list[str]) -> int:
    parser = cli.Parser(prog="python -m scale plan", description="What a recipe costs on many GPUs.")
    parser.add_argument("recipe", metavar="RECIPE", help="a recipe file, or the name of a built-in one")
    parser.add_argument("--gpus", default="8,64,512", metavar="N,N,...", help="numbers of GPUs (default: 8,64,512)")
    parser.add_argument("--gpu", default="h100", help=f"one of {', '.join(hardware.GPUS)} (default: h100)")
    parser.add_argument("--samples", type=int, help="samples of an epoch (default: the data's, or LLaVA's)")
    parser.add_argument("--set", action="append", default=[], metavar="section.key=value", help="change one value")
    parser.add_argument("--png", metavar="FILE", help="draw hours and GPU-hours")
    parser.add_argument("--json", metavar="FILE", help="write every number")
    a = parser.parse_args(argv)
    try:
        require(a.samples is None or a.samples >= 1, f"--samples {a.samples}: must be at least 1")
        over = hardware.shardings(a.gpu, hardware.counts(a.gpus))
        found = plan(jobs(recipe.read(a.recipe, a.set), a.samples), over)
        print(describe(found, a.gpu))
        if a.png:
            print(plots.save(draw(found), a.png))
        if a.json:
            write_atomically(Path(a.json), json.dumps(as_json(found), indent=1))
            print(a.json)
    except (UserError, OSError, UnicodeEncodeError) as error:
        print(f"scale plan: {cli.message_of(error)}", file=sys.stderr)
        return 2
    return 0
