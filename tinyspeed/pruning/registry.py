"""The plugins by name, and what each needs beside the features. A new plugin is a new file, imported in `__init__.py`.

A plugin works from the features alone, or declares signals that it `needs`: tensors (B, N) or (B, N, C), which it gets
as keyword arguments. `signals.py` records these in a vision tower:

    cls_attention  (B, N)     how much attention [CLS] pays to each patch
    keys           (B, N, d)  the attention keys of the patches in the same layer, averaged over its heads
    tower          (B, N, C)  the features before the projector

A signal that it `takes` is optional. Training does not provide it; only a caller of `choose` can. An example is
`relevance` to a question (`dpp`): a training sample has many questions, and there is no text tower.

A plugin that selects returns which tokens it keeps. One that `merges` also returns a weight map: each token that it
keeps is replaced by a weighted sum over all tokens. A `learned` plugin is a class of nn.Module instead of a function.
It is created once, for a width of the features and a largest number of kept tokens, and trains with the model.

A plugin that compares tokens with each other needs `pairs` bytes of memory for each pair of an image's tokens, and one
that merges needs memory for each weight. `models/memory.py` counts with both.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

from ..util import UserError, require, require_known

# A plugin is called with: features (B, N, D) fp32; most, the largest count; valid (B, N) bool; counts (B,); sizes, the
# (candidates, count) of each image as Python numbers; square, whether m * m rows are a picture; seed; and its signals.
# It returns index (B, most): the first counts[b] columns are the picks of image b, in any order; the rest is ignored.
# Or it returns (index, weight, loss): weight (B, most, N) or None has a line for each column of index, and loss (B,) or
# None is a learned plugin's own. Or (index, weight, loss, sizes): sizes (B, most) says how many tokens each pick stands
# for, see `weights.py`.
Plugin = TypeVar("Plugin", bound=Callable)


@dataclass(frozen=True)
class Entry:
    """A plugin and what `register` was told about it."""

    plugin: Callable
    needs: tuple[str, ...]  # signals that it cannot choose without
    takes: tuple[str, ...]
    merges: str  # what it sums up: "features", or "tower" for what the projector reads; "" if it selects
    learned: bool  # whether it has parameters, which train with the model
    draws: bool  # whether it draws anew in each training step, so that it must know which step it is
    pairs: int  # bytes for each pair of an image's tokens

    def pair_bytes(self, keep: float) -> float:
        """The bytes for each pair when this share of the tokens is kept, weights included."""
        return max(self.pairs, WEIGHT * keep if self.merges else 0)


PLUGINS: dict[str, Entry] = {}
MERGES = ("", "features", "tower")
PAIRS = 6  # bytes per pair: an fp32 matrix of cosines, and two masks
WEIGHT = 14  # bytes per weight: in fp32, while it is made, sorted and masked


def register(
    name: str,
    *,
    needs: tuple[str, ...] = (),
    takes: tuple[str, ...] = (),
    merges: str = "",
    learned: bool = False,
    draws: bool = False,
    pairs: int = PAIRS,
) -> Callable[[Plugin], Plugin]:
    """Adds a plugin under `name` (see `Entry`). A taken name is an error: no plugin silently replaces another."""
    if isinstance(needs, str) or isinstance(takes, str):  # each letter would count as a signal
        raise UserError(f"the signals of {name!r} must be a tuple, as needs=('cls_attention',)")
    require_known("kind of rows to merge", merges, MERGES)
    reads_tower = merges != "tower" or "tower" in needs
    require(reads_tower, f"{name!r} merges what the projector reads: it must need the signal tower")

    def add(plugin: Plugin) -> Plugin:
        require(name not in PLUGINS, f"a pruning plugin named {name!r} is registered already; choose another name")
        PLUGINS[name] = Entry(plugin, tuple(needs), tuple(takes), merges, learned, draws, pairs)
        return plugin

    return add


def names() -> list[str]:
    return sorted(PLUGINS)


def entry(name: str) -> Entry:
    require_known("pruning plugin", name, PLUGINS)
    return PLUGINS[name]


def works_with(signals) -> list[str]:
    """The plugins that need no other signals than these."""
    return [name for name in names() if set(entry(name).needs) <= set(signals)]
