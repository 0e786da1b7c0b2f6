"""One model over many ranks, by FSDP2: each rank keeps a slice of every weight and borrows the rest, layer by layer.

    a group            = one layer of the LLM; the last group = embeddings, lm_head, projector, isolator
    forward, backward  all-gather the group, use it, drop it;  backward also: sum its gradients, each rank keeps a slice

The frozen tower is in no group. Every rank holds all of it (0.6 GB), because a rank whose samples have no pictures does
not run it, and the others would wait for that rank in an all-gather. Gradients are summed and not averaged, since each
rank divides its loss by the answers of the whole batch.

Weights come from rank 0 alone. The other ranks build the model on `meta`, without memory, and receive each group just
before it is sharded. So a rank never holds more than one group beside its slices, and one process reads the disk.
Weights in 4 bits cannot be built on `meta`: there every rank reads and quantises for itself, straight to its device,
and their bytes must travel as a floating-point type (as uint8 they broke silently: accelerate #3983).

Precision: parameters that train are fp32. Where the LLM itself trains, groups are gathered in half precision
(`param_dtype`), which halves the traffic. (What flows between layers is in half precision then, as in LLaVA's own
training; a single process keeps it in fp32.) Beside adapters nothing is cast: the frozen weights are in half precision
already, and 4-bit ones must not be cast.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from tinyspeed import DualSpeed
from tinyspeed.util import require


def shard(
    model: DualSpeed, mesh: DeviceMesh, device: torch.device, *, cast: torch.dtype | None, reshard: bool, offload: bool
) -> None:
    """Shards a model in place. Only rank 0 needs to have its weights, unless they are in 4 bits."""
    quantised = has_4_bits(model)
    policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32 if cast else None)
    how = {"mesh": mesh, "mp_policy": policy}
    if offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for layer in model.vlm.language_model.layers:
        if not quantised:
            _receive(layer, device)
        fully_shard(layer, reshard_after_forward=reshard, **how)
    if not quantised:
        _receive(model, device)
        if model.config.tie_word_embeddings:  # receiving has cut the tie
            model.vlm.model.tie_weights()
    empty = {p for p in model.parameters() if p.numel() == 0}  # an isolator without rows
    fully_shard(model, ignored_params={*model.vlm.frozen_tower(), *empty}, **how)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def has_4_bits(model: nn.Module) -> bool:
    """Whether the model has weights in 4 bits. Refuses those stored as bytes, which cannot be sharded."""
    stored = {name: p.dtype for name, p in model.named_parameters() if type(p).__name__ == "Params4bit"}
    for name, dtype in stored.items():
        what = f"{name} holds its 4-bit weights as {dtype}: load with storage=torch.bfloat16 to shard them"
        require(dtype.is_floating_point, what)
    return bool(stored)


def _receive(module: nn.Module, device: torch.device) -> None:
    """Brings what is not sharded yet to the device, with rank 0's values."""
    sharded = {part for group in module.modules() if isinstance(group, FSDPModule) for part in group.modules()}
    for part in module.modules():
        if part in sharded:
            continue
        part._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device), recurse=False)
        for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            dist.broadcast(tensor.data, 0)
