"""ReGATE in a run: each step's answers that stay, marked in its batches; what it learned of them, remembered.

    begin(samples of the step)  ->  mark(micro-batch), ran(its losses)  ...  ->  learn()

All micro-batches of a step are decided by what was known before it, so cutting them otherwise changes nothing.
Micro-batches are cut by rows as if every answer stayed: a memory that is still learning cannot say now what a batch
that is made ahead will skip. Every step teaches the memory, whatever it pruned: an easy token is easy in both modes.
"""

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from . import precision
from .batching import Order
from .data import Source
from .errors import UserError
from .gating import Memory
from .recipe import Recipe
from .reference import Reference
from .rows import IGNORE


class Gate:
    """Whose answers a step of `train` skips."""

    def __init__(self, recipe: Recipe, source: Source, device: torch.device, base: str):
        number, stage = next((n, stage) for n, (name, stage) in enumerate(recipe.stages()) if name == "train")
        order, drawn = Order(len(source), recipe.run.seed + number), stage.total(len(source)) * stage.batch
        seen = sorted({order[position] for position in range(drawn)})
        settings, losses = recipe.regate, None
        if settings.reference:
            name = precision.choose(recipe.model.precision, device)
            folder = Path(recipe.run.cache).expanduser() / "reference"
            losses = Reference(settings.reference, base, source, seen, name, folder).losses(device)
        elif len(seen) == drawn:
            raise UserError(
                "regate.keep: no sample is seen twice, so nothing is known of any and nothing would be skipped; set "
                "regate.reference, or train for several epochs"
            )
        self.memory = Memory(settings, seen, [source.lengths(i)[2] for i in seen], losses)

    def begin(self, samples: list[int], share: float) -> int:
        """Decide for a step; how many answer tokens stay."""
        self.stays = {i: self.memory.keep(i, share) for i in samples}
        self.ran_samples: list[int] = []
        self.losses: list[Tensor] = []
        return sum(int(self.stays[i].sum()) for i in samples)

    def mark(self, samples: list[int], batch: dict[str, Tensor]) -> dict[str, Tensor]:
        """The micro-batch of these samples, with the answers that stay."""
        answers = torch.ones_like(batch["labels"], dtype=torch.bool)
        for line, labels, i in zip(answers, batch["labels"], samples, strict=True):
            tokens = (labels[1:] != IGNORE).nonzero()[:, 0] + 1
            if len(tokens):  # a damaged picture's sample has none
                line[tokens] = torch.from_numpy(self.stays[i])
                self.ran_samples.append(i)
        return {**batch, "answers": answers}

    def ran(self, losses: Tensor) -> None:
        self.losses.append(losses)

    def learn(self) -> None:
        """When the step is done."""
        losses = torch.cat(self.losses).cpu().numpy()
        ends = np.cumsum([self.stays[i].sum() for i in self.ran_samples])
        for i, mine in zip(self.ran_samples, np.split(losses, ends[:-1]), strict=True):
            self.memory.update(i, self.stays[i], mine)

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint holds; to be filled in place by a resumed run."""
        return {"regate/difficulty": torch.from_numpy(self.memory.difficulty)}
