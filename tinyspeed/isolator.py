"""The mode isolator: learned rows that tell the LLM "you are in fast mode".

A model trained on 57 visual rows and asked about 576 performs poorly: it has learned what a pruned picture looks
like. DualSpeed puts a soft prompt P (l learned rows) in front of every image's kept rows, on fast steps only:

    fast:  ... text, P_1 .. P_l, kept visual rows, text ...
    slow:  ... text, all visual rows, text ...            (and so at inference)

What is peculiar to pruned input can be learned by P instead of by the LLM, and P is thrown away after training.
The official code makes P the weight of an nn.Linear(hidden, 4, bias=False); the initial values here are the same.

The rows sit in the same table as every other row, so the gather of `rows.py` places them: nothing here touches a
sequence. A slow step does not read P at all, so its gradient is None and the optimizer leaves it alone.

A run leaves its isolator beside the exported model, with what else only training knows (a learned plugin): aligning and
tuning are often two runs, and the second goes on with the isolator of the first.
"""

import math
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from .errors import UserError


class PromptIsolator(nn.Module):
    """`length` learned rows of width `hidden`. `length = 0` is the ablation without an isolator."""

    def __init__(self, length: int, hidden: int, *, seed: int = 0):
        super().__init__()
        if length < 0:
            raise UserError(f"isolator = {length}: the number of isolator rows cannot be negative")
        # Its own generator: building the isolator must not shift anybody else's random numbers.
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(hidden)  # nn.Linear's default for fan-in `hidden`
        self.weight = nn.Parameter((torch.rand(length, hidden, generator=generator) * 2 - 1) * bound)

    def __len__(self) -> int:
        return self.weight.shape[0]


def save(learned: Mapping[str, Tensor], file: Path) -> None:
    """What training leaves out of the model that it exports."""
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in learned.items()}, file)


@torch.no_grad()
def load(learning: Mapping[str, Tensor], file: Path) -> None:
    """Fill these with what an earlier run saved under their names."""
    if not file.is_file():
        raise UserError(f"there is no {file}: was that run finished?")
    learned = load_file(file)
    for name, tensor in learning.items():
        if name not in learned:
            raise UserError(f"{file} has no {name}: that run had another dualspeed.plugin")
        if learned[name].shape != tensor.shape:
            raise UserError(f"{name} in {file} is {tuple(learned[name].shape)}, not {tuple(tensor.shape)}")
        tensor.copy_(learned[name])
