"""Qwen3.5's linear-attention layers: what they are told about packed samples, if there are kernels that honour it."""

import itertools

import pytest
import torch
from support import tiny, zoo
from support.forwards import FAST, FULL, SLOW, backward, wrap
from transformers.models.qwen3_5 import modeling_qwen3_5 as theirs

from tinyspeed import UserError
from tinyspeed.models.families import qwen3_5

KERNELS = "is_flash_linear_attention_available", "is_causal_conv1d_available"


@pytest.fixture
def kernels(monkeypatch):
    """Stand-ins for the two packages' kernels, with their arguments: transformers' own code, run on each sample."""
    convolve = theirs.causal_conv1d_fn.__wrapped__
    delta = theirs.torch_chunk_gated_delta_rule.__wrapped__

    def by_number(x, weight, bias=None, seq_idx=None, activation=None, **_):
        assert seq_idx.dtype == torch.int32
        assert seq_idx.shape == (1, x.shape[2])
        sizes = torch.bincount(seq_idx[0]).tolist()
        return torch.cat([convolve(part, weight, bias, activation) for part in x.split(sizes, dim=2)], dim=2)

    def by_border(q, k, v, g, beta, cu_seqlens=None, **how):
        assert cu_seqlens.dtype == torch.int32
        assert cu_seqlens[-1] == q.shape[1]
        parts = [
            delta(*(x[:, a:b] for x in (q, k, v)), g=g[:, a:b], beta=beta[:, a:b], **how)[0]
            for a, b in itertools.pairwise(cu_seqlens.tolist())
        ]
        return torch.cat(parts, dim=1), None

    monkeypatch.setattr(theirs, "causal_conv1d_fn", by_number)
    monkeypatch.setattr(theirs, "torch_chunk_gated_delta_rule", by_border)
    for name in KERNELS:
        monkeypatch.setattr(qwen3_5.import_utils, name, lambda: True)


@pytest.mark.parametrize("plan", [FULL, FAST, SLOW], ids=lambda plan: plan.mode)
def test_packed_samples_do_not_leak_where_kernels_honour_their_borders(plan, request):
    batch = zoo.batch("qwen3_5")
    want = backward(wrap(zoo.model("qwen3_5")), batch, plan=plan)
    request.getfixturevalue("kernels")
    model = wrap(zoo.model("qwen3_5"), layout="packed")
    assert model.layout == "packed"
    got = backward(model, batch, plan=plan)
    assert not tiny.difference(got[0], want[0])
    assert not tiny.difference(got[1], want[1])


@pytest.mark.parametrize("there", KERNELS)
def test_one_kernel_of_the_two_is_not_enough(there, monkeypatch):
    monkeypatch.setattr(qwen3_5.import_utils, there, lambda: True)
    with pytest.raises(UserError, match="without the packages flash-linear-attention and causal-conv1d"):
        wrap(zoo.model("qwen3_5"), layout="packed")


def test_kernels_that_are_announced_and_missing_are_an_error_and_no_leak(monkeypatch):
    for name in KERNELS:
        monkeypatch.setattr(qwen3_5.import_utils, name, lambda: True)
    with pytest.raises(ValueError, match="can't keep packed sequences apart"):
        wrap(zoo.model("qwen3_5"), layout="packed")(**zoo.batch("qwen3_5"), plan=FULL)
