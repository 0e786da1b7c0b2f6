"""Attention over the rows of a `Layout`, without a mask.

Attention is causal inside each sample, padded or packed. (Only where the rows of an image see each other does the model
bring a mask: `families/gemma.py`.) The layout is handed to the LLM as a keyword argument, passes
through its layers (and through activation checkpointing) and arrives here. Without a layout, in evaluation and
`generate`, this is transformers' own SDPA.

Transformers would otherwise guess the packing from position ids: it reads any step other than +1 as a new document, and
`original` positions make such a step at every pruned row. It would also build masks, (R, R) for a packed batch, which
forbid the fast kernels.

Rows with a weight w (`pruning/weights.py`) need no mask either. The weight is one more column of the product,

    q' = [q | 1 1],  k' = [k | hi lo],  hi + lo = w / scale    so    scale q' k' = scale q k + w

in two parts, since half precision would round it, filled up to the widths that kernels take. `v` gets zeros.
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
from ..util import require

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
    module, query, key, value, attention_mask, dropout=0.0, scaling=None, sliding_window: int | None = None,
    rows: Layout | None = None, **kw,
):  # fmt: skip
    """Attention among the rows of a `Layout`, or transformers' SDPA when there is none. Takes (B, heads, rows, width)
    and returns (B, rows, heads, width). With a `sliding_window` a row sees itself and so many before it, less one."""
    if rows is None:
        how = {"dropout": dropout, "scaling": scaling, "sliding_window": sliding_window, **kw}
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    unknown = [name for name in ("softcap", "s_aux") if kw.get(name) is not None]
    require(not unknown, f"this LLM's attention has {' and '.join(unknown)}, which tinyspeed cannot compute yet")
    if rows.weight is not None:
        width, scaling = query.shape[-1], scaling or query.shape[-1] ** -0.5
        weighted = weigh(query, key, value, rows.weight / scaling)
        out, _ = rows_attention(
            module, *weighted, attention_mask, dropout, scaling, sliding_window, rows=replace(rows, weight=None)
        )
        return out[..., :width], None
    how = {"dropout": dropout, "scaling": scaling}
    if rows.image is not None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **how)
    if rows.cu_seqlens is None:
        return _causal(module, query, key, value, sliding_window, how), None
    if has_packed_kernel(query) and dropout == 0.0:
        # Autocast does not cover this kernel, and rotary embeddings have turned its queries and keys into fp32.
        q, k, v = (x[0].transpose(0, 1).to(_dtype(x)) for x in (query, key, value))
        groups = query.shape[1] // key.shape[1]
        if groups > 1:
            k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        cu, longest = rows.cu_seqlens, rows.longest
        before = sliding_window - 1 if sliding_window else -1
        return varlen_attn(q, k, v, cu, cu, longest, longest, scale=scaling, window_size=(before, 0))[None], None
    # Without the CUDA kernel, one call for each sample: on a CPU far faster than one call with a block mask.
    parts = [
        _causal(module, *(x[:, :, a:b] for x in (query, key, value)), sliding_window, how)
        for a, b in itertools.pairwise(rows.borders)
        if b > a
    ]
    return torch.cat(parts, dim=1), None


def _causal(
    module, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, window: int | None, how: dict
) -> torch.Tensor:
    """SDPA in which each row of a sample sees those before it, all of them or the last of a window."""
    n, mask = query.shape[2], None
    if window and window < n:
        mask = torch.ones(n, n, dtype=torch.bool, device=query.device).tril().triu(1 - window)[None, None]
    return sdpa_attention_forward(module, query, key, value, mask, is_causal=mask is None, **how)[0]


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
