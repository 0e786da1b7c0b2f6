"""tinyspeed: train LLaVA-style models faster by letting most steps see a tenth of the image tokens."""

from . import scheduler
from .util.errors import UserError

__all__ = ["DualSpeed", "UserError", "pruning", "scheduler"]
__version__ = "0.1.0"


def __getattr__(name: str):
    # torch takes a second to import and transformers four; `tinyspeed --help` and a misspelt key need not wait for it.
    if name == "DualSpeed":
        from .dualspeed import DualSpeed

        return DualSpeed
    if name == "pruning":
        from importlib import import_module

        return import_module(".pruning", __name__)  # `from . import pruning` would ask here again
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
