"""Every lever without which a step is timed: it changes what a step costs, and not what it learns."""

import json
import shutil

import pytest
import torch

from tinyspeed import DualSpeed, cli
from tinyspeed.bench import harness, levers
from tinyspeed.bench.random_examples import RandomExamples
from tinyspeed.bench.step import PLANS, random_model
from tinyspeed.data.examples import collate
from tinyspeed.training.loop import StageRun, Totals
from tinyspeed.util import malloc

CPU = torch.device("cpu")
ALL = levers.CHANGES | levers.COMPILED


def learned(run, plan, ready=lambda: None):
    """The loss and all gradients of a step's forward and backward."""
    batches = [collate([run.source.example(i) for i in part], run.pad) for part, _ in run._parts(0, plan)]
    ready()
    done = run._forward_backward(0, plan, iter(batches))
    gradients = {name: p.grad.clone() for p, name in run.names.items() if p.grad is not None}
    run.optimizer.zero_grad(set_to_none=True)
    return float(done["loss"]), gradients, len(batches)


@pytest.fixture
def run(dwarf, request):
    family, tune, budget = request.param
    picture = {"1.5": 16, "next": 40}[family]
    samples = [(30, [picture], 9), (12, [], 5), (70, [picture], 20)]
    recipe, model = random_model("dwarf", family, tune, len(samples), budget, CPU)
    return StageRun(recipe, model, RandomExamples(model.config, samples), "train", 0, recipe.train, Totals())


@pytest.mark.parametrize("mode", PLANS)
@pytest.mark.parametrize("change", levers.CHANGES)
@pytest.mark.parametrize("run", [("1.5", "lora", 0), ("next", "full", 150)], indirect=True)
def test_without_it_loss_and_gradients_are_the_same(run, change, mode):
    assert_the_same(run, change, mode)


@pytest.mark.skipif(shutil.which("c++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.parametrize("run", [("1.5", "lora", 0)], indirect=True)
def test_compiled_layers_compute_the_same(run):
    assert_the_same(run, *levers.COMPILED, "fast")
    assert not any(layer._compiled_call_impl for layer in run.model.vlm.language_model.layers)


def assert_the_same(run, change, mode):
    loss, gradients, _ = learned(run, PLANS[mode])
    with ALL[change](run):
        same, others, _ = learned(run, PLANS[mode])
    assert same == pytest.approx(loss, rel=1e-5)
    assert gradients.keys() == others.keys() != set()
    for name, gradient in gradients.items():
        near = 2e-5 * float(gradient.abs().max())
        torch.testing.assert_close(
            others[name], gradient, rtol=1e-4, atol=near, msg=lambda m, name=name: f"{name}: {m}"
        )


@pytest.mark.parametrize("run", [("1.5", "lora", 240)], indirect=True)
def test_each_change_does_what_it_says(run, monkeypatch):
    """And is over afterwards."""
    model, llm = run.model, run.model.vlm.language_model
    seen = {}

    def watch(module, args, given):
        seen.update(recomputed=llm.layers[0].gradient_checkpointing, packed=given["rows"].cu_seqlens is not None)

    def step():
        _, _, seen["parts"] = learned(run, PLANS["fast"], lambda: seen.update(towers=0, embedded=0, graphs=0))
        return dict(seen)

    def projected(module, args, out):
        seen["graphs"] += len(out.flatten(0, -2)) * out.requires_grad

    llm.layers[0].register_forward_pre_hook(watch, with_kwargs=True)
    model.vlm.tower.register_forward_hook(lambda *_: seen.update(towers=seen["towers"] + 1))
    model.vlm.projector.register_forward_hook(projected)
    model.vlm.model.get_input_embeddings().register_forward_hook(
        lambda module, args, out: seen.update(embedded=seen["embedded"] + args[0].numel())
    )
    default = step()
    assert default["packed"]
    assert not default["recomputed"]
    found = {}
    for name, change in levers.CHANGES.items():
        with change(run):
            found[name] = step()
        assert step() == default, f"{name} is still there"
    assert found["every activation recomputed"]["recomputed"]
    assert not found["padded, not packed"]["packed"]
    assert found["micro-batches by samples, not rows"]["parts"] > default["parts"]
    assert found["all features projected with a graph"]["graphs"] > default["graphs"] > 0
    assert found["every id embedded"]["embedded"] > default["embedded"]
    assert found["features from disk"]["towers"] == 0 < default["towers"]
    groups = run.optimizer.param_groups
    before = {name: p.detach().clone() for p, name in run.names.items()}
    ends = []
    for pieces in (False, True):
        with levers.CHANGES["AdamW in pieces" if pieces else "as it is"](run), torch.no_grad():
            for p, name in run.names.items():
                p.copy_(before[name]).grad = torch.full_like(p, 0.5)
                for moment in run.optimizer.state[p].values():
                    moment.zero_()
            run.optimizer.step()
        ends.append({name: p.detach().clone() for p, name in run.names.items()})
    run.optimizer.zero_grad(set_to_none=True)
    for name, p in ends[0].items():
        torch.testing.assert_close(ends[1][name], p, msg=name)
        assert not torch.equal(p, before[name])
    with levers.CHANGES["AdamW in pieces"](run):
        assert not any(group["fused"] for group in groups)
    assert all(group["fused"] for group in groups)
    told = []
    monkeypatch.setattr(malloc, "keep_freed_memory", lambda on=True: told.append(on))
    with levers.CHANGES["memory given back"](run):
        assert told == [False]
    assert told == [False, True]


def test_the_table_has_every_change(dwarf, tmp_path, capsys):
    out = tmp_path / "levers.json"
    argv = ["--size", "dwarf", "--batch", "3", "--repeats", "1", "--out", str(out), "--png", str(tmp_path / "it.png")]
    assert cli.main(["bench", "levers", *argv]) == 0
    assert (tmp_path / "it.png").stat().st_size > 5000
    said, result = capsys.readouterr().out, json.loads(out.read_text())
    assert list(result["steps"]) == ["fast", "slow"]
    for found in result["steps"].values():
        assert list(found) == list(levers.CHANGES)
        assert all(f["loss"] == pytest.approx(found["as it is"]["loss"], rel=1e-4) for f in found.values())
        assert all(f["median_ms"] > 0 and f["peak_bytes"] > 0 for f in found.values())
        assert found["as it is"]["promised"] == 1
        assert found["every activation recomputed"]["promised"] > 1 > found["features from disk"]["promised"]
        assert found["padded, not packed"]["promised"] > 1
    assert all(name in said for name in levers.CHANGES)


def test_a_change_that_does_not_fit_is_left_out(dwarf, monkeypatch):
    original = DualSpeed.forward

    def small(model, *given, plan=None, **batch):
        if model.layout == "padded" and plan.mode == "slow":
            raise torch.OutOfMemoryError
        return original(model, *given, plan=plan, **batch)

    monkeypatch.setattr(DualSpeed, "forward", small)
    result = harness.run(levers, size="dwarf", batch=2, repeats=1)
    fast, slow = result["steps"].values()
    assert list(fast) == list(levers.CHANGES)
    assert [*slow] == [name for name in levers.CHANGES if name != "padded, not packed"]
    line = next(line for line in levers.describe(result).splitlines() if "padded" in line)
    assert [cell.strip() for cell in line.split("|")[-5:-1]] == ["-"] * 4
