"""Models whose weights have moved as training would move them, and what a checkpoint would have of them."""

import torch
from torch import nn

from tinyspeed.models import stages


def train_a_little(net: nn.Module) -> nn.Module:
    """Move everything that trains, adapters' B included, far from where it began."""
    stages.set_trainable(net, "train")
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def learned(net: nn.Module) -> dict[str, torch.Tensor]:
    """What trains, by name."""
    return {name: p for name, p in net.named_parameters() if p.requires_grad}


def saved(net: nn.Module) -> dict[str, torch.Tensor]:
    """As a checkpoint has it."""
    return {f"model/{name}": p.detach() for name, p in learned(net).items()}
