"""Which parameters train in each of LLaVA's two stages."""

import torch
from torch import nn

from ..util import require_known
from .families import family

STAGES = ("align", "train")


def set_trainable(model: nn.Module, stage: str) -> None:
    """Stage "align" trains the connector alone; stage "train" also trains the LLM's adapters, or the whole LLM if it
    has none. The tower is always frozen. Parameters that train become fp32 (see `precision.py`)."""
    require_known("stage", stage, STAGES)
    model.requires_grad_(False)
    vlm = family(model)
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    # A peft adapter cannot carry NeXT's newline, a parameter without a module: beside adapters it stays frozen.
    modules = [parameter for module in vlm.projectors for parameter in module.parameters()]
    trained = modules if adapters else vlm.connector()
    if stage == "train":
        trained += adapters or [*vlm.language_model.parameters(), *vlm.model.get_output_embeddings().parameters()]
    for parameter in trained:
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
