"""Layers that keep less compute what transformers' and peft's own compute: all gradients, against those in float64.
What they keep is counted in tests/slow/test_replays_of_all_layers.py."""

import copy
from unittest import mock

import bitsandbytes as bnb
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from support import tiny
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tinyspeed.models import lean

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


class Drawn(nn.Module):
    """Dropout that draws a seed, and its mask from that: as `lean` says that it does."""

    def __init__(self, p):
        super().__init__()
        self.p = p

    def forward(self, x):
        if not self.training:
            return x
        generator = torch.Generator().manual_seed(int(torch.empty((), dtype=torch.int64).random_()))
        kept = torch.empty(x.shape, dtype=torch.bool).bernoulli_(1 - self.p, generator=generator)
        return x * kept / (1 - self.p)


def llm(rank=4, dropout=0.0, bias=False, width=16, layers=2, **more):
    """A small Llama in float64 with adapters, none of whose matrices is zero."""
    torch.manual_seed(rank + width)
    sizes = {"hidden_size": width, "intermediate_size": 3 * width, "num_hidden_layers": layers, "vocab_size": 50}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    net = LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_bias=bias, mlp_bias=bias))
    lora = LoraConfig(r=rank, lora_alpha=3 * rank, lora_dropout=dropout, target_modules=LINEARS, **more)
    net = get_peft_model(net, lora).double().train()
    with torch.no_grad():
        for name, p in net.named_parameters():
            if p.dim() == 1 or "lora_B" in name:
                p.uniform_(-0.5, 1.5) if "norm" in name else p.normal_(0, 0.3)
    return net


class Norm(nn.Module):
    """The formula, in float64: transformers' computes in fp32."""

    def __init__(self, norm):
        super().__init__()
        self.weight, self.eps = norm.weight, norm.variance_epsilon

    def forward(self, x):
        return x / (x.pow(2).mean(-1, keepdim=True) + self.eps).sqrt() * self.weight


def plain(net):
    """An independent copy as transformers and peft have it, whose dropout draws what ours draws."""
    net = copy.deepcopy(net)
    lean.use(net, False)
    for layer in list(net.modules()):
        for name, norm in list(layer.named_children()):
            if "norm" in name and norm.weight.dtype == torch.float64:
                setattr(layer, name, Norm(norm))
        for name, dropout in getattr(layer, "lora_dropout", {}).items():
            if isinstance(dropout, nn.Dropout):
                layer.lora_dropout[name] = Drawn(dropout.p)
    return net


def ours(net):
    net = copy.deepcopy(net)
    lean.use(net, True)
    return net


def step(net, seed=0, shape=(2, 5), dtype=torch.float64):
    """The result, and the gradients of the input and of all that trains."""
    generator = torch.Generator().manual_seed(seed)
    width = net.config.hidden_size
    x = torch.randn(*shape, width, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    torch.manual_seed(seed)
    net.zero_grad()
    out = net.base_model.model.model(inputs_embeds=x, use_cache=False).last_hidden_state
    out.backward(torch.randn(out.shape, generator=generator, dtype=torch.float64).to(out.dtype))
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    return {"result": out.detach().double(), "input": x.grad.double(), **{n: g.double() for n, g in gradients.items()}}


@given(
    rank=st.integers(1, 9), dropout=st.sampled_from([0.0, 0.1, 0.6]), bias=st.booleans(),
    width=st.sampled_from([4, 12, 20]), shape=st.tuples(st.integers(1, 3), st.integers(1, 6)),
    frozen=st.sampled_from(["nothing", "lora_A", "lora_B", "lora"]), tuned=st.booleans(), seed=st.integers(0, 99),
)  # fmt: skip
@settings(max_examples=25)
def test_in_float64_all_numbers_are_those_of_transformers_and_peft(
    rank, dropout, bias, width, shape, frozen, tuned, seed
):
    net = llm(rank, dropout, bias, width)
    for name, p in net.named_parameters():
        p.requires_grad_(("lora" in name and frozen not in name) or (tuned and "layers" in name))
    with mock.patch.object(lean, "_half", return_value=True):  # so that our layers run
        got = step(ours(net), seed, shape)
    want = step(plain(net), seed, shape)
    assert not tiny.difference(got, want, 1e-9)


def four_bits(net, half):
    """The same with its linear layers in 4 bits, and the exact copy of that."""
    exact, small = copy.deepcopy(net), copy.deepcopy(net).to(half)
    for (name, wide), layer in zip(exact.named_modules(), list(small.modules()), strict=True):
        if name.endswith("base_layer"):
            packed = bnb.nn.Linear4bit(1, 1, bias=False, compute_dtype=half, quant_type="nf4")
            packed.in_features, packed.out_features = layer.in_features, layer.out_features
            packed.weight = bnb.nn.Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4").to("cpu")
            of = bnb.functional.dequantize_4bit(packed.weight.detach(), packed.weight.quant_state)
            wide.weight.data = of.double()
            small.get_submodule(name.removesuffix(".base_layer")).base_layer = packed
    return small, exact


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("base", ["dense", "4-bit"])
@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_in_half_precision_they_are_as_near_to_the_truth_as_transformers_and_pefts(half, base, dropout):
    """The truth is float64's. Frozen weights are in half precision, adapters in fp32."""
    net = llm(8, dropout, width=64).to(torch.bfloat16)
    if base == "4-bit":
        small, exact = four_bits(net.double(), half)
    else:
        small, exact = net.to(half), copy.deepcopy(net.to(half)).double()
    for model in (small, exact):
        for name, p in model.named_parameters():
            if "lora" in name:
                p.data = p.data.double() if model is exact else p.data.float()
            p.requires_grad_("lora" in name)
    for seed in range(3):
        truth, errors = step(plain(exact), seed, (2, 40)), []
        for model in (ours(small), plain(small)):
            with torch.autocast("cpu", dtype=half, cache_enabled=False):
                found = step(model, seed, (2, 40), half)
            assert found.keys() == truth.keys()
            errors.append({name: float((found[name] - x).norm() / x.norm()) for name, x in truth.items()})
        assert max(errors[0].values()) < 0.05
        assert all(mine < 2 * errors[1][name] for name, mine in errors[0].items())  # of numbers that are rounded
        assert sum(errors[0].values()) < sum(errors[1].values())


def test_recomputed_layers_draw_the_same_masks():
    net, found = ours(llm(dropout=0.3, width=32).bfloat16()), []
    for again in (False, True):
        if again:
            net.base_model.model.gradient_checkpointing_enable({"use_reentrant": False})
        with torch.autocast("cpu", dtype=torch.bfloat16):
            found.append(step(net, dtype=torch.bfloat16))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert tiny.difference(step(net.eval(), dtype=torch.bfloat16), found[0], 0.05)  # without dropout


@pytest.mark.parametrize("p", [0.05, 0.5])
def test_a_mask_drops_its_share(p):
    one, other = (lean._mask(torch.empty(300, 300), p, seed).double() for seed in (1, 2))
    assert float(one.mean()) == pytest.approx(1 - p, abs=0.01)
    assert float((one * other).mean()) == pytest.approx((1 - p) ** 2, abs=0.01)


@pytest.mark.parametrize("way", ["dora", "bias", "off", "merged"])
def test_adapters_of_another_kind_are_pefts(way):
    net = llm(bias=True, **({"use_dora": True} if way == "dora" else {"lora_bias": True} if way == "bias" else {}))
    net = net.to(torch.bfloat16)
    if way == "off":
        net.base_model.disable_adapter_layers()
    if way == "merged":
        net.merge_adapter()
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        layers = [of.base_model.model.model.layers[0].mlp.up_proj for of in (ours(net), plain(net))]
        x = torch.randn(3, 16, dtype=torch.bfloat16)
        assert torch.equal(*(layer(x) for layer in layers))


def test_peft_sees_nothing_of_it():
    net = llm()
    changed = ours(net)
    kinds = [type(layer) for layer in changed.modules()]
    lean.use(changed, True)  # a second time it changes nothing
    assert [type(layer) for layer in changed.modules()] == kinds
    assert len(set(kinds)) == len({type(layer) for layer in net.modules()})
    assert changed.state_dict().keys() == net.state_dict().keys()
    assert repr(changed) == repr(net)
    one, other = (of.merge_and_unload().state_dict() for of in (changed, plain(net)))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[name], other[name]) for name in one)
    again = ours(net)
    lean.use(again, False)
    assert [type(layer) for layer in again.modules()] == [type(layer) for layer in net.modules()]


def test_without_autocast_layers_are_transformers_and_pefts():
    """Whose norms compute in fp32, also here."""
    net = llm(dropout=0.2)
    assert not tiny.difference(step(ours(net)), step(net), 1e-12)
