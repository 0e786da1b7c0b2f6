"""Attention over the rows of a `Layout`, without a mask.

Causal attention inside each sample, padded or packed: the layout is handed to the LLM as a keyword argument, passes
through its layers (and through activation checkpointing) and arrives here. Without a layout, in evaluation and
`generate`, this is transformers' own SDPA.

Transformers would otherwise guess the packing from position ids: any step other than +1 reads as a new document, which
`original` positions make at every pruned row, silently. And it would build masks: (R, R) for a packed batch, which
forbids the fast kernels.
"""

import itertools

import torch
from torch.nn.attention.varlen import varlen_attn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..rows import Layout, Rows

NAME = "tinyspeed"  # the attention implementation, as transformers knows it


def packs(x: torch.Tensor) -> bool:
    """Whether the packed kernel runs on tensors like x: half precision, on a GPU of Ampere's generation or newer."""
    return (
        x.is_cuda
        and _dtype(x) in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(x.device) >= (8, 0)
    )


def layout(x: torch.Tensor, rows: Rows) -> str:
    """Packed where there is a kernel for it; and on a CPU where padding would be more than a tenth of what is computed:
    a call a sample costs less there."""
    if packs(x):
        return "packed"
    return "packed" if x.device.type == "cpu" and len(rows) < 0.9 * rows.padded else "padded"


def _dtype(x: torch.Tensor) -> torch.dtype:
    """What a matrix product of x on a GPU is computed in."""
    return torch.get_autocast_dtype("cuda") if torch.is_autocast_enabled("cuda") else x.dtype


def rows_attention(
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, rows: Layout | None = None, **kw
):
    """Attention of the rows of a `Layout`; transformers' SDPA when there is none. (B, heads, rows, width) in,
    (B, rows, heads, width) out."""
    if rows is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kw)
    if rows.cu_seqlens is None:
        return sdpa_attention_forward(module, query, key, value, None, dropout=dropout, scaling=scaling, is_causal=True)
    if packs(query) and dropout == 0.0:
        # Autocast does not know this kernel, and rotary embeddings have made fp32 of its queries and keys.
        q, k, v = (x[0].transpose(0, 1).to(_dtype(x)) for x in (query, key, value))
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        cu, longest = rows.cu_seqlens, rows.longest
        return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=(-1, 0))[None], None
    # Without the CUDA kernel: one call a sample. On a CPU this beats one call with a block mask by far.
    ends = rows.cu_seqlens.tolist()
    parts = [
        sdpa_attention_forward(
            module, *(x[:, :, a:b] for x in (query, key, value)), None, dropout=dropout, scaling=scaling, is_causal=True
        )[0]
        for a, b in itertools.pairwise(ends)
        if b > a
    ]
    return torch.cat(parts, dim=1), None


AttentionInterface.register(NAME, rows_attention)
AttentionMaskInterface.register(NAME, sdpa_mask)
