"""Which parameters train in which of LLaVA's two stages."""

import torch
from torch import nn

from ..util.errors import unknown
from .families import family

STAGES = ("align", "train")


def set_trainable(model: nn.Module, stage: str) -> None:
    """LLaVA's two stages. align: the connector alone. train: the connector, and the LLM's adapters where it has some,
    else the LLM. The tower is always frozen. What trains becomes fp32 (see `precision.py`)."""
    if stage not in STAGES:
        raise unknown("stage", stage, STAGES)
    model.requires_grad_(False)
    vlm = family(model)
    adapters = [p for name, p in model.named_parameters() if "lora_" in name]
    # A peft adapter cannot carry NeXT's newline, which is a parameter without a module: beside adapters it stays.
    trained = list(vlm.projector.parameters()) if adapters else vlm.connector()
    if stage == "train":
        llm = [*vlm.language_model.parameters(), *vlm.model.get_output_embeddings().parameters()]
        trained += adapters or llm
    for parameter in trained:
        if parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
        parameter.requires_grad_(True)
