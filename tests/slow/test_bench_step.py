"""The benchmark of a step: contestants that compute the same, numbers that follow from each other, and bytes counted
against bytes that are known."""

import json
import statistics

import pytest
import torch
from PIL import Image
from transformers import LlavaForConditionalGeneration

from tinyspeed import UserError, cli
from tinyspeed.bench import estimate, harness, peak_memory, step
from tinyspeed.models import published
from tinyspeed.models.memory import Settings, Shape

CPU = torch.device("cpu")


@pytest.mark.parametrize(("family", "tune"), [("1.5", "lora"), ("next", "full")])
def test_all_contestants_learn_the_same_from_the_same(dwarf, tmp_path, capsys, family, tune):
    out, png = tmp_path / "step.json", tmp_path / "step.png"
    texts = ("12", "mix")
    argv = ["--size", "dwarf", "--family", family, "--tune", tune, "--batch", "3", "--micro", "2", "--repeats", "1"]
    argv += ["--text", "12", "--text", "mix", "--out", str(out), "--png", str(png)]
    assert cli.main(["bench", "step", *argv]) == 0
    result, said = json.loads(out.read_text()), capsys.readouterr().out
    assert (result["bench"], result["batch"], result["micro"]) == ("step", 3, 2)
    assert list(result["texts"]) == list(texts)
    assert Image.open(png).size[0] > 400
    shape, s = Shape(published.config_of("dwarf", family)), Settings(rank=result["rank"])
    for found in result["texts"].values():
        every, samples = found["contestants"], found["samples"]
        losses = {name: f["loss"] for name, f in every.items() if name not in ("fast", "slow", *step.MIXES)}
        assert {"hf", "hf, nothing recomputed", "full"} <= losses.keys()
        assert all(loss == pytest.approx(losses["hf"], rel=1e-4) for loss in losses.values()), losses
        assert every["fast"]["loss"] != pytest.approx(losses["hf"], rel=1e-4)
        for name, f in every.items():
            assert f["median_ms"] == pytest.approx(statistics.median(f["ms"]))
            assert f["mfu"] == pytest.approx(f["floor_ms"] / f["median_ms"])
            assert f["ms_a_sample"] == pytest.approx(f["median_ms"] / 3)
            assert name in said
        whole = sum(estimate.flops(shape, s, "full", sample, False) for sample in samples)
        medians = [a / b for a, b in zip(every["hf"]["ms"], every["fast"]["ms"], strict=True)]
        assert every["fast"]["speedup"] == pytest.approx(statistics.median(medians))
        assert every["hf"]["floor_ms"] == every["full"]["floor_ms"]
        assert every["full"]["floor_ms"] == pytest.approx(whole / found["tflops"] / 1e9)
        assert every["fast"]["rows"] < every["full"]["rows"] == sum(text + sum(images) for text, images, _ in samples)
        for name, r in step.MIXES.items():
            mixed = (1 - r) * every["fast"]["median_ms"] + r * every["slow"]["median_ms"]
            assert every[name]["median_ms"] == pytest.approx(mixed)
            assert every[name]["peak_bytes"] == max(every["fast"]["peak_bytes"], every["slow"]["peak_bytes"])
        assert every["fast"]["peak_bytes"] < every["full"]["peak_bytes"]
    assert [text for text, _, _ in result["texts"]["12"]["samples"]] == [12] * 3


def test_ours_recompute_as_rivals_do_if_they_are_told_to(dwarf):
    found = [
        harness.run(step, size="dwarf", texts=("60",), batch=2, repeats=1, checkpointing=how)["texts"]["60"][
            "contestants"
        ]
        for how in ("on", "off")
    ]
    assert [f["full"]["loss"] for f in found] == [pytest.approx(found[0]["hf"]["loss"], rel=1e-4)] * 2
    on, off = (f["full"]["peak_bytes"] for f in found)
    assert on < off
    assert found[0]["hf"]["peak_bytes"] == found[1]["hf"]["peak_bytes"]


def test_a_contestant_that_does_not_fit_is_left_out(dwarf, monkeypatch):
    """Ours, whose loop makes advice of it, and rivals."""
    original = step.DualSpeed.forward

    def small(model, *given, plan=None, **batch):
        if plan.mode == "slow":
            raise torch.OutOfMemoryError
        return original(model, *given, plan=plan, **batch)

    def smaller(model, *given, **batch):
        raise torch.OutOfMemoryError

    monkeypatch.setattr(step.DualSpeed, "forward", small)
    monkeypatch.setattr(LlavaForConditionalGeneration, "forward", smaller)
    found = harness.run(step, size="dwarf", texts=("12",), batch=1, repeats=1)["texts"]["12"]["contestants"]
    assert {"full", "fast"} < found.keys()
    assert not {"hf", "hf, nothing recomputed", "slow", *step.MIXES} & found.keys()
    assert found["fast"]["speedup"] is None


def test_trl_is_a_rival_where_it_is_installed(dwarf):
    pytest.importorskip("trl", reason="TRL is not installed")
    found = harness.run(step, size="dwarf", texts=("12",), batch=2, repeats=1)["texts"]["12"]["contestants"]
    assert found["trl"]["loss"] == pytest.approx(found["hf"]["loss"], rel=1e-4)


def test_four_bits_come_from_disk(dwarf):
    pytest.importorskip("bitsandbytes", reason="bitsandbytes is not installed")
    found = harness.run(step, size="dwarf", tune="qlora", texts=("12",), batch=1, repeats=1)
    assert found["texts"]["12"]["contestants"]["fast"]["loss"] > 0
    _, model = step.random_model("dwarf", "1.5", "qlora", 1, 0, CPU)
    assert type(model.vlm.language_model.layers[0].mlp.up_proj.base_layer).__name__ == "Linear4bit"


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"size": "7c"}, "did you mean '7b'"),
        ({"family": "1.6"}, "unknown family"),
        ({"tune": "lorra"}, "did you mean 'lora'"),
        ({"texts": ("many",)}, "a number of words"),
        ({"texts": ("1",)}, "at least 2"),
        ({"batch": 0}, "at least 1"),
        ({"device": "cuda:99"}, "cannot be used here"),
        ({"repeats": 0}, "at least once"),
    ],
)
def test_mistakes_are_named(dwarf, how, says):
    with pytest.raises(UserError, match=says):
        harness.run(step, **{"size": "dwarf", "texts": ("12",), "batch": 1, "repeats": 1, **how})


# What is counted


def test_the_peak_is_of_what_is_alive_at_once():
    known = torch.zeros(1000)

    def three():
        a = torch.ones(250) + 1  # two of 1,000 bytes for a moment
        del a
        b = known * 2  # 4,000
        c = b + 1  # and 4,000 beside them
        return c[:10], known.add_(1)  # views and known storages are nothing new

    assert peak_memory.peak_bytes(three, CPU, {known.untyped_storage().data_ptr(): 4000}) == 8000


def test_storages_are_counted_once_and_gradients_too():
    net = torch.nn.Linear(10, 10, bias=False)
    net.again = net.weight
    assert sum(peak_memory.storages(net).values()) == 400
    net(torch.ones(10)).sum().backward()
    assert sum(peak_memory.storages(net, [torch.zeros(5)]).values()) == 820
