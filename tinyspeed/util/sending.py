"""Copies what was planned on the CPU to the device of a tensor, without waiting for what the device is doing.

A GPU works through a queue, and a step should only add to it. A plain copy waits until the queue is empty, unless it is
asked not to and its source is pinned memory, which the GPU can read by itself.
"""

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and tensor.device.type == "cpu":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)
