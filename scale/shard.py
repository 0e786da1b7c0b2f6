"""One model over many ranks, by FSDP2: each rank keeps a slice of every weight and borrows the rest, layer by layer.

    a group            = one layer of the LLM; the last group = embeddings, lm_head, projector, isolator
    forward, backward  all-gather the group, use it, drop it;  backward also: sum its gradients, each rank keeps a slice

The frozen tower is in no group: every rank holds it whole (0.6 GB), because a rank whose samples have no pictures does
not run it, and the others would wait for it in an all-gather. Gradients are summed and not averaged, since each rank
divides its loss by the answers of the whole batch.

Weights come from rank 0 alone. The other ranks build the model on `meta`, without memory, and get each group just
before it is sharded: beside its slice, a rank never holds more than one group, and one process reads the disk.
Weights in 4 bits cannot be built on `meta`: there every rank reads and quantises for itself, straight to its device,
and their bytes must travel as a floating-point type (as uint8 they broke in silence: accelerate #3983).

Precision: what trains is fp32. Where the LLM itself trains, groups are gathered in half precision (`param_dtype`), as
half the bytes travel. (What flows between layers is in half precision then, as in LLaVA's own training; one process
keeps it in fp32.) Beside adapters nothing is cast, as the frozen weights are in half precision already and 4-bit ones
must not be.
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, fully_shard

from tinyspeed import DualSpeed, UserError


def shard(
    model: DualSpeed,
    mesh: DeviceMesh,
    device: torch.device,
    *,
    cast: torch.dtype | None = None,
    reshard: bool = True,
    offload: bool = False,
) -> None:
    """Shard a model in place. Where it is not in 4 bits, only rank 0 needs to have its weights."""
    check_storage(model)
    quantised = any(type(p).__name__ == "Params4bit" for p in model.parameters())
    policy = MixedPrecisionPolicy(param_dtype=cast, reduce_dtype=torch.float32 if cast else None)
    how = {"mesh": mesh, "mp_policy": policy}
    if offload:
        how["offload_policy"] = CPUOffloadPolicy(pin_memory=device.type == "cuda")
    for layer in model.vlm.language_model.layers:
        if not quantised:
            _arrive(layer, device)
        fully_shard(layer, reshard_after_forward=reshard, **how)
    if not quantised:
        _arrive(model, device)
        if model.config.tie_word_embeddings:  # arriving has cut the tie
            model.vlm.model.tie_weights()
    empty = {p for p in model.parameters() if p.numel() == 0}  # an isolator without rows
    fully_shard(model, ignored_params={*model.vlm.tower.parameters(), *empty}, **how)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)


def check_storage(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        if type(parameter).__name__ == "Params4bit" and not parameter.dtype.is_floating_point:
            raise UserError(
                f"{name} holds its 4-bit weights as {parameter.dtype}: load with storage=torch.bfloat16 to shard them"
            )


def _arrive(module: nn.Module, device: torch.device) -> None:
    """What is not sharded yet comes to the device, with rank 0's values."""
    sharded = {part for group in module.modules() if isinstance(group, FSDPModule) for part in group.modules()}
    for part in module.modules():
        if part in sharded:
            continue
        part._apply(lambda t: torch.empty_like(t, device=device) if t.is_meta else t.to(device), recurse=False)
        for tensor in [*part.parameters(recurse=False), *part.buffers(recurse=False)]:
            dist.broadcast(tensor.data, 0)
