"""The file in which a finished run leaves its isolator for the next one (`dualspeed.isolator_from`).

It holds everything that learned and is no part of the exported model: the isolator's rows, and a learned plugin.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..util.errors import UserError


def save(learned: Mapping[str, Tensor], file: Path) -> None:
    """What training leaves out of the model that it exports."""
    kept = {name: tensor.detach().cpu().contiguous() for name, tensor in learned.items()}
    save_file(kept, file, metadata={"crc32": _crc(kept)})


@torch.no_grad()
def load_into(learning: Mapping[str, Tensor], file: Path) -> None:
    """Fill these with what an earlier run saved under their names."""
    try:
        with safe_open(file, framework="pt") as opened:
            learned = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            if (opened.metadata() or {}).get("crc32") != _crc(learned):
                raise ValueError("its checksum is wrong")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{file} is damaged, or of an older version ({error}); finish that run anew") from error
    for name, tensor in learning.items():
        if name not in learned:
            raise UserError(f"{file} has no {name}: that run had another dualspeed.plugin, or is of an older version")
        if learned[name].shape != tensor.shape:
            raise UserError(f"{name} in {file} is {tuple(learned[name].shape)}, not {tuple(tensor.shape)}")
        tensor.copy_(learned[name])


def _crc(tensors: Mapping[str, Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(name.encode(), crc)
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), crc)
    return str(crc)
