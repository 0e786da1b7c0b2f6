"""The plugins by name. A plugin registers itself; `select` looks it up."""

from collections.abc import Callable

from torch import Tensor

from ..errors import UserError

# (features (B, N, D) fp32, most = largest count, valid (B, N) bool, counts (B,), seed) -> (B, most): the picks of image
# b in its first counts[b] columns, in any order; later columns are ignored.
Plugin = Callable[..., Tensor]
PLUGINS: dict[str, Plugin] = {}


def register(name: str) -> Callable[[Plugin], Plugin]:
    """Add a plugin under `name`. A taken name is an error: the last one to import must not win in silence."""

    def add(plugin: Plugin) -> Plugin:
        if name in PLUGINS:
            raise UserError(f"a pruning plugin named {name!r} is registered already; choose another name")
        PLUGINS[name] = plugin
        return plugin

    return add


def names() -> list[str]:
    return sorted(PLUGINS)
