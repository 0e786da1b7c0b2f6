"""The plugins by name, and what each must be told beside the features.

A plugin works from features alone, or declares the signals that it `needs` or, if they are there, `takes`: tensors
(B, N) or (B, N, C) that it is called with by name. Known ones, which `signals.py` hears in a vision tower:

    cls_attention  (B, N)     how much [CLS] looks at each patch
    tower          (B, N, C)  the features before the projector

A plugin that compares rows holds `pairs` bytes for each pair of an image's rows: that is what it costs in memory, and
`memory.py` counts with it.
"""

from collections.abc import Callable

from torch import Tensor

from ..errors import UserError

# (features (B, N, D) fp32, most = largest count, valid (B, N) bool, counts (B,), seed, and the plugin's signals)
# -> (B, most): the picks of image b in its first counts[b] columns, in any order; later columns are ignored.
Plugin = Callable[..., Tensor]
PLUGINS: dict[str, Plugin] = {}
_NEEDS: dict[str, tuple[str, ...]] = {}
_TAKES: dict[str, tuple[str, ...]] = {}
_PAIRS: dict[str, int] = {}
PAIRS = 6  # bytes of a pair: an fp32 matrix of cosines, and two masks


def register(
    name: str, *, needs: tuple[str, ...] = (), takes: tuple[str, ...] = (), pairs: int = PAIRS
) -> Callable[[Plugin], Plugin]:
    """Add a plugin under `name`. A taken name is an error: the last one to import must not win in silence."""
    if isinstance(needs, str) or isinstance(takes, str):  # else its letters would be the signals
        raise UserError(f"the signals of {name!r} must be a tuple, as needs=('cls_attention',)")

    def add(plugin: Plugin) -> Plugin:
        if name in PLUGINS:
            raise UserError(f"a pruning plugin named {name!r} is registered already; choose another name")
        PLUGINS[name], _NEEDS[name], _TAKES[name], _PAIRS[name] = plugin, tuple(needs), tuple(takes), pairs
        return plugin

    return add


def names() -> list[str]:
    return sorted(PLUGINS)


def needs(name: str) -> tuple[str, ...]:
    """The signals without which a plugin cannot choose."""
    return _NEEDS.get(name, ())


def pairs(name: str) -> int:
    """Bytes that a plugin holds for each pair of an image's rows."""
    return _PAIRS.get(name, PAIRS)


def signals_of(name: str) -> tuple[str, ...]:
    """All signals that a plugin looks at."""
    return needs(name) + _TAKES.get(name, ())


def works_with(signals) -> list[str]:
    """The plugins that need no other signals than these."""
    return [name for name in names() if set(needs(name)) <= set(signals)]
