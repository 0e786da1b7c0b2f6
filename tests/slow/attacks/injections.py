"""The numbers that training depends on, each with a way to make one of them NaN or inf, and how the run must then end.

An injection happens at once (`BEFORE` a step, `WHEN_SAVING`) or in a context around the step (`WITHIN` it). It returns
a pattern for the line that the user must be told, or a function that returns the pattern once the step is over. It
returns None if this step has no such number.
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
    """The step that gets the number."""

    run: StageRun
    step: int  # of the stage
    value: float
    draw: random.Random

    @property
    def plan(self):
        return self.run.model.schedule.plan(self.step)

    def record(self, i: int) -> str:
        """Returns the pattern of what an error must call example i."""
        if self.run.recipe.data.kind == "digits":
            return f"picture {i}"
        number = int(self.run.source.good[i])
        return re.escape(f"train.json: record {number + 1} (id r{number})")

    def into(self, tensor: torch.Tensor) -> None:
        """Put the number into one entry of the part that this process has."""
        with torch.no_grad():
            here = self.run._local(tensor)[0]
            here.view(-1)[self.draw.randrange(here.numel())] = self.value

    def some(self, every) -> tuple[torch.Tensor, str]:
        """Returns one of these parameters, of which this process has a part, and its name."""
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
    """What a schedule decides by: an adaptive schedule's shares and sums, the influence of layers."""
    parts = [at.run.model.schedule, *getattr(at.run.model.schedule, "parts", ())]
    parts = [getattr(part, "schedule", part) for part in parts]
    lists = [(of, getattr(part, of)) for part in parts for of in names if getattr(part, of, None)]
    if not lists:
        return None
    of, numbers = at.draw.choice(lists)
    place = at.draw.randrange(len(numbers))
    if of == "shares":  # the schedule reads only the newest
        numbers[:] = [at.value] * len(numbers)
        return rf"the adaptive share of slow steps is {at.value}"
    if isinstance(numbers[place], list):
        numbers[place][at.draw.randrange(2)] = at.value
    else:
        numbers[place] = at.value
    return rf"the state of schedule\.\S*sums\.{place}\S* is {at.value}"


def difficulty(at: Step):
    """What ReGATE remembers of a sample that the step sees."""
    if not at.run.gate:
        return None
    i = at.draw.choice(at.run.order.batch(at.step, at.run.stage.batch))
    tokens = at.run.gate.memory._tokens(i)
    at.run.gate.memory.difficulty[at.draw.randrange(tokens.start, tokens.stop)] = at.value
    return rf"a difficulty that ReGATE remembers of sample {i} is not finite"


def loss_scale(at: Step):
    at.run.scale.scale = at.value
    return rf"the state of scale\.scale is {at.value}"


@contextmanager
def within(at: Step, change: Callable):
    """Call `change(number of the micro-batch, function that runs it, batch)` instead of each micro-batch of the
    step."""
    original, count = at.run._micro_batch, iter(range(10**6))
    at.run._micro_batch = lambda batch, *given: change(next(count), lambda b: original(b, *given), batch)
    try:
        yield
    finally:
        del at.run._micro_batch


def images(at: Step) -> tuple[int, int, int]:
    """Returns a micro-batch of the step, one of its images, and the example that the image belongs to."""
    parts = [part for part, _ in at.run._parts(at.step, at.plan)]
    every = [
        (m, k, i)
        for m, part in enumerate(parts)
        for k, i in enumerate([i for i in part for _ in at.run.source.lengths(i)[1]])
    ]
    return at.draw.choice(every) if every else (0, 0, -1)


def of_image(at: Step, damaged: Callable, stack: ExitStack):
    m, k, i = images(at)
    if i < 0:
        return None

    def change(number, run, batch):
        return damaged(k, run, batch) if number == m else run(batch)

    stack.enter_context(within(at, change))
    return rf"the features of a picture of {at.record(i)} \("


def pixels(at: Step, stack: ExitStack):
    def damaged(k, run, batch):
        name = "tower_features" if "tower_features" in batch else "pixel_values"
        batch = {**batch, name: batch[name].clone()}
        at.into(batch[name][k])
        return run(batch)

    return of_image(at, damaged, stack)


def through_projector(at: Step, run: Callable, batch: dict, change: Callable):
    """Runs a micro-batch in which `change` has replaced what comes out of the projector."""
    handle = at.run.model.vlm.projector.register_forward_hook(lambda module, given, out: change(out))
    try:
        return run(batch)
    finally:
        handle.remove()


def features(at: Step, stack: ExitStack):
    """What comes out of the projector."""

    def damaged(k, run, batch):
        def change(out):
            if out.dim() == 3:  # not the tokens that a fast step projects again, see `kept`
                out = out.clone()
                at.into(out[k])
            return out

        return through_projector(at, run, batch, change)

    return of_image(at, damaged, stack)


def kept(at: Step, stack: ExitStack):
    """The tokens that a fast step keeps, when they are projected for the second time."""
    if at.plan.mode != "fast":
        return None
    hit = []

    def change(out):
        if out.dim() == 2 and not hit:
            hit.append(1)
            out = out.clone()
            at.into(out)
        return out

    stack.enter_context(within(at, lambda number, run, batch: through_projector(at, run, batch, change)))
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
    """The features of a picture on disk that the step will read."""
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
    return rf"the features of {re.escape(str(picture))} in {re.escape(str(file))} were deleted or damaged.*--resume"


BEFORE = {f.__name__: f for f in (weight, moment, schedule, difficulty, loss_scale, cached)}
WITHIN = {f.__name__: f for f in (pixels, features, kept, loss, gradient)}
WHEN_SAVING = {
    "when saving, a weight": weight,
    "when saving, a moment": moment,
    "when saving, the schedule": lambda at: schedule(at, ("sums",)),  # shares are computed from sums, and not saved
    "when saving, a difficulty": difficulty,
}
KINDS = [*BEFORE, *WITHIN, *WHEN_SAVING]
SAVED_AS = {  # how the line names it -> how a checkpoint names it
    "^the weight ": "model/",
    r"^the optimizer's (\S+) of ": r"optimizer/\1/",
    "^the state of ": "",
    "^a difficulty .*": r"regate/difficulty \\(",
}


def bits(run: StageRun) -> dict[str, bytes]:
    """Everything that training changes, without the random state, which every forward changes."""
    tensors = ((n, run._local(t)[0]) for n, t in run._tensors().items() if n.startswith(("model/", "optimizer/")))
    return {n: t.detach().cpu().numpy().tobytes() for n, t in tensors}


@dataclass
class Injected:
    """What an injection did."""

    kind: str
    run: StageRun | None = None  # None: nothing yet
    step: int = 0
    before: dict[str, bytes] = field(default_factory=dict)
    says: str | Callable = ""

    def wrong(self, line: str, mode: str, stage: str) -> str:
        """Returns what is wrong with the line that the user was told or with the state of the run; "" if nothing is."""
        pattern = self.says() if callable(self.says) else self.says
        if self.kind in WHEN_SAVING:
            for said, name in SAVED_AS.items():
                pattern = re.sub(said, name, pattern)
            pattern = rf"the checkpoint of step {self.step + 1} was not written: .*{pattern}.* Resume the run.*is good$"
        elif self.kind != "cached":
            known = rf"({mode}, )?{stage}" if self.kind in BEFORE else f"{mode}, {stage}"
            pattern = rf"step {self.step + 1} \({known}\): .*{pattern}.*{AGAIN}"
        if not re.search(pattern, line):
            return f"it says {line!r}, not {pattern!r}"
        return "" if bits(self.run) == self.before else "weights or moments have changed"


@contextmanager
def injected(kind: str, value: float, begin: int, seed: int, of=StageRun, here: bool = True):
    """While a run is trained in this context, the first step from `begin` on that has such a number gets the value. On
    a rank where `here` is False nothing is changed."""
    done, step_, save_ = Injected(kind), of._step, of.save
    inject = {**BEFORE, **WITHIN, **WHEN_SAVING}[kind] if here else lambda *at: ""

    def step(run, number, *given):
        with ExitStack() as stack:
            if done.run is None and run.totals.steps >= begin and kind not in WHEN_SAVING:
                at = Step(run, number, value, random.Random(seed))
                note(run, run.totals.steps, inject(at, stack) if kind in WITHIN else inject(at))
            return step_(run, number, *given)

    def save(run, folder, number):
        if done.run is None and run.totals.steps > begin and kind in WHEN_SAVING:
            at = Step(run, number - 1, value, random.Random(seed))
            note(run, run.totals.steps - 1, inject(at))

        return save_(run, folder, number)

    def note(run, step, says):
        if says is not None:
            done.run, done.step, done.says, done.before = run, step, says, bits(run)

    with mock.patch.object(of, "_step", step), mock.patch.object(of, "save", save):
        yield done
