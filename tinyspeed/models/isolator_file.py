"""The file in which a finished run leaves its isolator for the next run (`dualspeed.isolator_from`).

It holds everything that was trained and is not part of the exported model: the isolator's rows and a learned plugin.
"""

import zlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..util import UserError


def save(learned: Mapping[str, Tensor], file: Path) -> None:
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in learned.items()}
    save_file(tensors, file, metadata={"crc32": _crc(tensors)})


@torch.no_grad()
def load_into(parameters: Mapping[str, Tensor], file: Path) -> None:
    """Fills these parameters with what an earlier run saved under their names."""
    try:
        with safe_open(file, framework="pt") as opened:
            saved = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
            if (opened.metadata() or {}).get("crc32") != _crc(saved):
                raise ValueError("its checksum is wrong")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(f"{file} is damaged, or of an older version ({error}); finish that run anew") from error
    for name, parameter in parameters.items():
        if name not in saved:
            raise UserError(f"{file} has no {name}: that run had another dualspeed.plugin, or is of an older version")
        if saved[name].shape != parameter.shape:
            raise UserError(f"{name} in {file} is {tuple(saved[name].shape)}, not {tuple(parameter.shape)}")
        parameter.copy_(saved[name])


def _crc(tensors: Mapping[str, Tensor]) -> str:
    crc = 0
    for name in sorted(tensors):
        crc = zlib.crc32(tensors[name].reshape(-1).view(torch.uint8).numpy(), zlib.crc32(name.encode(), crc))
    return str(crc)
