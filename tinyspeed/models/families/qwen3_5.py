"""Qwen3.5, 3.6 and 3.8: Qwen3-VL without deepstack, and an LLM of which three layers in four are linear attention.

A linear-attention layer (a gated delta net, behind a short convolution) has no rotary positions. It knows the order of
the rows that it gets and nothing of those that pruning took out, whatever `positions` says; so only the full-attention
layers see `original` positions. What that is worth was measured in miniature (`tutorials/results/ablations.md`).
Weights of kept tokens, too, count in those layers alone.

Its state runs on from row to row, so samples that stand end to end would leak into each other. Kernels that begin anew
with each sample are told here where one begins; without them `packed` is refused. In the padded layout padding comes
behind a sample's rows, and no row reads a state that comes after it.
"""

import torch
from torch import Tensor
from transformers.utils import import_utils

from ...rows import Layout
from ...util.sending import to_device
from .base import Family
from .qwen_vl import Qwen2VL, Qwen3VL


class Qwen35(Qwen3VL):
    _widened, projectors, first_layers = Qwen2VL._widened, Family.projectors, 0

    def layout_for(self, layout: str) -> str:
        kernels = import_utils.is_flash_linear_attention_available() and import_utils.is_causal_conv1d_available()
        return layout if layout == "packed" and kernels else super().layout_for(layout)

    @property
    def why_padded(self) -> str:
        return super().why_padded + " without the packages flash-linear-attention and causal-conv1d, and a GPU"

    def hidden(self, embeddings: Tensor, layout: Layout, layers: tuple[int, ...] | None, **more) -> Tensor:
        if layout.borders is not None:
            samples = torch.arange(len(layout.borders) - 1, dtype=torch.int32)
            sample = samples.repeat_interleave(torch.tensor(layout.borders).diff())[None]
            more |= {"cu_seq_lens_q": layout.cu_seqlens, "seq_idx": to_device(sample, embeddings.device)}
        return super().hidden(embeddings, layout, layers, **more)
