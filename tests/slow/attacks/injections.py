"""The numbers that training goes by, each with a way to put NaN or inf into one; and how a run that has one must end.

A poison does its work at once (`BEFORE` a step, `WHEN_SAVING`), or in a context around the step (`WITHIN` it), and
returns what the line that a user is told must say of it: a pattern, or something that gives one when the step is over.
None: this step has no such number.
"""

import math
import random
import re
from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from unittest import mock

import torch
from safetensors.torch import load_file, save_file

from tinyspeed.training.loop import StageRun

VALUES = (math.nan, math.inf, -math.inf)
AGAIN = r"Resume the run.* if it stops t?here again, .*"


@dataclass
class Step:
    """The step that is poisoned, as its poisons see it."""

    run: StageRun
    step: int  # of the stage
    value: float
    draw: random.Random

    @property
    def plan(self):
        return self.run.model.schedule.plan(self.step)

    def record(self, i: int) -> str:
        """What an error must call example i."""
        if self.run.recipe.data.kind == "digits":
            return f"picture {i}"
        number = int(self.run.source.good[i])
        return re.escape(f"train.json: record {number + 1} (id r{number})")

    def into(self, tensor: torch.Tensor) -> None:
        """One entry of what this process has of it."""
        with torch.no_grad():
            here = self.run._local(tensor)[0]
            here.view(-1)[self.draw.randrange(here.numel())] = self.value

    def some(self, every) -> tuple[torch.Tensor, str]:
        """A parameter of these, of which this process has something, and its name."""
        return self.draw.choice([(p, self.run.names[p]) for p in every if self.run._local(p)[0].numel()])


def weight(at: Step):
    p, name = at.some(at.run.names)
    at.into(p)
    return rf"the weight {re.escape(name)} \("


def moment(at: Step):
    p, name = at.some(at.run.names)
    state = at.run.optimizer.state[p]
    of = {k: t for k, t in state.items() if torch.is_tensor(t) and t.is_floating_point() and "qmap" not in k}
    key = at.draw.choice([*of])
    at.into(of[key])
    return rf"the optimizer's {key} of {re.escape(name)} \("


def schedule(at: Step, names=("shares", "sums")):
    """What it goes by: an adaptive schedule's shares and sums, the influence of layers."""
    parts = [at.run.model.schedule, *getattr(at.run.model.schedule, "parts", ())]
    parts = [getattr(part, "schedule", part) for part in parts]
    lists = [(of, getattr(part, of)) for part in parts for of in names if getattr(part, of, None)]
    if not lists:
        return None
    of, numbers = at.draw.choice(lists)
    place = at.draw.randrange(len(numbers))
    if of == "shares":  # of which the newest is the one that is asked for
        numbers[:] = [at.value] * len(numbers)
        return rf"the adaptive share of slow steps is {at.value}"
    if isinstance(numbers[place], list):
        numbers[place][at.draw.randrange(2)] = at.value
    else:
        numbers[place] = at.value
    return rf"the state of schedule\.\S*sums\.{place}\S* is {at.value}"


def remembered(at: Step):
    """ReGATE's difficulty of a sample that the step sees."""
    if not at.run.gate:
        return None
    i = at.draw.choice(at.run.order.batch(at.step, at.run.stage.batch))
    tokens = at.run.gate.memory._tokens(i)
    at.run.gate.memory.difficulty[at.draw.randrange(tokens.start, tokens.stop)] = at.value
    return rf"what ReGATE remembers of sample {i} is not finite"


def loss_scale(at: Step):
    at.run.scale.scale = at.value
    return rf"the state of scale\.scale is {at.value}"


@contextmanager
def within(at: Step, change: Callable):
    """`change(number of the micro-batch, how to run it, batch)` in place of each micro-batch of the step."""
    original, count = at.run._micro_batch, iter(range(10**6))
    at.run._micro_batch = lambda batch, *given: change(next(count), lambda b: original(b, *given), batch)
    try:
        yield
    finally:
        del at.run._micro_batch


def images(at: Step) -> tuple[int, int, int]:
    """A micro-batch of the step, one of its images, and whose that is."""
    parts = [part for part, _ in at.run._parts(at.step, at.plan)]
    every = [
        (m, k, i)
        for m, part in enumerate(parts)
        for k, i in enumerate([i for i in part for _ in at.run.source.lengths(i)[1]])
    ]
    return at.draw.choice(every) if every else (0, 0, -1)


def of_image(at: Step, poisoned: Callable, stack: ExitStack):
    m, k, i = images(at)
    if i < 0:
        return None

    def change(number, run, batch):
        return poisoned(k, run, batch) if number == m else run(batch)

    stack.enter_context(within(at, change))
    return rf"the features of a picture of {at.record(i)} \("


def pixels(at: Step, stack: ExitStack):
    def poisoned(k, run, batch):
        name = "tower_features" if "tower_features" in batch else "pixel_values"
        batch = {**batch, name: batch[name].clone()}
        at.into(batch[name][k])
        return run(batch)

    return of_image(at, poisoned, stack)


def features(at: Step, stack: ExitStack):
    """Out of the projector."""

    def poisoned(k, run, batch):
        def hook(module, given, out):
            if out.dim() == 3:  # not those that a fast step projects again: they are `kept`
                out = out.clone()
                at.into(out[k])
            return out

        handle = at.run.model.vlm.projector.register_forward_hook(hook)
        try:
            return run(batch)
        finally:
            handle.remove()

    return of_image(at, poisoned, stack)


def kept(at: Step, stack: ExitStack):
    """The rows that a fast step keeps, when they are projected for the second time."""
    if at.plan.mode != "fast":
        return None
    hit = []

    def change(number, run, batch):
        def hook(module, given, out):
            if out.dim() == 2 and not hit:
                hit.append(1)
                out = out.clone()
                at.into(out)
            return out

        handle = at.run.model.vlm.projector.register_forward_hook(hook)
        try:
            return run(batch)
        finally:
            handle.remove()

    stack.enter_context(within(at, change))
    return r"the loss of \S"


def loss(at: Step, stack: ExitStack):
    m, _, _ = images(at)
    part = [part for part, _ in at.run._parts(at.step, at.plan)][m]

    def change(number, run, batch):
        out = run(batch)
        if number == m:
            out.loss = out.loss * at.value
        return out

    stack.enter_context(within(at, change))
    return rf"the loss of {at.record(part[0])}[ ,]"


def gradient(at: Step, stack: ExitStack):
    hit = []

    def change(number, run, batch):
        out = run(batch)
        if not hit:
            p, name = at.some(p for p in at.run.names if p.grad is not None)
            hit.append(name)
            at.into(p.grad)
        return out

    stack.enter_context(within(at, change))
    return lambda: rf"the gradient of {re.escape(hit[0])} \("


def cached(at: Step):
    """The features of a picture on disk, which the step is to read."""
    if getattr(at.run.source, "features", None) is None:
        return None
    source, batch = at.run.source, at.run.order.batch(at.step, at.run.stage.batch)
    owners = [i for i in batch if source.lengths(i)[1]]
    if not owners:
        return None
    picture = source._paths(source.records[int(source.good[at.draw.choice(owners)])])[0]
    file = source.features.file(picture)
    tensors = load_file(file)
    at.into(tensors["features"])
    save_file(tensors, file)
    return rf"the features of {re.escape(str(picture))} in {re.escape(str(file))} .*not finite.*: delete the file"


BEFORE = {f.__name__: f for f in (weight, moment, schedule, remembered, loss_scale, cached)}
WITHIN = {f.__name__: f for f in (pixels, features, kept, loss, gradient)}
WHEN_SAVING = {
    "when saving, a weight": weight,
    "when saving, a moment": moment,
    "when saving, the schedule": lambda at: schedule(at, ("sums",)),  # shares follow from them, and are not saved
    "when saving, the memory": remembered,
}
KINDS = [*BEFORE, *WITHIN, *WHEN_SAVING]
SAVED_AS = {  # by what a checkpoint calls it
    "^the weight ": "model/",
    r"^the optimizer's (\S+) of ": r"optimizer/\1/",
    "^the state of ": "",
    "^what ReGATE .*": r"regate/difficulty \\(",
}


def bits(run: StageRun) -> dict[str, bytes]:
    """All that training changes; not the random state, which every forward moves."""
    tensors = ((n, run._local(t)[0]) for n, t in run._tensors().items() if n.startswith(("model/", "optimizer/")))
    return {n: t.detach().cpu().numpy().tobytes() for n, t in tensors}


@dataclass
class Done:
    """What a poison did."""

    kind: str
    run: StageRun | None = None  # None: nothing yet
    step: int = 0
    before: dict[str, bytes] = field(default_factory=dict)
    says: str | Callable = ""

    def wrong(self, line: str, mode: str, stage: str) -> str:
        """What is wrong with the line that a user was told, and with what the run has then; "" if nothing is."""
        pattern = self.says() if callable(self.says) else self.says
        if self.kind in WHEN_SAVING:
            for said, name in SAVED_AS.items():
                pattern = re.sub(said, name, pattern)
            pattern = rf"the checkpoint of step {self.step + 1} was not written: .*{pattern}.* Resume the run.*is good$"
        elif self.kind != "cached":
            known = rf"({mode}, )?{stage}" if self.kind in BEFORE else f"{mode}, {stage}"
            pattern = rf"step {self.step + 1} \({known}\): .*{pattern}.*{AGAIN}"
        if not re.search(pattern, line):
            return f"it says {line!r}, and not {pattern!r}"
        return "" if bits(self.run) == self.before else "something was moved"


@contextmanager
def injected(kind: str, value: float, begin: int, seed: int, of=StageRun, here: bool = True):
    """While one runs, the poison is put into the first step from `begin` on that has such a number. `here`: or, on
    another rank, into none."""
    done, step_, save_ = Done(kind), of._step, of.save
    poison = {**BEFORE, **WITHIN, **WHEN_SAVING}[kind] if here else lambda *at: ""

    def step(run, number, *given):
        with ExitStack() as stack:
            if done.run is None and run.totals.steps >= begin and kind not in WHEN_SAVING:
                at = Step(run, number, value, random.Random(seed))
                note(run, run.totals.steps, poison(at, stack) if kind in WITHIN else poison(at))
            return step_(run, number, *given)

    def save(run, folder, number):
        if done.run is None and run.totals.steps > begin and kind in WHEN_SAVING:
            at = Step(run, number - 1, value, random.Random(seed))
            note(run, run.totals.steps - 1, poison(at))
        return save_(run, folder, number)

    def note(run, step, says):
        if says is not None:
            done.run, done.step, done.says, done.before = run, step, says, bits(run)

    with mock.patch.object(of, "_step", step), mock.patch.object(of, "save", save):
        yield done
