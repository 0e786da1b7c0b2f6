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
        self.most = pruning.keep_count(keep, vlm.most_rows)
        self.learned = pruning.make(name, vlm.hidden_size, self.most, seed)

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
        if self.learned and pruning.keep_count(keep, mask.shape[1]) > self.most:
            raise UserError(
                f"{self.name!r} was made for {self.most} rows at most, and {keep:.3g} of an image with "
                f"{mask.shape[1]} rows is more; plugins that do not mind: divprune, grid, pool"
            )
        found = pruning.choose(
            self.name, pad(images), keep=keep, mask=mask, seed=self.seed + step, signals=told, module=self.learned
        )
        places, width = mask.shape
        kept = torch.zeros(places, width + 1, dtype=torch.bool, device=mask.device)
        kept.scatter_(1, found.index.where(found.index >= 0, width), True)
        lengths = torch.tensor([len(image) for image in images], device=mask.device)
        kept = kept[:, :-1][torch.arange(width, device=mask.device) < lengths[:, None]]
        if found.weight is not None:
            images = [self._merged(images, kept, found, told)]
        return kept, images, found.loss

    def _merged(self, images: list[Tensor], kept: Tensor, found: pruning.Kept, told: Mapping[str, Tensor]) -> Tensor:
        """(V, D): a picture's sums where `kept` says; rows that are not kept are nothing."""
        before = pruning.merges_before_projector(self.name)
        rows = told["tower"] if before else pad_sequence(images, batch_first=True)
        rows = found.weight.to(rows.dtype) @ rows
        rows = (self.vlm.projector(rows) if before else rows)[found.index >= 0]
        whole = torch.cat(images)
        return torch.zeros_like(whole).index_copy(0, kept.nonzero()[:, 0], rows.to(whole.dtype))

    def idle(self) -> Tensor | float:
        """Zero, of all that learns here: which parameters a fast step touches must not depend on its data."""
        return sum((0.0 * p.sum() for p in self.parameters()), 0.0)
