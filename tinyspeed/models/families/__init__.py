"""The model families that tinyspeed can train: a file each, and the registry.

A new family is a small subclass of `Family` in a file of its own and a line in `FAMILIES`. One whose positions are not
a single number per row (Qwen-VL) overrides `hidden`.
"""

from torch import nn

from ...util import require
from .base import Family
from .llava import Llava
from .llava_next import LlavaNext
from .llava_next_video import LlavaNextVideo, LlavaOnevision

FAMILIES: dict[str, type[Family]] = {
    "llava": Llava,
    "llava_next": LlavaNext,
    "llava_next_video": LlavaNextVideo,
    "llava_onevision": LlavaOnevision,
}


def family(model: nn.Module) -> Family:
    """Returns the adapter for a model, by its config's model_type."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    require(kind in FAMILIES, f"tinyspeed cannot train a {kind!r} model yet; it knows {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind](model)
