"""Half precision without surprises: frozen weights in bf16 or fp16, trained weights in fp32, arithmetic under autocast.

An AdamW step changes a weight by about one part in a thousand or less, and bf16 keeps three decimal digits. Small
updates to a half-precision weight round away, and in fp16 the moments overflow (an fp16 projector went NaN in three
steps). So every parameter that trains is fp32 (`stages.set_trainable` sees to it) and matrix products run in half
precision. Frozen weights are never copied to fp32.

fp16 (a T4 has no bf16) also needs loss scaling, since small gradients underflow:

    backward(loss * scale);   gradients finite: step with gradients / scale, and after 2,000 good steps scale * 2
                              else:             skip the step, scale / 2

Gradient clipping does the division, so it costs no pass of its own.
"""

import math
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass

import torch

from ..util import UserError

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve(name: str, device: torch.device) -> str:
    """Returns what "auto" means on this device; any other name is returned as it is."""
    if name not in ("auto", "bf16") or device.type != "cuda":
        return "fp32" if name == "auto" else name
    # Not torch.cuda.is_bf16_supported(): it says yes on a T4, which only emulates bf16.
    has_bf16 = torch.cuda.get_device_capability(device) >= (8, 0)
    if name == "bf16" and not has_bf16:
        raise UserError(f'{torch.cuda.get_device_name(device)} has no bf16: set model.precision = "fp16", or "auto"')
    return "bf16" if has_bf16 else "fp16"


def autocast(name: str, device: torch.device) -> AbstractContextManager:
    """The context of a forward in this precision; fp32 needs none.

    Half-precision copies of fp32 weights are made anew at each use instead of being kept to the end of the forward.
    That costs next to nothing and saves memory. And where weights are gathered for each use (`scale`), a kept copy can
    be the teacher's, which has no graph: the student's gradients would then be lost, without an error."""
    return nullcontext() if name == "fp32" else torch.autocast(device.type, dtype=DTYPES[name], cache_enabled=False)


@dataclass
class LossScale:
    """The loss scale of fp16; in every other precision it is constant, 1."""

    scale: float = 1.0
    good: int = 0  # steps since it last changed
    moving: bool = False

    GROW_AFTER = 2000
    SMALLEST = 2.0**-10

    @classmethod
    def of(cls, name: str) -> "LossScale":
        return cls(2.0**16, 0, True) if name == "fp16" else cls()

    def stepped(self) -> None:
        """Counts a step whose gradients were finite and used."""
        self.good += 1
        if self.moving and self.good >= self.GROW_AFTER:
            self.scale, self.good = self.scale * 2, 0

    def overflowed(self) -> bool:
        """Handles gradients that are not finite. Returns whether to skip this step and go on with a smaller scale;
        otherwise the scale is not to blame."""
        if not self.moving or self.scale <= self.SMALLEST:
            return False
        self.scale, self.good = self.scale / 2, 0
        return True

    def state_dict(self) -> dict:
        return asdict(self)

    def load_state_dict(self, state: dict) -> None:
        scale, good, moving = state["scale"], state["good"], state["moving"]
        types = type(scale) in (int, float), type(good) is int, type(moving) is bool
        if not all(types) or not 0 < scale < math.inf:
            raise ValueError(f"{state} is not the state of a loss scale")
        self.scale, self.good, self.moving = scale, good, moving


def device_of(name: str) -> torch.device:
    """Returns the device of this name; "auto" is CUDA where there is one, otherwise the CPU."""
    try:
        device = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises these for an unknown and for an absent device
        reason = str(error).splitlines()[0]
        raise UserError(f'device {name!r} cannot be used here: {reason}; use "auto" or "cpu"') from error
    return device
