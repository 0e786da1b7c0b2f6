"""LoRA adapters on the LLM's linear layers, by peft.

    add_lora(model, rank=16)    40 million parameters train instead of 7 billion

peft's "all-linear" would also mean the tower and the projector, so it gets a pattern of names instead.
"""

import re
from typing import TYPE_CHECKING

import torch
from torch import nn

from .families import family

if TYPE_CHECKING:  # importing peft takes two seconds (bitsandbytes, torch's compiler), for those who want adapters
    from peft import LoraConfig


def linear_layers(model: nn.Module) -> str:
    """Returns a pattern that matches the names of the LLM's linear layers and no others."""
    layers = family(model).language_model.layers
    prefix = next(name for name, module in family(model).model.named_modules() if module is layers)
    leaves = sorted({name.rpartition(".")[2] for name, m in layers.named_modules() if isinstance(m, nn.Linear)})
    return rf"{re.escape(prefix)}\.\d+\..*\.({'|'.join(leaves)})"


def lora_config(rank: int, alpha: float = 0.0, dropout: float = 0.0) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, lora_dropout=dropout)


def add_lora(
    model: nn.Module, *, rank: int, alpha: float = 0.0, dropout: float = 0.0, seed: int = 0, views: bool = False
) -> nn.Module:
    """Wraps the model with peft, which puts adapters on the LLM's linear layers, in fp32 also beside weights in half
    precision. With `views` there are two adapters, "slow" and "fast", which start equal."""
    from peft import get_peft_model

    config = lora_config(rank, alpha, dropout)
    config.target_modules = linear_layers(model)
    devices = sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, config, adapter_name="slow" if views else "default")
        if views:
            torch.manual_seed(seed)
            wrapped.add_adapter("fast", config)
    return wrapped
