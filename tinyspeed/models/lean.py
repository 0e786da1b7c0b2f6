"""LoRA layers, norms and gated MLPs that keep less for the backward, in half precision.

transformers' and peft's layers keep nearly everything that they compute. With dropout, that is 245 kB of each row in
each layer of LLaVA-1.5-7B. Most of it can be made again from the rest, by cheap operations without products:

    norm        y = w x / sqrt(mean(x^2) + eps)     keeps x in half precision, not in fp32
    MLP         y = silu(gate) up                   keeps gate and up, not silu(gate)
    LoRA        out + s (mask x) A' B'              keeps x A'; the mask is drawn from its seed again

A LoRA layer also needs its x, but that is the y of a norm or of an MLP, or attention's output, which attention keeps.
So a y says what it is made of (`Source`), and a LoRA layer keeps that, which is kept anyway, and not y. 95 kB remain.

What differs: there are fewer roundings. s B A x is added in one product; the mask's 1 / (1 - p) is part of s; a norm is
torch's, one kernel on a GPU. peft also copies x to fp32, and autocast copies it back. That is left out, so a step moves
a third fewer bytes than before.

The trade-off: for each LoRA layer that reads it, a y is computed once more, and a mask is drawn twice. No product is
computed twice.

Where autocast is off, a layer is as transformers and peft have it, and so is an adapter of another kind (DoRA). A layer
keeps its class's name, parameters and methods, so peft merges and saves it as always.
"""

from collections.abc import Callable
from functools import cache, partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn import functional as F


class Source(NamedTuple):
    """What a tensor can be made from again."""

    make: Callable[..., Tensor]
    of: tuple[Tensor, ...]


def source(x: Tensor) -> Source:
    return getattr(x, "source", None) or Source(lambda x: x, (x,))


class Remade(Function):
    """make(*of), made again in the backward. Everything that has a gradient is in `of`."""

    @staticmethod
    def forward(ctx, make, *of):
        ctx.make = make
        ctx.save_for_backward(*of)
        return make(*of)

    @staticmethod
    def backward(ctx, grad):
        needs = ctx.needs_input_grad[1:]
        of = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needs, strict=True)]
        with torch.enable_grad():
            grads = iter(torch.autograd.grad(ctx.make(*of), [t for t in of if t.requires_grad], grad))
        return None, *(next(grads) if need else None for need in needs)


def remade(make: Callable[..., Tensor], *of: Tensor) -> Tensor:
    y = Remade.apply(make, *of)
    y.source = Source(make, of)
    return y


def normed(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    with torch.autocast(x.device.type, enabled=False):  # it would make fp32 of x
        return F.rms_norm(x, weight.shape, weight.to(x.dtype), eps)


def gated(gate: Tensor, up: Tensor) -> Tensor:
    return F.silu(gate) * up


class Adapter(Function):
    """out + scale * dropout(x) A' B', for `out` the result of the frozen layer."""

    @staticmethod
    def forward(ctx, out, x, a, b, scale, p):
        ctx.make, of = source(x)
        ctx.scale, ctx.p = scale / (1 - p), p
        ctx.seed = int(torch.empty((), dtype=torch.int64).random_()) if p else 0  # of the CPU: no wait for a GPU
        inner = _dropped(x, _mask(x, p, ctx.seed), out.dtype) @ a.to(out.dtype).t()
        ctx.save_for_backward(inner, a, b, *of)
        return torch.addmm(out.flatten(0, -2), inner, b.to(out.dtype).t(), alpha=ctx.scale).view_as(out)

    @staticmethod
    def backward(ctx, grad):
        inner, a, b, *of = ctx.saved_tensors
        needs_x, needs_a, needs_b = ctx.needs_input_grad[1:4]
        rows, of_x, of_a, of_b = grad.flatten(0, -2), None, None, None
        if needs_b:
            of_b = (rows.t() @ inner).to(b.dtype) * ctx.scale
        of_inner = rows @ b.to(grad.dtype) * ctx.scale
        x = ctx.make(*of)
        mask = _mask(x, ctx.p, ctx.seed)
        if needs_a:
            of_a = (of_inner.t() @ _dropped(x, mask, grad.dtype)).to(a.dtype)
        if needs_x:
            of_x = (of_inner @ a.to(grad.dtype)).view_as(x)
            of_x = (of_x if mask is None else of_x.mul_(mask)).to(x.dtype)
        return grad, of_x, of_a, of_b, None, None


def _mask(like: Tensor, p: float, seed: int) -> Tensor | None:
    """What stays of numbers that are dropped with probability p; None if that is all."""
    if not p:
        return None
    generator = torch.Generator(like.device).manual_seed(seed)
    return torch.empty_like(like, dtype=torch.bool).bernoulli_(1 - p, generator=generator)


def _dropped(x: Tensor, mask: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The rows of x after dropout, not yet divided by 1 - p."""
    x = x.to(dtype)
    return (x if mask is None else x * mask).flatten(0, -2)


# The layers


def _norm(layer, x: Tensor) -> Tensor:
    return remade(partial(normed, eps=layer.variance_epsilon), x, layer.weight)


def _mlp(layer, x: Tensor) -> Tensor:
    return layer.down_proj(remade(gated, layer.gate_proj(x), layer.up_proj(x)))


def _linear(layer, x: Tensor) -> Tensor:
    out = layer.base_layer(x)
    for name in filter(layer.lora_A.__contains__, layer.active_adapters):
        dropout, a, b = layer.lora_dropout[name], layer.lora_A[name].weight, layer.lora_B[name].weight
        p = dropout.p if isinstance(dropout, nn.Dropout) and dropout.training else 0.0
        out = Adapter.apply(out, x, a, b, layer.scaling[name], p)
    return out


def _plain_lora(layer) -> bool:
    """Whether the adapters in use are of the kind that `_linear` knows."""
    more = layer.lora_variant or any(layer.lora_bias.values())
    return not (more or layer.merged or layer.disable_adapters)


def _how(layer: nn.Module) -> tuple[Callable, Callable] | None:
    """How a layer runs, and when; None if it is none of those that could keep less."""
    if hasattr(layer, "lora_A"):
        return (_linear, _plain_lora) if isinstance(layer.get_base_layer(), nn.Linear) else None
    if type(layer).__name__.endswith("RMSNorm") and hasattr(layer, "variance_epsilon"):
        return _norm, _always
    silu = getattr(getattr(layer, "config", None), "hidden_act", "") == "silu"
    gates = {name for name, _ in layer.named_children()} == {"gate_proj", "up_proj", "down_proj", "act_fn"}
    return (_mlp, _always) if silu and gates else None


def _always(layer) -> bool:
    return True


def _half(x: Tensor) -> bool:
    return torch.is_autocast_enabled(x.device.type)


@cache
def _lean(kind: type, run: Callable, fits: Callable) -> type:
    def forward(self, x, *args, **kwargs):
        lean = _half(x) and not (args or kwargs) and fits(self)
        return run(self, x) if lean else kind.forward(self, x, *args, **kwargs)

    return type(kind.__name__, (kind,), {"forward": forward, "__module__": kind.__module__, "plain": kind})


def use(model: nn.Module, on: bool) -> None:
    """Sets whether the layers of an LLM are those of this file, or plain again."""
    for layer in model.modules():
        if not on:
            layer.__class__ = getattr(type(layer), "plain", type(layer))
        elif not hasattr(type(layer), "plain") and (how := _how(layer)):
            layer.__class__ = _lean(type(layer), *how)
