"""What a plugin makes of a step's images: which of their rows stay, and what a merging plugin puts in their place.

    kept rows          as they are
    merged row k       sum_i w_ki x_i, put where the plugin says that it belongs: the gradient flows to every x_i
                       (of one that merges before the projector: project(sum_i w_ki tower_i))

A merged row takes the place of the row that it stands for, so `rows.py` cuts the sequence without knowing that there is
such a thing. Full and slow steps see the rows as they are; only a fast forward, a teacher's too, sees sums.

Nine rows in ten are looked at and never learned from. So a fast step projects twice: all rows without a graph, to
choose, and those that stay with one. The second time costs a tenth of a forward, and saves nine tenths of a backward
and of what it would keep in memory.

The parameters of a learned plugin live here, in fp32, and train beside the isolator: thrown away after training, left
alone by slow steps, touched with a zero weight by a fast step that has nothing to prune.
"""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .. import pruning
from ..util.errors import UserError
from . import signals

if TYPE_CHECKING:  # the rooms above know this one, not the other way round
    from ..models.families import Family


class Chooser(nn.Module):
    """The plugin `name`, for the images of this model."""

    def __init__(self, vlm: "Family", name: str, keep: float, seed: int):
        super().__init__()
        signals.require_signals(vlm, name)
        self.vlm, self.name, self.seed = vlm, name, seed
        self.learned = pruning.make(name, vlm.hidden_size, pruning.keep_count(keep, vlm.most_rows), seed)

    def switch(self, name: str) -> None:
        """Another plugin, for another stage."""
        if name != self.name:
            if self.learned or pruning.learned(name):
                raise UserError(f"{self.name!r} and {name!r}: a learned plugin is the same in all stages")
            signals.require_signals(self.vlm, name)
            self.name = name

    @property
    def needs(self) -> tuple[str, ...]:
        return pruning.needs(self.name)

    @property
    def projects_twice(self) -> bool:
        """Not where all rows matter (to a sum of them, or to a tower that trains), nor where nothing is learned."""
        projector, tower = (any(p.requires_grad for p in m.parameters()) for m in (self.vlm.projector, self.vlm.tower))
        return projector and not tower and self.vlm.rowwise and pruning.merges(self.name) != "features"

    def forward(
        self, images: list[Tensor], keep: float, heard: Mapping[str, list[Tensor]], step: int | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Of at least one image: (V,) bool, which feature rows of all of them stay; what is in their places; and a
        learned plugin's loss of each image. K counts pictures, never structural rows."""
        if step is None and self.training and pruning.draws(self.name):
            raise UserError(f"the plugin {self.name!r} draws anew in each step: which is it? Set model.step")
        pad = functools.partial(pad_sequence, batch_first=True)
        mask = pad([self.vlm.prunable(image) for image in images])
        told = {name: pad(heard[name]) for name in self.needs}
        every, how = pad(images), {"square": self.vlm.square, "seed": self.seed + (step or 0), "module": self.learned}
        found = pruning.choose(self.name, every, keep=keep, mask=mask, signals=told, **how)
        places, width = mask.shape
        kept = torch.zeros(places, width + 1, dtype=torch.bool, device=mask.device)
        kept.scatter_(1, found.index.where(found.index >= 0, width), True)
        lengths = torch.tensor([len(image) for image in images], device=mask.device)
        kept = kept[:, :-1][torch.arange(width, device=mask.device) < lengths[:, None]]
        again = torch.is_grad_enabled() and self.projects_twice  # what came had no graph
        if found.weight is None:
            rows = self.vlm.projector(torch.cat(heard["tower"])[kept]) if again else torch.cat(images)[kept]
        elif pruning.merges(self.name) == "tower":
            rows = self.vlm.projector(_merged(found, told["tower"]))
        else:
            rows = _merged(found, every)
        return kept, rows.to(every.dtype), found.loss

    def idle(self) -> Tensor | float:
        """Zero, of all that learns here: which parameters a fast step touches must not depend on its data."""
        return sum((0.0 * p.sum() for p in self.parameters()), 0.0)


def _merged(found: pruning.Kept, rows: Tensor) -> Tensor:
    """The sums of all images, in the order of the rows that are kept."""
    return (found.weight.to(rows.dtype) @ rows)[found.index >= 0]
