"""tinyspeed: train LLaVA-style models faster by letting most steps see a tenth of the image tokens."""

from . import pruning, scheduler
from .errors import UserError

__all__ = ["DualSpeed", "UserError", "pruning", "scheduler"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # transformers takes seconds to import; `tinyspeed --help` and recipe errors need not wait for it.
    if name == "DualSpeed":
        from .dualspeed import DualSpeed

        return DualSpeed
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
