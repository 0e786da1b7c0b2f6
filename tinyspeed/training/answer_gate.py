"""ReGATE in a run: each step's answers that stay, marked in its batches; what it learned of them, remembered.

    begin(samples of the step)  ->  mark(micro-batch), ran(its losses)  ...  ->  learn(losses())

All micro-batches of a step are decided by what was known before it, so cutting them otherwise changes nothing.
Micro-batches are cut by rows as if every answer stayed: a memory that is still learning cannot say now what a batch
that is made ahead will skip. Where several ranks share a step, their losses are added up before anybody learns, so
that all remember the same and decide the same. Every step teaches the memory, whatever it pruned: an easy token is easy
in both modes.
"""

import math

import torch
from torch import Tensor

from ..data.examples import Source
from ..models import precision
from ..recipe import Recipe
from ..recipe.schedules import rows_schedule
from ..regate import Cycle, Memory
from ..rows import IGNORE
from ..util import paths
from ..util.errors import UserError, counted
from .batching import Order
from .reference import Reference


def require_some_skipping(recipe: Recipe, samples: int) -> None:
    """That some step will skip answers, if they are to be skipped."""
    settings, stage = recipe.regate, recipe.train
    if settings.keep == 1:
        return
    steps = stage.total(samples)
    known = 0 if settings.reference else math.ceil(samples / stage.batch)  # from here on all have been seen before
    if known >= steps:
        raise UserError(
            "regate.keep: no sample is seen twice, so nothing is known of any and nothing would be skipped; set "
            "regate.reference, or train for several epochs"
        )
    rows, cycle = rows_schedule(recipe, "train"), Cycle(settings)
    if not any(cycle.change(rows.plan(step), step).answer_keep < 1 for step in range(known, steps)):
        raise UserError(
            f"regate.keep: none of the run's {counted(steps, 'step')} would skip an answer: the first regate.warmup = "
            f"{settings.warmup} see all, and so do regate.refresh = {settings.refresh} of every regate.cycle = "
            f"{settings.cycle}, and slow ones; set these lower (warmup to a tenth of the steps), or train for more"
        )


class Gate:
    """Whose answers a step of `train` skips."""

    def __init__(self, recipe: Recipe, source: Source, device: torch.device, base: str):
        number, stage = next((n, stage) for n, (name, stage) in enumerate(recipe.stages()) if name == "train")
        order, drawn = Order(len(source), recipe.run.seed + number), stage.total(len(source)) * stage.batch
        window = stage.batch * recipe.scale.window  # within which `scale` may draw in another order
        seen = sorted({order[position] for position in range(-(-drawn // window) * window)})
        settings, losses, self.reference = recipe.regate, None, ""  # what the losses are of
        if settings.reference:
            name = precision.resolve(recipe.model.precision, device)
            folder = paths.expanded(recipe.run.cache) / "reference"
            reference = Reference(settings.reference, base, source, seen, name, folder)
            losses, self.reference = reference.losses(device), reference.content
        self.memory = Memory(settings, seen, [source.lengths(i)[2] for i in seen], losses)

    def begin(self, samples: list[int], share: float) -> int:
        """Decide for a step; how many answer tokens stay."""
        self.share, self.stays = share, {i: self.memory.keep(i, share) for i in samples}
        self.done: list[tuple[list[int], Tensor]] = []  # micro-batches: samples, and losses of all their answers
        return sum(int(self.stays[i].sum()) for i in samples)

    def mark(self, samples: list[int], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The micro-batch of these samples, with the answers that stay."""
        answers, self.marked = torch.ones_like(batch["labels"], dtype=torch.bool), []
        for line, labels, i in zip(answers, batch["labels"], samples, strict=True):
            tokens = (labels[1:] != IGNORE).nonzero()[:, 0] + 1
            if len(tokens):  # a damaged picture's sample has none
                line[tokens] = torch.from_numpy(self.stays[i])
                self.marked.append(i)
        return {**batch, "answers": answers} if self.share < 1 else batch

    def ran(self, losses: Tensor) -> None:
        """Of the micro-batch that was marked last; none, if it was run for the sake of other ranks alone."""
        if len(losses):
            self.done.append((self.marked, losses))

    def losses(self) -> Tensor:
        """The sums of this process's losses, token by token of the step's samples, and how often each sample ran:
        numbers that several processes can add up."""
        found = {i: torch.zeros(int(stays.sum()) + 1) for i, stays in self.stays.items()}
        for samples, losses in self.done:
            sizes = [len(found[i]) - 1 for i in samples]
            for i, mine in zip(samples, losses.cpu().split(sizes), strict=True):
                found[i][:-1] += mine
                found[i][-1] += 1
        return torch.cat([*found.values()])

    def learn(self, losses: Tensor) -> None:
        """When the step is done: the sums of all processes. A sample that a step has twice counts once, by its mean."""
        sizes = [int(stays.sum()) + 1 for stays in self.stays.values()]
        for (i, stays), mine in zip(self.stays.items(), losses.cpu().split(sizes), strict=True):
            if mine[-1]:
                self.memory.update(i, stays, (mine[:-1] / mine[-1]).numpy())

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds; to be filled in place by a resumed run."""
        return {"regate/difficulty": torch.from_numpy(self.memory.difficulty)}
