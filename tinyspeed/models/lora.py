"""LoRA adapters on the LLM's linear layers, by peft.

    add_lora(model, rank=16)    40 million parameters train instead of 7 billion

"All linear layers" means the LLM's. To peft it also means the tower and the projector, so it gets a pattern of names.
"""

from typing import TYPE_CHECKING

import torch
from torch import nn

from .families import family

if TYPE_CHECKING:  # peft brings bitsandbytes and torch's compiler along: two seconds, for those who want adapters
    from peft import LoraConfig


def linear_layers(model: nn.Module) -> str:
    """A pattern for the names of the LLM's linear layers, and of no others."""
    inside = family(model).language_model.layers
    prefix = next(name for name, module in family(model).model.named_modules() if module is inside)
    leaves = sorted({name.rpartition(".")[2] for name, m in inside.named_modules() if isinstance(m, nn.Linear)})
    return rf"{prefix.replace('.', chr(92) + '.')}\.\d+\..*\.({'|'.join(leaves)})"


def lora_config(rank: int, alpha: float = 0.0, dropout: float = 0.0) -> "LoraConfig":
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=alpha or 2 * rank, lora_dropout=dropout)


def add_lora(
    model: nn.Module, *, rank: int, alpha: float = 0.0, dropout: float = 0.0, seed: int = 0, views: bool = False
) -> nn.Module:
    """The model in peft's wrapper, with adapters (fp32) on the LLM's linear layers. `views`: two of them, "slow" and
    "fast", drawn alike."""
    from peft import get_peft_model

    how = lora_config(rank, alpha, dropout)
    how.target_modules = linear_layers(model)
    with torch.random.fork_rng(devices=_cuda(model)):
        torch.manual_seed(seed)
        wrapped = get_peft_model(model, how, adapter_name="slow" if views else "default")
        if views:
            torch.manual_seed(seed)
            wrapped.add_adapter("fast", how)
    for name, parameter in wrapped.named_parameters():
        if "lora_" in name:  # under 4-bit weights stored as bf16 they come out bf16
            parameter.data = parameter.data.float()
    return wrapped


def _cuda(model: nn.Module) -> list[torch.device]:
    return sorted({p.device for p in model.parameters() if p.device.type == "cuda"}, key=str)
