"""The loss three ways: the same number, the same gradient, and less of everything."""

import json

import pytest

from tinyspeed import UserError, cli
from tinyspeed.bench import harness, loss


def test_every_way_gives_the_same_loss_and_gradient_and_ours_holds_less(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(loss, "ROWS", 300)
    monkeypatch.setattr(loss, "ANSWERS", 40)
    out = tmp_path / "loss.json"
    result = harness.run(loss, width=16, vocab=500, chunks=(8, 64), repeats=2, out=out, png=out.with_suffix(".png"))
    assert out.with_suffix(".png").stat().st_size > 5000
    assert json.loads(out.read_text()) == json.loads(json.dumps(result))
    assert list(result["kinds"]) == ["cross-entropy", "with a teacher"]
    values = []
    for found in result["kinds"].values():
        assert list(found) == ["every row", "answer rows", "answer rows, 8 at a time", "answer rows, 64 at a time"]
        for f in found.values():
            assert f["loss"] == pytest.approx(found["every row"]["loss"], rel=1e-5)
            assert f["gradient_off"] < 1e-5
        values.append(found["every row"]["loss"])
        memory = [f["peak_bytes"] for f in found.values()]
        assert memory[2] < memory[1] < memory[0] / 4
        # 300 rows of 500 fp32 logits, their gradients and log-probabilities
        assert 2 * 300 * 500 * 4 < memory[0] < 10 * 300 * 500 * 4
    assert values[1] > values[0], "the divergence comes on top"
    said = capsys.readouterr().out
    assert "300 rows, 40 of them answers" in said
    assert "answer rows, 8 at a time" in said


def test_mistakes_are_named(capsys):
    with pytest.raises(UserError, match="at least once"):
        harness.run(loss, width=4, vocab=8, repeats=0)
    assert cli.main(["bench", "loss", "--device", "cuda:99"]) == 2
    assert "cannot be used here" in capsys.readouterr().err
