"""The mode isolators: learned rows that tell the LLM "you are in fast mode"; and a LoRA of its own for each mode.

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

`Views` is the stronger separation, for LoRA: two parameter views of one frozen LLM, with P or without.

    fast steps, teachers:            W + s B_fast A_fast
    slow and full steps, inference:  W + s B_slow A_slow      (what is exported)

No mode's gradients reach the other's view: an idle view has none, so the optimizer leaves it and its moments alone.
What both modes train, and share, is the projector. The trade-off: an adapter's weights and moments twice, and the slow
view learns from slow steps alone, a tenth of all; what the fast view has learned reaches it through the teacher and the
projector.
"""

import math

import torch
from torch import nn

from .util.errors import UserError


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


class Views(nn.Module):
    """The LoRAs "fast" and "slow" of a peft model, of which one is in use at a time; without `on`, nothing.

    A view is switched at the start of a forward and never back at its end: with activation checkpointing the backward
    runs the layers again, and must find the view that the forward had. So each forward's backward comes before the next
    forward. peft's own `set_adapter` also freezes what it switches off, and FSDP and optimizers want to know for good
    what trains.
    """

    def __init__(self, model: nn.Module, llm: nn.Module, on: bool):
        super().__init__()
        self.layers = [module for module in model.modules() if on and hasattr(module, "lora_A")]
        inside = {*llm.modules()}
        if on and {(layer in inside, *sorted(layer.lora_A)) for layer in self.layers} != {(True, "fast", "slow")}:
            raise UserError(
                'views: the LLM needs two LoRA adapters, "fast" and "slow", on the same layers, and nothing else has '
                "any: loading.add_lora(model, rank=16, views=True) makes them"
            )
        for layer in self.layers:
            for name, parameter in layer.named_parameters():
                parameter.requires_grad_(parameter.requires_grad or "lora_" in name)
        self.use("slow")

    def use(self, view: str) -> None:
        for layer in self.layers:
            layer._active_adapter = view

    def train(self, mode: bool = True):
        """Evaluation begins in the slow view, also of the wrapped model alone."""
        if not mode:
            self.use("slow")
        return super().train(mode)
