"""The benchmark of steps: what it counts follows from the plans, and what it writes is what it says."""

import json
import statistics
from dataclasses import replace

import pytest
import torch

from tinyspeed import UserError, cli
from tinyspeed.bench import harness, savings

SKIPPED = ("full", "1/2 of the layers", "fast, with weights")


def test_every_plan_is_timed_and_layers_cost_the_same_each(tmp_path, capsys):
    out = tmp_path / "steps.json"
    result = harness.run(savings, layers=4, width=16, repeats=2, out=out, png=out.with_suffix(".png"))
    assert out.with_suffix(".png").stat().st_size > 5000
    assert json.loads(out.read_text()) == result
    found = result["plans"]
    assert list(found) == list(savings.plans(4))
    full = found["full"]["flops"]
    of_layers = {name: full - found[name]["flops"] for name in ("3/4 of the layers", "1/2 of the layers")}
    assert of_layers["1/2 of the layers"] == 2 * of_layers["3/4 of the layers"] > 0
    assert all(f["flops"] < full for name, f in found.items() if name != "full")
    for f in found.values():
        rounds = [whole / own for whole, own in zip(found["full"]["ms"], f["ms"], strict=True)]
        assert f["speedup"] == pytest.approx(statistics.median(rounds))
        assert f["promised"] == pytest.approx(full / f["flops"])
        if f["kept"] is not None:
            assert f["kept"] == pytest.approx((1 - 1 / f["speedup"]) / (1 - 1 / f["promised"]))
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert len(lines) == 2 + len(found)


def test_attention_is_counted_on_a_cpu_too(monkeypatch):
    """Forward, recomputed or not, and backward: nothing but the two products of a query with all keys, and twice and a
    half of that; without it, a step of many rows promises too little."""
    q, k, v = (torch.randn(2, 3, 50, 8, requires_grad=True) for _ in range(3))
    with savings.FlopCounterMode(display=False, custom_mapping=savings.ON_A_CPU) as counter:
        out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        assert counter.get_total_flops() == 2 * 2 * (2 * 3) * 50**2 * 8
        out.sum().backward()
    assert counter.get_total_flops() == 3.5 * 2 * 2 * (2 * 3) * 50**2 * 8
    with_attention = harness.run(savings, layers=4, width=16, repeats=1)["plans"]
    monkeypatch.setattr(savings, "ON_A_CPU", {})
    without = harness.run(savings, layers=4, width=16, repeats=1)["plans"]
    for name in ("fast: 10 % of the picture", "1/2 of the answers"):
        assert with_attention[name]["promised"] > without[name]["promised"]


def test_together_the_systems_promise_more_than_each_alone():
    found = harness.run(savings, layers=4, width=16, repeats=1)["plans"]
    fast, layers, answers, *two, three = (f["promised"] for name, f in found.items() if name not in SKIPPED)
    assert min(two) > max(fast, layers, answers)
    assert three > max(two)


def test_weights_are_measured_beside_the_same_step():
    """They choose no other tokens, and cost the products with those that stay."""
    fast, weighted = (savings.plans(4)[name] for name in ("fast: 10 % of the picture", "fast, with weights"))
    assert replace(weighted, weigh=False) == fast != weighted
    found = harness.run(savings, layers=4, width=16, repeats=1)["plans"]
    more = found["fast, with weights"]["flops"] - found["fast: 10 % of the picture"]["flops"]
    assert more == savings.SAMPLES * 2 * 144 * 14 * 16


@pytest.mark.parametrize("how", [{"layers": 3}, {"width": 12}, {"device": "nowhere"}], ids=str)
def test_sizes_that_make_no_model_are_refused(how):
    with pytest.raises(UserError):
        harness.run(savings, **how)


def test_the_command_line_reaches_it(capsys):
    assert cli.main(["bench", "savings", "--layers", "2"]) == 2
    assert "at least 4" in capsys.readouterr().err
