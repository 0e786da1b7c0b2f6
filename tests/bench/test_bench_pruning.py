"""The benchmark's numbers are only as good as its contestants: what they compute, and how they take turns."""

import json

import pytest
import torch

from tinyspeed import UserError, pruning
from tinyspeed.bench import harness
from tinyspeed.bench import pruning as bench_pruning

CPU = torch.device("cpu")


def test_the_loops_keep_what_the_plugin_keeps():
    for seed in range(5):
        x = torch.randn(3, 50, 24, generator=torch.Generator().manual_seed(seed))
        want = pruning.select("divprune", x, count=12)
        assert torch.equal(bench_pruning.divprune_loop(x, 12), want)
        assert torch.equal(bench_pruning.divprune_loop(x, 12, mended=True), want)


def test_shared_is_the_share_of_rows_in_common():
    a = torch.tensor([[0, 1, 2, 3], [4, 5, 6, 7]])
    assert bench_pruning.shared(a, a) == 1
    assert bench_pruning.shared(a, torch.tensor([[3, 9, 10, 0], [8, 9, 10, 11]])) == 0.25


def test_bench_pruning_measures_every_plugin_and_writes_what_it_returns(tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(pruning.registry.PLUGINS, "mine", pruning.registry.PLUGINS["grid"])
    out = tmp_path / "deep" / "bench.json"
    result = harness.run(
        bench_pruning, images=2, rows=40, width=16, keep=0.2, repeats=3, out=out, png=out.with_suffix(".png")
    )
    assert out.with_suffix(".png").stat().st_size > 5000
    assert json.loads(out.read_text()) == result
    assert result["count"] == 8
    assert result["shape"] == [2, 40, 16]
    assert result["bench"] == "pruning"
    times = result["contestants"]
    assert set(times) == {
        bench_pruning.PRODUCT,
        bench_pruning.LOOP,
        bench_pruning.MENDED,
        bench_pruning.RATE,
        "mine",
        *pruning.names(),
    }
    for t in times.values():
        assert 0 < t["min_ms"] <= t["median_ms"]
        assert t["over_product"] == pytest.approx(t["median_ms"] / times[bench_pruning.PRODUCT]["median_ms"])
        assert t["speedup_over_loop"] == pytest.approx(times[bench_pruning.LOOP]["median_ms"] / t["median_ms"])
        assert t["of_fast_step"] == pytest.approx(t["median_ms"] / result["fast_step_ms"])
    # Without tower and LoRA: every kept row and word, four times the LLM's weights (forward, and back to its inputs).
    least = 2 * (8 + 100) * 4 * 6.4e9 / (2 * 256 * 4096**2) * times[bench_pruning.RATE]["median_ms"]
    assert least < result["fast_step_ms"] < 1.5 * least
    assert times[bench_pruning.PRODUCT]["over_product"] == times[bench_pruning.LOOP]["speedup_over_loop"] == 1
    assert result["same_rows"] == {bench_pruning.LOOP: 1.0, bench_pruning.MENDED: 1.0}
    printed = capsys.readouterr().out
    lines = [line for line in printed.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(times)
    assert len({len(line) for line in lines}) == 1
    assert "8 of 40 tokens" in printed
    assert "100.00%" in printed


def test_a_fast_step_does_more_where_more_is_kept_of_more_rows():
    few, half, wide = (bench_pruning.fast_step_flops(16, *how) for how in ((576, 0.1), (576, 0.5), (2880, 0.1)))
    weights = 16 * 4 * 6.4e9
    assert half - few == pytest.approx(weights * (288 - 57), rel=0.1)
    assert wide - few > weights * (288 - 57)


@pytest.mark.parametrize("name", [name for name in pruning.names() if pruning.entry(name).learned])
def test_a_learned_plugin_is_timed_with_its_backward(name):
    module = pruning.make(name, 16, 8)
    bench_pruning.learn(name, torch.randn(2, 40, 16), 0.2, module)
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in module.parameters())


def test_the_results_name_machine_versions_and_command(tmp_path):
    result = harness.run(bench_pruning, images=1, rows=8, width=4, repeats=1)
    assert result["processor"]
    assert result["device"] == result["processor"]
    assert result["threads"] == torch.get_num_threads()
    assert {"cores", "load", "commit", "command"} <= result.keys()
    assert {"python", "torch"} <= result["versions"].keys()


def test_contestants_take_turns_in_changing_order():
    calls = []
    times = harness.time_in_turns({name: lambda name=name: calls.append(name) for name in "abcd"}, 10, CPU)
    rounds = [calls[i : i + 4] for i in range(0, len(calls), 4)]
    assert len(rounds) == 12
    assert all(sorted(r) == list("abcd") for r in rounds)
    assert len({tuple(r) for r in rounds}) > 4
    assert set(times) == set("abcd")


def test_median_and_minimum_are_of_the_counted_repeats(monkeypatch):
    clock = iter([0, 0, 0, 1, 0, 7, 0, 3])  # two rounds of warm-up, which never stop the clock, then three
    monkeypatch.setattr(harness.time, "perf_counter", lambda: next(clock))
    times = harness.time_in_turns({"a": lambda: None}, 3, CPU)
    assert times == {"a": {"median_ms": 3000, "min_ms": 1000, "ms": [1000, 7000, 3000]}}
    twice = {"a": {**times["a"], "ms": [2000, 7000, 9000]}}
    assert harness.speedup(twice["a"], times["a"]) == 2


@pytest.mark.parametrize(
    ("match", "how"),
    [
        ("must be at least", {"width": 0}),
        ("must be at least", {"rows": 1}),
        ("must be at least", {"images": 0}),
        ("at least once", {"repeats": 0}),
        ("keep = 0", {"keep": 0}),
        ("cannot be used here", {"device": "toaster"}),
    ],
)
def test_mistakes_are_named(match, how):
    with pytest.raises(UserError, match=match):
        harness.run(bench_pruning, **{"images": 1, "rows": 10, "width": 8} | how)


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a GPU")
def test_an_absent_gpu_is_named():
    with pytest.raises(UserError, match="'cuda' cannot be used here"):
        harness.run(bench_pruning, images=1, rows=10, width=8, device="cuda")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bench_pruning_on_a_gpu():
    result = harness.run(bench_pruning, images=2, rows=64, width=32, repeats=2, device="cuda")
    assert result["same_rows"][bench_pruning.LOOP] > 0.9
    assert result["device"] != result["processor"]


def test_results_that_cannot_be_written_are_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write the results"):
        harness.run(bench_pruning, images=1, rows=8, width=4, repeats=1, out=tmp_path / "file" / "bench.json")
