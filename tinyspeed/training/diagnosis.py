"""Why a step was stopped: which tensor was NaN or infinite, and what to do about it.

NaN spreads: from one weight to the loss, and from there to every gradient. So the first cause in this order is named:

    a weight,  a picture's features,  a micro-batch's loss,  the optimizer's moments,  a gradient

A step records the few numbers that this needs on the device (`Seen`). They are read only when a step fails; the run
ends then, so the search may take its time.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..util import NotFinite, UserError, finite

MEASURED = ("gradient norm", "weights and moments", "loss", "ce", "kl", "ce_teacher")  # then each layer's influence
SHOWN = 3  # records of a micro-batch that a message names


@dataclass
class Seen:
    """What a step has recorded: for each micro-batch its samples, its loss and the norms of its images' features."""

    mode: str = ""
    parts: list[list[int]] = field(default_factory=list)
    losses: list[Tensor] = field(default_factory=list)
    features: list[list[Tensor]] = field(default_factory=list)
    numbers: list[float] = field(default_factory=list)  # in the order of MEASURED, once the step is over

    def add(self, out) -> None:
        self.losses.append(out.loss.detach())
        self.features.append(out.metrics["features"])


@contextmanager
def naming_the_step(run) -> Iterator[None]:
    """Adds the step to an error about a number that is not finite."""
    run.seen = Seen()
    try:
        yield
    except NotFinite as error:
        if error.image is None:
            said, mend = str(error), advice(run)
        else:  # raised within a forward, so this micro-batch has recorded nothing yet
            run.seen.features.append([torch.tensor(0.0)] * error.image + [torch.tensor(math.nan)])
            _, said, mend = find_cause(run)
        raise UserError(f"{_step(run)}: {said}. Stopped before the optimizer used it. {mend}") from error


def stopped(run, numbers: list[float]) -> UserError:
    """The error for a step whose `numbers` (in the order of MEASURED) are not all finite."""
    run.seen.numbers = numbers
    _, said, mend = run._find_cause()
    what = f"loss {numbers[2]}, gradient norm {numbers[0]}: {said}"
    return UserError(f"{_step(run)}: {what}. Stopped before the optimizer used it, and nothing was saved. {mend}")


def _step(run) -> str:
    return f"step {run.totals.steps + 1} ({', '.join(filter(None, (run.seen.mode, run.name)))})"


def advice(run) -> str:
    """Advice: a fault of the machine does not come again, a fault of the recipe does."""
    once = "Resume the run, what was saved is good"
    return f"{once}; if it stops here again, start a new run with a lower {run.name}.lr"


def find_cause(run) -> tuple[int, str, str]:
    """The first cause in the order above: its place in that order, what it is, and what to do about it."""
    for place, find in enumerate(ORDER):
        if found := find(run):
            return place, *found
    names = [*MEASURED, *(f"influence of layer {i}" for i in range(len(run.seen.numbers)))]
    bad = [f"{names[i]} is {n}" for i, n in enumerate(run.seen.numbers) if not math.isfinite(n)]
    return len(ORDER), ", ".join(bad), advice(run)


def _weight(run) -> tuple[str, str] | None:
    found = finite.first_bad((name, run._local(p)[0]) for p, name in run.names.items())
    early = "Resume the run; if it stops here again, copy the base model again"
    return found and (f"the weight {found}", advice(run) if run.totals.steps else early)


def _frozen(run) -> tuple[str, str] | None:
    trained = {*run.names.values()}
    found = finite.first_bad((name, run._local(p)[0]) for name, p in _numbers(run.model) if name not in trained)
    return found and (f"the weight {found}", "It is frozen, so the base on disk has it: copy the base model again")


def _numbers(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters but those in 4 bits, whose bytes may be stored as if they were floating-point numbers."""
    for name, module in model.named_modules():
        if type(module).__name__ != "Linear4bit":
            yield from ((f"{name}.{inner}", p) for inner, p in module.named_parameters(recurse=False))


def _picture(run) -> tuple[str, str] | None:
    for part, sizes in zip(run.seen.parts, run.seen.features, strict=False):
        owners = [i for i in part for _ in run.source.lengths(i)[1]]
        for i, size in zip(owners, sizes, strict=False):
            if not math.isfinite(size):
                mend = "Resume the run; if it stops there again, leave that picture out or try another model.precision"
                return f"the features of a picture of {run.source.where(i)} ({float(size)})", mend
    return None


def _loss(run) -> tuple[str, str] | None:
    for part, loss in zip(run.seen.parts, run.seen.losses, strict=False):
        if not math.isfinite(loss):
            more = f" and {len(part) - SHOWN} more" * (len(part) > SHOWN)
            return f"the loss of {', '.join(map(run.source.where, part[:SHOWN]))}{more} ({float(loss)})", advice(run)
    return None


def _moment(run) -> tuple[str, str] | None:
    every = ((name, tensor) for name, tensor in run._tensors().items() if name.startswith("optimizer/"))
    found = finite.first_bad((name.removeprefix("optimizer/"), run._local(tensor)[0]) for name, tensor in every)
    return found and ("the optimizer's {} of {}".format(*found.split("/", 1)), advice(run))


def _gradients(run) -> list[tuple[str, Tensor]]:
    return [(name, run._local(p.grad)[0]) for p, name in run.names.items() if p.grad is not None]


def _gradient(run) -> tuple[str, str] | None:
    found = finite.first_bad(_gradients(run))
    return found and (f"the gradient of {found}", advice(run))


def _too_large(run) -> tuple[str, str] | None:
    """Every gradient may be finite while the sum of their squares is not."""
    if not run.seen.numbers or math.isfinite(run.seen.numbers[0]):
        return None
    name, _ = max(_gradients(run), key=lambda one: one[1].abs().sum())
    return f"the gradients are too large, above all that of {name}", advice(run)


ORDER = (_weight, _frozen, _picture, _loss, _moment, _gradient, _too_large)
SHARED = ORDER.index(_gradient)  # from here on the numbers are sums over all processes
