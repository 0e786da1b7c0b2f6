"""ReGATE in a run: marks the answers that stay in each step's batches, and remembers their losses.

    begin(samples of the step)  ->  mark(micro-batch), ran(its losses)  ...  ->  learn(losses())

Every micro-batch of a step is decided by what was known before the step, so it does not matter how the step is cut.
Micro-batches are cut by their rows as if every answer stayed: they are made ahead of their step, when the memory does
not know yet what the step will skip. If several ranks share a step, their losses are added up before any of them
learns, so that all ranks remember and decide the same. Every step teaches the memory, whatever it pruned: a token that
is easy in one mode is easy in the other.
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
from ..util import counted, paths, require
from .batching import Order
from .reference import Reference


def require_some_skipping(recipe: Recipe, samples: int) -> None:
    """Refuses a recipe that asks for skipped answers but whose steps would skip none."""
    settings, stage = recipe.regate, recipe.train
    if settings.keep == 1:
        return
    steps = stage.total(samples)
    known = 0 if settings.reference else math.ceil(samples / stage.batch)  # steps after which all samples were seen
    why = "no sample is seen twice, so nothing is known of any and nothing would be skipped"
    require(known < steps, f"regate.keep: {why}; set regate.reference, or train for several epochs")
    rows, cycle = rows_schedule(recipe, "train"), Cycle(settings)
    skips = any(cycle.change(rows.plan(step), step).answer_keep < 1 for step in range(known, steps))
    why = f"none of the run's {counted(steps, 'step')} would skip an answer"
    cycles = f"regate.refresh = {settings.refresh} of every regate.cycle = {settings.cycle}, and slow ones"
    why += f": the first regate.warmup = {settings.warmup} see all, and so do {cycles}"
    require(skips, f"regate.keep: {why}; set these lower (warmup to a tenth of the steps), or train for more")


class Gate:
    """Decides which answers a step of the stage `train` skips."""

    def __init__(self, recipe: Recipe, source: Source, device: torch.device, base: str):
        number, stage = next((n, stage) for n, (name, stage) in enumerate(recipe.stages()) if name == "train")
        order, drawn = Order(len(source), recipe.run.seed + number), stage.total(len(source)) * stage.batch
        window = stage.batch * recipe.scale.window  # positions within which `scale` may reorder samples
        seen = sorted({order[position] for position in range(-(-drawn // window) * window)})
        settings, losses, self.reference = recipe.regate, None, ""
        if settings.reference:
            name = precision.resolve(recipe.model.precision, device)
            folder = paths.expanded(recipe.run.cache) / "reference"
            reference = Reference(settings.reference, base, source, seen, name, folder)
            losses, self.reference = reference.losses(device), reference.content
        self.memory = Memory(settings, seen, [source.lengths(i)[2] for i in seen], losses)

    def begin(self, samples: list[int], share: float) -> int:
        """Decides for a step, and returns how many answer tokens stay."""
        self.share, self.stays = share, {i: self.memory.keep(i, share) for i in samples}
        self.done: list[tuple[list[int], Tensor]] = []  # each micro-batch's samples and the losses of their answers
        return sum(int(self.stays[i].sum()) for i in samples)

    def mark(self, samples: list[int], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """Marks the answers that stay in the micro-batch of these samples."""
        answers, self.marked = torch.ones_like(batch["labels"], dtype=torch.bool), []
        for line, labels, i in zip(answers, batch["labels"], samples, strict=True):
            tokens = (labels[1:] != IGNORE).nonzero()[:, 0] + 1
            if len(tokens):  # the sample of a damaged picture has none
                line[tokens] = torch.from_numpy(self.stays[i])
                self.marked.append(i)
        return {**batch, "answers": answers} if self.share < 1 else batch

    def ran(self, losses: Tensor) -> None:
        """Records the losses of the micro-batch that was marked last. A rank may also run an empty one."""
        if len(losses):
            self.done.append((self.marked, losses.to("cpu", non_blocking=True)))  # there when the step's numbers are

    def losses(self) -> Tensor:
        """The sums of this process's losses of each token, and how often each sample ran. Processes add them up."""
        found = {i: torch.zeros(int(stays.sum()) + 1) for i, stays in self.stays.items()}
        for samples, losses in self.done:
            sizes = [len(found[i]) - 1 for i in samples]
            for i, mine in zip(samples, losses.split(sizes), strict=True):
                found[i][:-1] += mine
                found[i][-1] += 1
        return torch.cat([*found.values()])

    def learn(self, losses: Tensor) -> None:
        """Updates the memory with the sums of all processes. A sample that ran twice counts once, with its mean."""
        sizes = [int(stays.sum()) + 1 for stays in self.stays.values()]
        for (i, stays), mine in zip(self.stays.items(), losses.cpu().split(sizes), strict=True):
            if mine[-1]:
                self.memory.update(i, stays, (mine[:-1] / mine[-1]).numpy())

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint saves, and what a resumed run fills in place."""
        return {"regate/difficulty": torch.from_numpy(self.memory.difficulty)}
