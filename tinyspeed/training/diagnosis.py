"""Why a step was stopped: whose number was NaN or infinite, and what to do about it.

Such a number spreads, from one weight to the loss and from there to every gradient. So of all that have one, the first
of these is named:

    a weight,  a picture's features,  a micro-batch's loss,  what the optimizer remembers,  a gradient

A step keeps what it takes to tell (`Seen`: a few numbers, on the device), and nobody looks there until something is
wrong. Then the run is over, and may take its time.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..util import finite
from ..util.errors import NotFinite, UserError

MEASURED = ("gradient norm", "weights and moments", "loss", "ce", "kl", "ce_teacher")  # then each layer's influence
SHOWN = 3  # records of a micro-batch


@dataclass
class Seen:
    """A step so far: of each micro-batch its samples, its loss and the size of each of its images' features."""

    mode: str = ""
    parts: list[list[int]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    features: list[list[Tensor]] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)  # all that was measured, when the step was over

    def add(self, out) -> None:
        self.losses.append(out.loss.detach())
        self.features.append(out.metrics["features"])


@contextmanager
def naming_the_step(run) -> Iterator[None]:
    """A number that makes a step of this `StageRun` impossible becomes an error that says which step it was."""
    run.seen = Seen()
    try:
        yield
    except NotFinite as error:
        if error.image is None:
            said, mend = str(error), go_on(run)
        else:  # from within a micro-batch's forward, so that its place is still free
            run.seen.features.append([torch.tensor(0.0)] * error.image + [torch.tensor(math.nan)])
            _, said, mend = find_cause(run)
        raise UserError(f"{_step(run)}: {said}. Stopped before the optimizer used it. {mend}") from error


def stopped(run, numbers: list[float]) -> UserError:
    """`numbers`, in the order of MEASURED: what made a step impossible is among them."""
    run.seen.numbers = numbers
    _, said, mend = run._whose()
    what = f"loss {numbers[2]}, gradient norm {numbers[0]}: {said}"
    return UserError(f"{_step(run)}: {what}. Stopped before the optimizer used it, and nothing was saved. {mend}")


def _step(run) -> str:
    return f"step {run.totals.steps + 1} ({', '.join(filter(None, (run.seen.mode, run.name)))})"


def go_on(run) -> str:
    """Whether it was a fault of the machine or of the recipe, the second time tells."""
    once = "Resume the run, what was saved is good"
    return f"{once}; if it stops here again, start a new run with a lower {run.name}.lr"


def find_cause(run) -> tuple[int, str, str]:
    """How far from the beginning of the above; what it is; how to mend it."""
    for place, find in enumerate(ORDER):
        if found := find(run):
            return place, *found
    names = [*MEASURED, *(f"influence of layer {i}" for i in range(len(run.seen.numbers)))]
    bad = [f"{names[i]} is {n}" for i, n in enumerate(run.seen.numbers) if not math.isfinite(n)]
    return len(ORDER), ", ".join(bad), go_on(run)


def _weight(run) -> tuple[str, str] | None:
    found = finite.first_bad((name, run._local(p)[0]) for p, name in run.names.items())
    if run.totals.steps:
        return found and (f"the weight {found}", go_on(run))
    return found and (f"the weight {found}", "Resume the run; if it stops here again, copy the base model again")


def _frozen(run) -> tuple[str, str] | None:
    trained = {*run.names.values()}
    found = finite.first_bad((name, run._local(p)[0]) for name, p in _numbers(run.model) if name not in trained)
    return found and (f"the weight {found}", "It does not train, and is as the base model has it: copy that again")


def _numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Its parameters; not those in 4 bits, whose bytes may travel as if they were numbers."""
    for name, module in model.named_modules():
        if type(module).__name__ != "Linear4bit":
            yield from ((f"{name}.{inner}", p) for inner, p in module.named_parameters(recurse=False))


def _picture(run) -> tuple[str, str] | None:
    for part, sizes in zip(run.seen.parts, run.seen.features, strict=False):
        owners = [i for i in part for _ in run.source.lengths(i)[1]]
        for i, size in zip(owners, sizes, strict=False):
            if not math.isfinite(size):
                mend = "Resume the run; if it stops there again, leave that out, or try another model.precision"
                return f"the features of a picture of {run.source.where(i)} ({float(size)})", mend
    return None


def _loss(run) -> tuple[str, str] | None:
    for part, loss in zip(run.seen.parts, run.seen.losses, strict=False):
        if not math.isfinite(loss):
            more = f" and {len(part) - SHOWN} more" * (len(part) > SHOWN)
            return f"the loss of {', '.join(map(run.source.where, part[:SHOWN]))}{more} ({float(loss)})", go_on(run)
    return None


def _moment(run) -> tuple[str, str] | None:
    every = ((name, tensor) for name, tensor in run._tensors().items() if name.startswith("optimizer/"))
    found = finite.first_bad((name.removeprefix("optimizer/"), run._local(tensor)[0]) for name, tensor in every)
    return found and ("the optimizer's {} of {}".format(*found.split("/", 1)), go_on(run))


def _gradients(run) -> list[tuple[str, Tensor]]:
    return [(name, run._local(p.grad)[0]) for p, name in run.names.items() if p.grad is not None]


def _gradient(run) -> tuple[str, str] | None:
    found = finite.first_bad(_gradients(run))
    return found and (f"the gradient of {found}", go_on(run))


def _too_large(run) -> tuple[str, str] | None:
    """Where each number of the gradients is finite, and their squares are not."""
    if not run.seen.numbers or math.isfinite(run.seen.numbers[0]):
        return None
    name, _ = max(_gradients(run), key=lambda one: one[1].abs().sum())
    return f"the gradients are too large, that of {name} most", go_on(run)


ORDER = (_weight, _frozen, _picture, _loss, _moment, _gradient, _too_large)
SHARED = ORDER.index(_gradient)  # from here on, numbers that several processes have added up
