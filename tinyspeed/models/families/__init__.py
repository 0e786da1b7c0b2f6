"""The model families that tinyspeed can train: a file each, and the registry.

A new family is a small subclass of `Family` in a file of its own and a line in `FAMILIES`.
"""

from torch import nn

from ...util import require
from .base import Family
from .gemma import Gemma3, Gemma4
from .internvl import InternVL, SmolVLM
from .llava import Llava
from .llava_next import LlavaNext
from .llava_next_video import LlavaNextVideo, LlavaOnevision
from .mistral3 import Mistral3
from .qwen3_5 import Qwen35
from .qwen_vl import Qwen2VL, Qwen3VL, Qwen25VL

FAMILIES: dict[str, type[Family]] = {
    "llava": Llava,
    "llava_next": LlavaNext,
    "llava_next_video": LlavaNextVideo,
    "llava_onevision": LlavaOnevision,
    "internvl": InternVL,
    "smolvlm": SmolVLM,
    "idefics3": SmolVLM,
    "mistral3": Mistral3,
    "qwen2_vl": Qwen2VL,
    "qwen2_5_vl": Qwen25VL,
    "qwen3_vl": Qwen3VL,
    "qwen3_vl_moe": Qwen3VL,
    "qwen3_5": Qwen35,
    "qwen3_5_moe": Qwen35,
    "gemma3": Gemma3,
    "gemma4": Gemma4,
}


def family(model: nn.Module) -> Family:
    """Returns the adapter for a model, by its config's model_type."""
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
    require(kind in FAMILIES, f"tinyspeed cannot train a {kind!r} model yet; it knows {', '.join(sorted(FAMILIES))}")
    return FAMILIES[kind](model)
