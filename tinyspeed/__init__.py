"""tinyspeed: train LLaVA-style models faster by letting most steps see a tenth of the image tokens."""

from importlib import import_module
from typing import TYPE_CHECKING

from . import scheduler
from .adaptive import AdaptiveSchedule
from .scheduler import DualSpeedSchedule, FastSchedule, FullSchedule, PeriodicSchedule, Plan
from .util import UserError

if TYPE_CHECKING:
    from . import pruning
    from .dualspeed import DualSpeed
    from .models.lora import add_lora
    from .training.trainer_callback import SetStep

__all__ = ["AdaptiveSchedule", "DualSpeed", "DualSpeedSchedule", "FastSchedule", "FullSchedule", "PeriodicSchedule"]
__all__ += ["Plan", "SetStep", "UserError", "add_lora", "pruning", "scheduler"]
__version__ = "0.1.0"

# These are imported when they are first asked for: torch takes a second to import and transformers four, and
# `tinyspeed --help` or a misspelt key in a recipe need not wait for them.
_LAZY = {"DualSpeed": ".dualspeed", "SetStep": ".training.trainer_callback", "add_lora": ".models.lora"}


def __getattr__(name: str):
    if name == "pruning":
        return import_module(".pruning", __name__)  # `from . import pruning` would call this function again
    if name in _LAZY:
        return getattr(import_module(_LAZY[name], __name__), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
