"""A plugin at work in a fast forward: it says which feature rows of the images stay, and what stands in their places.

    selecting:  a kept row stands for itself
    merging:    row k = sum_i w_ki x_i, in the place that the plugin gives it; the gradient flows to every x_i
                (if it merges before the projector: row k = project(sum_i w_ki tower_i))

A merged row takes the place of a row that is kept, so `rows.py` need not know that merging exists. Full and slow steps
see the rows as they are. Only a fast forward, also that of a teacher, sees sums.

Nine rows in ten only take part in the choice and never in the loss. So a fast step projects twice: first all rows
without a graph, to choose, and then the kept ones with a graph. The second projection costs a tenth of a forward. It
saves nine tenths of the backward and of the activations.

The parameters of a learned plugin are here, in fp32. They train together with the isolator, are thrown away after
training, and are not part of slow steps. A fast step adds zero times each of them to its loss, so that they have a
gradient even if the batch has no image.
"""

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from .. import pruning
from ..util import UserError, require, require_known
from ..util.sending import to_device
from . import signals as tower_signals

if TYPE_CHECKING:  # the models import the pruning room, and not the other way round
    from ..models.families import Family


class Chooser(nn.Module):
    """The plugin `name`, with its parameters if it has any, for the images of one model."""

    def __init__(self, vlm: "Family", name: str, keep: float, seed: int, weights: str = "none"):
        super().__init__()
        tower_signals.require_signals(vlm, name)
        require_known("kind of weights", weights, pruning.WEIGHTS)
        self.vlm, self.name, self.seed, self.plugin, self.weights = vlm, name, seed, pruning.entry(name), weights
        self.learned = pruning.make(name, vlm.hidden_size, pruning.keep_count(keep, vlm.most_rows), seed)

    def switch(self, name: str) -> None:
        """Changes to another plugin, for another stage."""
        if name != self.name:
            learned = self.plugin.learned or pruning.entry(name).learned
            require(not learned, f"{self.name!r} and {name!r}: a learned plugin must be the same in all stages")
            tower_signals.require_signals(self.vlm, name)
            self.name, self.plugin = name, pruning.entry(name)

    @property
    def projects_twice(self) -> bool:
        """False if all rows need a graph (for sums over them, or for a tower that trains) or none does."""
        projector, tower = (any(p.requires_grad for p in m.parameters()) for m in (self.vlm.projector, self.vlm.tower))
        return projector and not tower and self.vlm.rowwise and self.plugin.merges != "features"

    def forward(
        self, images: list[Tensor], shown: list[Tensor], keep: float, signals: Mapping[str, list[Tensor]],
        step: int | None, weigh: bool,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None]:  # fmt: skip
        """Chooses among the feature rows (rows, width) of one image or more. `keep` is a share of an image's patches:
        rows that are not `shown`, as newlines, never stay. Returns how many rows of each image stay and, on the device,
        which (`rows.prune`); what stands in their places; how many rows each stands for, if they `weigh` and that is
        not 1; and a learned plugin's loss of each image."""
        if step is None and self.training and self.plugin.draws:
            raise UserError(f"the plugin {self.name!r} draws anew in each step: which is it? Set model.step")
        pad = functools.partial(pad_sequence, batch_first=True)
        wide, candidates = pad(images), [int(mask.sum()) for mask in shown]
        features = wide[..., : self.vlm.hidden_size]  # see `families/base.py` for what may stand behind them
        send = lambda of: to_device(of, features.device)
        beside = {name: pad(signals[name]) for name in self.plugin.needs}
        choice = pruning.choose(
            self.name, features, keep=keep, mask=send(pad(shown)), candidates=candidates, signals=beside,
            square=self.vlm.square, seed=self.seed + (step or 0), module=self.learned,
            weights=self.weights if weigh else "none",
        )  # fmt: skip
        sizes, counts = [len(image) for image in images], [pruning.keep_count(keep, n) for n in candidates]
        kept = torch.cat([torch.arange(n) < count for n, count in zip(sizes, counts, strict=True)])
        filled = send((torch.arange(max(counts)) < torch.tensor(counts)[:, None]).flatten().nonzero()[:, 0])
        starts = torch.tensor(sizes).cumsum(0) - torch.tensor(sizes)
        chosen = (choice.index + send(starts)[:, None]).flatten().index_select(0, filled)
        chosen = chosen.clamp(0, len(kept) - 1)  # NaN may choose anything
        if choice.weight is not None:
            merged = wide if self.plugin.merges == "features" else beside["tower"]
            rows = (choice.weight.to(merged.dtype) @ merged).flatten(0, 1).index_select(0, filled)
            if self.plugin.merges == "tower":
                rows = self.vlm.projector(rows)
        elif torch.is_grad_enabled() and self.projects_twice:
            rows = self.vlm.projector(torch.cat(signals["tower"]).index_select(0, chosen))
        else:
            rows = torch.cat(images).index_select(0, chosen)
        stand_for = None if choice.sizes is None else choice.sizes.flatten().index_select(0, filled)
        return kept, chosen, rows.to(features.dtype), stand_for, choice.loss

    def zero_loss(self) -> Tensor | float:
        """Returns the sum of 0 times every parameter."""
        return sum((0.0 * p.sum() for p in self.parameters()), 0.0)
