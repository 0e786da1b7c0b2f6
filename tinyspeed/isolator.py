"""The mode isolator: learned rows that tell the LLM "this is fast mode"; and `Views`, a LoRA of its own for each mode.

A model trained on 57 tokens of an image does poorly when it is asked about all 576: it has learned what a pruned image
looks like. DualSpeed puts a soft prompt P of l learned rows in front of each image's kept rows, in fast steps only:

    fast:  ... text, P_1 .. P_l, kept image rows, text ...
    slow:  ... text, all image rows, text ...            (and the same at inference)

So P can learn what is special about pruned input and the LLM need not. P is thrown away after training. It starts from
the same values as in the official code, where it is the weight of an nn.Linear(hidden, 4, bias=False).

The isolator rows are part of the table in `rows.py`, and the gather puts them in place. A slow step does not use P, so
its gradient is None and the optimizer does not change it.

A run saves its isolator beside the exported model, as it does with the parameters of a learned plugin. Aligning and
tuning are often two runs, and the second can continue with the first one's isolator.

`Views` separates the modes more strictly, for LoRA: two sets of adapters on one frozen LLM, with or without P.

    fast steps and teachers:                   W + s B_fast A_fast
    slow steps, full steps and inference:      W + s B_slow A_slow      (this is exported)

Neither mode's gradients reach the other's adapters. The view that is not in use has no gradient, so the optimizer
leaves it and its moments alone. Both modes train and share the projector. The trade-off: twice the adapter weights and
moments, and the slow view learns only from slow steps, a tenth of all. What the fast view has learned reaches it by way
of the teacher and the projector.
"""

import math
from typing import TYPE_CHECKING

import torch
from torch import nn

from .util import UserError, require

if TYPE_CHECKING:
    from peft.tuners.lora import LoraLayer


class PromptIsolator(nn.Module):
    """`length` learned rows of width `hidden`. `length = 0` is the ablation without an isolator."""

    def __init__(self, length: int, hidden: int, *, seed: int = 0):
        super().__init__()
        require(length >= 0, f"isolator = {length}: the number of isolator tokens cannot be negative")
        # A generator of its own, so that creating the isolator changes no other random numbers.
        generator = torch.Generator().manual_seed(seed)
        bound = 1 / math.sqrt(hidden)  # nn.Linear's default for `hidden` inputs
        self.weight = nn.Parameter((torch.rand(length, hidden, generator=generator) * 2 - 1) * bound)

    def __len__(self) -> int:
        return self.weight.shape[0]


class Views(nn.Module):
    """Switches between the LoRAs "fast" and "slow" of a peft model. If not `on`, it does nothing.

    A view is chosen at the start of a forward and kept until the next one. With activation checkpointing the backward
    runs the layers again and must find the view that the forward used, so each backward must come before the next
    forward. (peft's own `set_adapter` is of no use here: it also freezes the adapter that it switches off, and FSDP and
    optimizers need a fixed set of parameters that train.)
    """

    def __init__(self, model: nn.Module, llm: nn.Module, on: bool):
        super().__init__()
        self.layers: list[LoraLayer] = [module for module in model.modules() if on and hasattr(module, "lora_A")]
        inside = {*llm.modules()}
        if on and {(layer in inside, *sorted(layer.lora_A)) for layer in self.layers} != {(True, "fast", "slow")}:
            raise UserError(
                'views: the LLM needs two LoRA adapters, "fast" and "slow", on the same layers, and nothing else may '
                "have any: tinyspeed.add_lora(model, rank=16, views=True) makes them"
            )
        for layer in self.layers:
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or "lora_" in name)
        self.use("slow")

    def use(self, view: str) -> None:
        for layer in self.layers:
            layer._active_adapter = view

    def train(self, mode: bool = True):
        """Evaluation uses the slow view, also when the wrapped model is called by itself."""
        if not mode:
            self.use("slow")
        return super().train(mode)
