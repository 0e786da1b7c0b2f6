"""The memory formulas: against parameters of published models on the meta device and real moments, and their laws. Real
steps are in tests/slow/test_memory_of_steps.py."""

import functools
import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from support.memory_models import SETTINGS
from support.published_models import REAL
from transformers import AutoModelForImageTextToText

from tinyspeed import DualSpeed, pruning, recipe
from tinyspeed.bench.peak_memory import LiveStorages
from tinyspeed.models import lora, memory, stages
from tinyspeed.models.memory import MicroBatch, Settings, Shape, Step
from tinyspeed.models.published import GRIDS, clip
from tinyspeed.recipe import StageSection
from tinyspeed.training import optimizer


@pytest.mark.parametrize("name", REAL)
def test_parameters_of_real_models_are_exact(name):
    config = REAL[name]()
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(config)
    assert sum(Shape(config).parameters.values()) == sum(p.numel() for p in model.parameters())


@functools.lru_cache(maxsize=1)  # the two stages of a model follow each other
def on_meta(name, rank, views, plugin):
    with torch.device("meta"):
        net = AutoModelForImageTextToText.from_config(REAL[name](), dtype=torch.bfloat16)
    net = lora.add_lora(net, rank=rank, views=views == 2) if rank else net
    return DualSpeed(net, plugin=plugin, views=views == 2)


@pytest.mark.parametrize("stage", ["align", "train"])
@pytest.mark.parametrize(
    ("name", "rank", "views", "plugin"),
    [
        ("1.5-7b", 0, 1, "divprune"),
        ("next-7b", 0, 1, "tokenlearner"),
        ("next-mistral", 16, 1, "divprune"),
        ("onevision", 0, 1, "divprune"),
        ("1.5-7b", 16, 2, "dynamicvit"),
    ],
)
def test_what_trains_and_what_it_weighs_is_exact(name, rank, views, plugin, stage):
    config, model = REAL[name](), on_meta(name, rank, views, plugin)
    stages.set_trainable(model.model, stage)
    sizes = {name: p.numel() for name, p in model.named_parameters() if p.requires_grad}
    found = memory.fixed(Shape(config), Settings(rank=rank, stage=stage, views=views, plugin=plugin))
    assert found.trainable == sum(sizes.values())
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.weights == sum(p.nbytes for p in model.parameters())
    moved = sum(size for name, size in sizes.items() if ".fast." not in name)  # by a step, which is of one mode
    assert (found.gradients, found.moments) == (4 * moved, 8 * sum(sizes.values()))


@pytest.mark.parametrize("keep", [0.1, 0.3, 0.9])
@pytest.mark.parametrize("name", pruning.names())
def test_what_plugins_hold_for_each_pair_of_rows(name, keep):
    """Measured, of images of different size. What else they hold grows with the rows, and not with the pairs: twice
    what half of the rows take has as much of it as all of them."""
    images, n, peaks = 2, 800, []
    for rows in (n, n // 2):
        features, valid = torch.randn(images, rows, 16), torch.ones(images, rows, dtype=torch.bool)
        valid[0, -rows // 10 :] = False
        signals = {"cls_attention": torch.rand(images, rows), "tower": torch.randn(images, rows, 16)}
        signals["keys"] = signals["tower"]
        with LiveStorages(
            {tensor.untyped_storage().data_ptr() for tensor in (features, valid, *signals.values())}
        ) as live:
            pruning.choose(name, features, keep=keep, mask=valid, signals=signals)
        peaks.append(live.peak)
    found = (peaks[0] - 2 * peaks[1]) / (images * (n**2 - 2 * (n // 2) ** 2))
    slack = 3.7 if name == "dpp" else 2.7  # its factor is as wide as what is kept; counted is the widest
    assert found - 0.1 <= pruning.entry(name).pair_bytes(keep) <= found + slack
    asked = recipe.read("digits", [f"dualspeed.plugin={name}"])
    assert Settings.of(asked, "train", "fp32").plugin == name


def test_a_plugin_with_a_second_matrix_needs_more_where_pictures_are_large():
    batch = MicroBatch.of("fast", 100, [2880], 60, Settings("bf16", "nf4", rank=8))
    shape = Shape(REAL["next-7b"]())
    first, second = (
        Step(shape, Settings("bf16", "nf4", rank=8, plugin=plugin), batch, True).phases["pruning"]
        for plugin in ("divprune", "divprune_centred")
    )
    assert second - first == 6 * 2880**2


@pytest.mark.parametrize("kind", ["adamw", "adamw8bit"])
def test_moments_are_as_large_as_the_optimizers(kind):
    tensors = [torch.zeros(n) for n in (10, 4095, 4096, 4097, 100_001)]
    built = optimizer.make_optimizer(StageSection(optimizer=kind), tensors, [])
    for tensor in tensors:
        state = built.state[tensor]
        real = sum(state[name].nbytes for name in state if name[:3] in ("exp", "sta", "abs"))  # and not step, tables
        assert memory._moments(tensor.numel(), kind) == real


def test_pages_of_large_moments_can_leave_the_gpu():
    assert memory._moments(100_000, "paged_adamw8bit") == memory._moments(100_000, "adamw8bit") - 200_000
    assert memory._moments(99_999, "paged_adamw8bit") == memory._moments(99_999, "adamw8bit")


# Laws. Configurations that memory.py cannot tell from real ones.
def sized(hidden, layers, family="llava"):
    text = SimpleNamespace(
        model_type="llama", hidden_size=128 * hidden, intermediate_size=344 * hidden, num_hidden_layers=layers,
        num_attention_heads=hidden, num_key_value_heads=hidden, vocab_size=32064,
    )  # fmt: skip
    grids = GRIDS if family == "llava_next" else None
    return SimpleNamespace(
        model_type=family, text_config=text, vision_config=clip(), vision_feature_layer=-2, tie_word_embeddings=False,
        image_grid_pinpoints=grids,
    )  # fmt: skip


hiddens, depths = st.integers(4, 40), st.integers(8, 48)
kinds = st.sampled_from(["llava", "llava_next"])
settings = st.builds(
    Settings,
    precision=st.sampled_from(["fp32", "bf16", "fp16"]),
    rank=st.sampled_from([0, 1, 8, 64]),
    dropout=st.sampled_from([0.0, 0.05]),
    stage=st.sampled_from(["align", "train"]),
)
modes = st.sampled_from(["full", "fast", "slow"])
texts, pictures = st.integers(20, 1500), st.lists(st.integers(576, 2928), max_size=3)


def total(config, s, mode, text, images, recompute=False, samples=1):
    shape = Shape(config)
    batch = MicroBatch.of(mode, text, images, min(text, 60), s, samples)
    return memory.fixed(shape, s).total + Step(shape, s, batch, recompute).peak


@given(hiddens, depths, kinds, settings, modes, texts, pictures, st.booleans(), st.integers(1, 4))
def test_more_of_anything_never_needs_less(hidden, layers, kind, s, mode, text, images, recompute, more):
    config = sized(hidden, layers, kind)
    least = total(config, s, mode, text, images, recompute)
    assert 0 < least <= total(config, s, mode, text + 50 * more, images, recompute)
    assert least <= total(config, s, mode, text, images + [576] * more, recompute)
    assert least <= total(config, s, mode, text, images, recompute, samples=1 + more)
    assert least <= total(sized(hidden, layers + more, kind), s, mode, text, images, recompute)
    assert least <= total(sized(hidden + more, layers, kind), s, mode, text, images, recompute)
    if s.rank:
        for grown in ({"rank": s.rank + more}, {"views": 2}):
            larger = Settings(**{**vars(s), **grown})
            assert least <= total(config, larger, mode, text, images, recompute)


@given(hiddens, depths, kinds, settings, modes, texts, pictures)
def test_recomputing_never_needs_more(hidden, layers, kind, s, mode, text, images):
    config = sized(hidden, layers, kind)
    on, off = (total(config, s, mode, text, images, recompute) for recompute in (True, False))
    assert on <= off


@given(hiddens, depths, kinds, settings, texts, pictures, st.booleans())
def test_fast_steps_never_need_more_than_slow_ones(hidden, layers, kind, s, text, images, recompute):
    config = sized(hidden, layers, kind)
    fast, slow = (total(config, s, mode, text, images, recompute) for mode in ("fast", "slow"))
    assert fast <= slow


@given(hiddens, depths, kinds, settings, modes, texts, pictures, st.booleans())
def test_four_bits_need_less_than_half_precision_and_that_less_than_fp32(
    hidden, layers, kind, s, mode, text, images, recompute
):
    assume(s.rank)
    config = sized(hidden, layers, kind)
    four, half, whole = (
        total(config, Settings(**{**vars(s), **change}), mode, text, images, recompute)
        for change in ({"precision": "bf16", "quantise": "nf4"}, {"precision": "bf16"}, {"precision": "fp32"})
    )
    assert four < half < whole


@given(hiddens, depths, kinds, settings, texts, pictures, st.integers(2, 80))
def test_rows_within_the_free_memory_need_no_recomputing(hidden, layers, kind, s, text, images, gib):
    shape, free = Shape(sized(hidden, layers, kind)), gib * memory.GIB
    most = memory.rows_within(free, shape, s)
    assert memory.rows_within(free + memory.GIB, shape, s) >= most
    for mode in ("fast", "slow"):
        batch = MicroBatch.of(mode, text, images, min(text, 60), s)
        needs = Step(shape, s, batch, recompute=False).peak + memory.fixed(shape, s).gradients
        assert needs <= free or batch.rows > most


@pytest.mark.parametrize(("name", "picture"), [("1.5-7b", 576), ("next-7b", 2928), ("1.5-13b", 576)])
@pytest.mark.parametrize("mode", ["fast", "slow"])
def test_rows_within_is_not_more_careful_than_it_has_to_be(name, picture, mode):
    s, shape, free = SETTINGS["4-bit LoRA dropout"], Shape(REAL[name]()), 40 * memory.GIB
    most = memory.rows_within(free, shape, s)
    samples = most // MicroBatch.of(mode, 100, [picture], 60, s).rows
    batch = MicroBatch.of(mode, 100, [picture], 60, s, samples)
    needs = Step(shape, s, batch, recompute=False).peak + memory.fixed(shape, s).gradients
    assert 0.8 * free < needs * most / batch.rows < (1 - memory.MARGIN) * free


def test_rows_that_fit_asks_the_device(monkeypatch):
    s, config = SETTINGS["4-bit LoRA"], sized(32, 32)
    assert memory.rows_that_fit(SimpleNamespace(device=torch.device("cpu"), config=config), s) == math.inf
    monkeypatch.setattr(memory.cuda, "mem_get_info", lambda device: (6 * memory.GIB, 12 * memory.GIB))
    monkeypatch.setattr(memory.cuda, "memory_reserved", lambda device: 5 * memory.GIB)
    monkeypatch.setattr(memory.cuda, "memory_allocated", lambda device: 3 * memory.GIB)
    monkeypatch.setattr(memory.cuda, "get_per_process_memory_fraction", lambda device: 1.0)
    found = memory.rows_that_fit(SimpleNamespace(device=torch.device("cuda"), config=config), s)
    assert 0 < found == memory.rows_within(8 * memory.GIB, Shape(config), s)
    monkeypatch.setattr(memory.cuda, "get_per_process_memory_fraction", lambda device: 0.75)  # 9 of 12 GiB
    capped = memory.rows_that_fit(SimpleNamespace(device=torch.device("cuda"), config=config), s)
    assert found > capped == memory.rows_within(6 * memory.GIB, Shape(config), s)
    assert memory.rows_within(-memory.GIB, Shape(config), s) == 0
