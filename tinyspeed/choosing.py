"""What a plugin makes of a step's images: which of their rows stay, and what a merging plugin puts in their place.

    kept rows          as they are, the gradient flows through the gather
    merged row k       sum_i w_ki x_i, put where the plugin says that it belongs: the gradient flows to every x_i
                       (of one that merges before the projector: project(sum_i w_ki tower_i))

A merged row lies in the table where the row lay that it stands for, so `rows.py` cuts the sequence without knowing that
there is such a thing. Full and slow steps see the rows as they are; only a fast forward, a teacher's too, sees sums.

The parameters of a learned plugin live here, in fp32, and train beside the isolator: thrown away after training, left
alone by slow steps, touched with a zero weight by a fast step that has nothing to prune.
"""

import functools
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from . import pruning, signals
from .errors import UserError
from .vlm import Family


class Chooser(nn.Module):
    """The plugin `name`, for the images of this model."""

    def __init__(self, vlm: Family, name: str, keep: float, seed: int):
        super().__init__()
        signals.check(vlm, name)
        self.vlm, self.name, self.seed = vlm, name, seed
        self.learned = pruning.make(name, vlm.hidden_size, pruning.keep_count(keep, vlm.most_rows), seed)

    def switch(self, name: str) -> None:
        """Another plugin, for another stage."""
        if name != self.name:
            if self.learned or pruning.learned(name):
                raise UserError(f"{self.name!r} and {name!r}: a learned plugin is the same in all stages")
            signals.check(self.vlm, name)
            self.name = name

    @property
    def needs(self) -> tuple[str, ...]:
        return pruning.needs(self.name)

    def forward(
        self, images: list[Tensor], keep: float, heard: Mapping[str, list[Tensor]], step: int
    ) -> tuple[Tensor, list[Tensor], Tensor | None]:
        """Of at least one image: (V,) bool, which feature rows of all of them stay; the table's rows, with merged ones
        in their places; and a learned plugin's loss of each image. K counts pictures, never structural rows."""
        pad = functools.partial(pad_sequence, batch_first=True)
        mask = pad([self.vlm.prunable(image) for image in images])
        told = {name: pad(values) for name, values in heard.items()}
        every, how = pad(images), {"square": self.vlm.square, "seed": self.seed + step, "module": self.learned}
        found = pruning.choose(self.name, every, keep=keep, mask=mask, signals=told, **how)
        places, width = mask.shape
        kept = torch.zeros(places, width + 1, dtype=torch.bool, device=mask.device)
        kept.scatter_(1, found.index.where(found.index >= 0, width), True)
        lengths = torch.tensor([len(image) for image in images], device=mask.device)
        kept = kept[:, :-1][torch.arange(width, device=mask.device) < lengths[:, None]]
        if found.weight is not None:
            before = pruning.merges_before_projector(self.name)
            rows = self._merged(found, told["tower"] if before else every, before)
            whole = torch.cat(images)
            images = [torch.zeros_like(whole).index_copy(0, kept.nonzero()[:, 0], rows.to(whole.dtype))]
        return kept, images, found.loss

    def _merged(self, found: pruning.Kept, rows: Tensor, before_projector: bool) -> Tensor:
        """The sums of all images, in the order of the rows that are kept."""
        rows = found.weight.to(rows.dtype) @ rows
        return (self.vlm.projector(rows) if before_projector else rows)[found.index >= 0]

    def idle(self) -> Tensor | float:
        """Zero, of all that learns here: which parameters a fast step touches must not depend on its data."""
        return sum((0.0 * p.sum() for p in self.parameters()), 0.0)
