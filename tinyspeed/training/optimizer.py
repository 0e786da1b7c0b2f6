"""AdamW with moments in 32 or 8 bits, which exist for every parameter from the start.

    m <- b1 m + (1 - b1) g;   v <- b2 v + (1 - b2) g^2;   w <- w - lr (m' / (sqrt(v') + eps) + decay w)

32-bit moments take 8 bytes a parameter: 320 MB for LoRA adapters of rank 16, 56 GB for a 7B model that is trained in
full. bitsandbytes keeps them in 8 bits with a scale for each block; "paged" moves them to the CPU if the GPU is full.

Moments are made as zeros before step 0. Otherwise a parameter that no step has touched yet (an isolator before the
first fast step) would be missing from the first checkpoint and could not be restored.
"""

import math

import torch
from torch import Tensor

from ..recipe import StageSection
from ..util import UserError
from .checkpoint import CONSTANT


def make_optimizer(stage: StageSection, connector: list[Tensor], others: list[Tensor]) -> torch.optim.Optimizer:
    """AdamW in which projector and isolator learn at `connector_lr`, and all other parameters at `lr`."""
    # An isolator without rows has nothing to learn, and it cannot be sharded like the others.
    connector, others = ([p for p in group if p.numel()] for group in (connector, others))
    lrs = (stage.connector_lr or stage.lr, stage.lr)
    groups = [{"params": p, "lr": lr, "base_lr": lr} for p, lr in zip((connector, others), lrs, strict=True) if p]
    how = {"betas": (0.9, stage.beta2), "weight_decay": stage.weight_decay}
    if stage.optimizer == "adamw":
        optimizer = torch.optim.AdamW(groups, fused=True, **how)
        for p in connector + others:
            zeros = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            optimizer.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **zeros}
        return optimizer
    try:
        import bitsandbytes
    except ImportError as error:
        raise UserError(f'optimizer = "{stage.optimizer}" needs bitsandbytes, which is not installed') from error
    kinds = {"adamw8bit": bitsandbytes.optim.AdamW8bit, "paged_adamw8bit": bitsandbytes.optim.PagedAdamW8bit}
    optimizer = kinds[stage.optimizer](groups, **how)
    optimizer.check_overrides()
    for number, group in enumerate(optimizer.param_groups):
        for place, p in enumerate(group["params"]):
            optimizer.init_state(group, p, number, place)
    optimizer.initialized = True
    return optimizer


def tensors_read(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    """The floating-point tensors that a step reads besides gradients: the weights that train and their moments. Of
    8-bit moments that is the scales of the blocks."""
    weights = [p for group in optimizer.param_groups for p in group["params"]]
    beside = [of for state in optimizer.state.values() for name, of in state.items() if name not in CONSTANT]
    return weights + [of for of in beside if isinstance(of, Tensor) and of.is_floating_point()]


def learning_rate(stage: StageSection, step: int, steps: int) -> float:
    """The factor of the learning rate at this step: linear warm-up, then half a cosine down to zero."""
    warm = math.ceil(stage.warmup * steps)
    if step < warm:
        return (step + 1) / warm
    return 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))
