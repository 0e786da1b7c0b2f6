"""Steps that grow: what is timed is as long as it says, and a slope is that of a line that is known."""

import json
import re

import pytest
import torch
from PIL import Image

from tinyspeed import UserError, cli
from tinyspeed.bench import harness, scaling
from tinyspeed.models import published
from tinyspeed.models.published import clip, vicuna


@pytest.fixture
def dwarf(monkeypatch):
    small = clip(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2)
    monkeypatch.setitem(published.SIZES, "dwarf", (lambda: vicuna(32, 48, 2, 2, vocab_size=300), lambda: small))


def test_frames_are_what_the_llm_sees(dwarf, tmp_path, capsys, monkeypatch):
    seen = []
    original = scaling.DualSpeed.forward

    def look(self, **given):
        out = original(self, **given)
        seen.append((given["plan"].mode, out.metrics["rows_full"], out.metrics["rows_kept"]))
        return out

    monkeypatch.setattr(scaling.DualSpeed, "forward", look)
    out, png = tmp_path / "scaling.json", tmp_path / "scaling.png"
    result = harness.run(scaling, size="dwarf", frames=(1, 2), repeats=1, out=out, png=png)
    assert {s for s in seen if s[0] == "fast"} == {("fast", 144 + 64, 14 + 4 + 64), ("fast", 288 + 64, 28 + 4 + 64)}
    assert {s for s in seen if s[0] == "full"} == {("full", 208, 208), ("full", 352, 352)}
    assert [f["tokens"] for f in result["steps"]] == [144, 288]
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert Image.open(png).size[0] > 400
    assert re.search(r"\| +288 \|", capsys.readouterr().out)


@pytest.mark.parametrize("power", [0.5, 1.0, 2.0])
def test_the_slope_is_the_power(power):
    found = [{"tokens": n, "fast": {"median_ms": 3 * n**power}} for n in (144, 576, 11520)]
    assert scaling._slope(found, "fast") == pytest.approx(power)


def test_mistakes_are_named(capsys):
    with pytest.raises(UserError, match="at least two numbers"):
        harness.run(scaling, frames=(1,))
    with pytest.raises(UserError, match="unknown size 'large'"):
        harness.run(scaling, size="large")
    assert cli.main(["bench", "scaling", "--size", "large"]) == 2
    assert "unknown size" in capsys.readouterr().err


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu():
    assert harness.run(scaling, frames=(1, 4), repeats=1, device="cuda")["slopes"]["fast"] < 1.5
