"""The plugins by name, and what each must be told beside the features.

A plugin works from features alone, or declares the signals that it `needs`: tensors (B, N) or (B, N, C) that it is
called with by name. Known ones, which `signals.py` hears in a vision tower:

    cls_attention  (B, N)     how much [CLS] looks at each patch
    keys           (B, N, d)  what the patches offer to attention: the keys of that layer, averaged over its heads
    tower          (B, N, C)  the features before the projector

A signal that it `takes` it can do without. Only callers of `choose` give such: training hears what a plugin needs. So
`relevance` to a question (dpp) is for them alone: a training sample has many questions, and no text tower.

A plugin that selects returns which rows it keeps. One that `merges` returns a weight map too: what stands in the place
of each row that it keeps is a sum over all rows. A `learned` plugin is a class of nn.Module instead of a function,
made once with (width of the features, most rows that it will ever keep) and trained with the model.

A plugin that compares rows holds `pairs` bytes for each pair of an image's rows, and one that merges a weight for each
row and each sum: that is what it costs in memory, and `memory.py` counts with it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from ..util.errors import UserError, unknown

# (features (B, N, D) fp32, most = largest count, valid (B, N) bool, counts (B,), sizes = [(candidates, count)] of each
#  image on the host, square = whether m * m rows are a picture, seed, and the plugin's signals)
# -> index (B, most): the picks of image b in its first counts[b] columns, in any order; later columns are ignored.
#    Or (index, weight (B, most, N), or None, loss (B,), or None), weight with a line for each column of index.
Plugin = Callable[..., Tensor | tuple[Tensor, Tensor | None, Tensor | None]]


@dataclass(frozen=True)
class Entry:
    plugin: Plugin
    needs: tuple[str, ...]
    takes: tuple[str, ...]
    merges: str
    learned: bool
    draws: bool
    pairs: int


PLUGINS: dict[str, Entry] = {}
MERGES = ("", "features", "tower")
PAIRS = 6  # bytes of a pair: an fp32 matrix of cosines, and two masks
WEIGHT = 14  # bytes of a weight: fp32 while it is made, sorted and masked


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
    """Add a plugin under `name`. A taken name is an error: the last one to import must not win in silence.

    `merges`: "features", or "tower" for what the projector reads, which is projected once it is merged.
    `draws`: it draws anew in each training step, and so has to know which step it is."""
    if isinstance(needs, str) or isinstance(takes, str):  # else its letters would be the signals
        raise UserError(f"the signals of {name!r} must be a tuple, as needs=('cls_attention',)")
    if merges not in MERGES:
        raise unknown("kind of rows to merge", merges, MERGES)
    if merges == "tower" and "tower" not in needs:
        raise UserError(f"{name!r} merges what the projector reads: it must need the signal tower")

    def add(plugin: Plugin) -> Plugin:
        if name in PLUGINS:
            raise UserError(f"a pruning plugin named {name!r} is registered already; choose another name")
        PLUGINS[name] = Entry(plugin, tuple(needs), tuple(takes), merges, learned, draws, pairs)
        return plugin

    return add


def names() -> list[str]:
    return sorted(PLUGINS)


def entry(name: str) -> Entry:
    if name not in PLUGINS:
        raise unknown("pruning plugin", name, PLUGINS)
    return PLUGINS[name]


def needs(name: str) -> tuple[str, ...]:
    """The signals without which a plugin cannot choose."""
    return entry(name).needs


def pairs(name: str, keep: float) -> float:
    """Bytes that a plugin holds for each pair of an image's rows when it keeps this share of them."""
    return max(entry(name).pairs, WEIGHT * keep if merges(name) else 0)


def signals_of(name: str) -> tuple[str, ...]:
    """All signals that a plugin looks at."""
    return entry(name).needs + entry(name).takes


def learned(name: str) -> bool:
    """Whether a plugin has parameters, which train with the model."""
    return entry(name).learned


def draws(name: str) -> bool:
    """Whether a plugin draws other rows in each training step."""
    return entry(name).draws


def works_with(signals) -> list[str]:
    """The plugins that need no other signals than these."""
    return [name for name in names() if set(needs(name)) <= set(signals)]


def merges(name: str) -> str:
    """Which rows a plugin sums up, "features" or "tower"; "" for one that selects."""
    return entry(name).merges
