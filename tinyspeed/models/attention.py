"""Attention over the rows of a `Layout`, without a mask.

Attention is causal inside each sample, padded or packed. The layout is handed to the LLM as a keyword argument, passes
through its layers (and through activation checkpointing) and arrives here. Without a layout, in evaluation and
`generate`, this is transformers' own SDPA.

Transformers would otherwise guess the packing from position ids: it reads any step other than +1 as a new document, and
`original` positions make such a step at every pruned row. It would also build masks, (R, R) for a packed batch, which
forbid the fast kernels.

Rows with a weight w (`pruning/weights.py`) need no mask on a GPU either. The weight is one more column of the product,

    q' = [q | 1 1],  k' = [k | hi lo],  hi + lo = w / scale    so    scale q' k' = scale q k + w

in two parts, since half precision would round it, filled up to the widths that kernels take. `v` gets zeros. On a CPU
the kernel takes a mask at the price of none, and wider heads cost more. So there all layers share one (`rows.Layout`).
"""

import itertools
from dataclasses import replace

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..rows import Layout, Rows

NAME = "tinyspeed"  # the name of this attention implementation in transformers


def has_packed_kernel(x: torch.Tensor) -> bool:
    """Whether the packed kernel runs on tensors like x: half precision, on an Ampere GPU or newer."""
    half = _dtype(x) in (torch.bfloat16, torch.float16)
    return x.is_cuda and half and torch.cuda.get_device_capability(x.device) >= (8, 0)


def choose_layout(x: torch.Tensor, rows: Rows) -> str:
    """Packs where there is a kernel for it, and on a CPU where padding would be more than a tenth of the slots: there
    a call for each sample costs less."""
    if has_packed_kernel(x):
        return "packed"
    on_cpu = x.device.type == "cpu"  # elsewhere the rest would wait for the device
    return "packed" if on_cpu and len(rows) < 0.9 * (rows.samples * int(rows.lengths.max())) else "padded"


def _dtype(x: torch.Tensor) -> torch.dtype:
    """The precision in which a GPU computes a matrix product of x."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def rows_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, rows: Layout | None = None, **kw
):
    """Attention among the rows of a `Layout`, or transformers' SDPA when there is none. Takes (B, heads, rows, width)
    and returns (B, rows, heads, width)."""
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kw)
    if rows.weight is not None and query.device.type != "cpu":
        width, scaling = query.shape[-1], scaling or query.shape[-1] ** -0.5
        weighted = weigh(query, key, value, rows.weight / scaling)
        out, _ = rows_attention(
            module, *weighted, None, dropout=dropout, scaling=scaling, rows=replace(rows, weight=None)
        )
        return out[..., :width], None
    how = {"dropout": dropout, "scaling": scaling, "is_causal": True}
    if rows.cu_seqlens is None:
        return sdpa_attention_forward(module, query, key, value, rows.masks[0], **how)
    if has_packed_kernel(query) and dropout == 0.0:
        # Autocast does not cover this kernel, and rotary embeddings have turned its queries and keys into fp32.
        q, k, v = (x[0].transpose(0, 1).to(_dtype(x)) for x in (query, key, value))
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        cu, longest = rows.cu_seqlens, rows.longest
        return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=(-1, 0))[None], None
    # Without the CUDA kernel, one call for each sample: on a CPU far faster than one call with a block mask.
    parts = [
        sdpa_attention_forward(module, *(x[:, :, a:b] for x in (query, key, value)), mask, **how)[0]
        for (a, b), mask in zip(itertools.pairwise(rows.borders), rows.masks, strict=True)
        if b > a
    ]
    return torch.cat(parts, dim=1), None


def weigh(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, weight: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Widens what attention takes, so that `weight` (1 or B, rows) is added to each product with a key."""
    high = weight.bfloat16().to(weight.dtype)  # which no precision rounds
    columns = torch.stack([high, weight - high], -1)[:, None].to(key.dtype)
    more = 2 + -(query.shape[-1] + 2) % 8
    columns = pad(columns, (0, more - 2)).expand(*key.shape[:3], more)
    ones = pad(query.new_ones(1, 1, 1, 2), (0, more - 2)).expand(*query.shape[:3], more)
    return torch.cat([query, ones], -1), torch.cat([key, columns], -1), pad(value, (0, more))


AttentionInterface.register(NAME, rows_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
