"""Records a second are those of the real pipeline: every record is decoded, by each number of workers, and counted."""

import json
from pathlib import Path

import pytest
from PIL import Image
from support.album import album

from tinyspeed import UserError, cli
from tinyspeed.bench import data, estimate, harness
from tinyspeed.data import llava_mix
from tinyspeed.models import published
from tinyspeed.models.memory import Settings, Shape


@pytest.mark.parametrize(("family", "rows"), [("1.5", 576), ("next", 2340)])
def test_an_album_is_what_such_a_model_reads(tmp_path, family, rows):
    config = published.config_of("7b", family)
    source = data.album(tmp_path, config, family)
    assert len(source) == data.PICTURES
    text, visual, answers = source.lengths(3)
    example = source.example(3)
    assert visual == [rows]
    assert len(example.input_ids) == text + rows
    assert answers > 30
    assert example.visual["pixel_values"].shape[-2:] == (336, 336)
    file = next(Path(tmp_path).glob("*.jpg"))
    assert Image.open(file).size == (640, 480)
    assert 50_000 < file.stat().st_size < 300_000, "as a photo of that size"


def test_what_is_written_follows_from_what_was_timed(tmp_path, capsys, monkeypatch):
    decoded = []
    original = data.conversations.Conversations.example
    monkeypatch.setattr(data, "PICTURES", 6)
    monkeypatch.setattr(
        data.conversations.Conversations, "example", lambda self, i: decoded.append(i) or original(self, i)
    )
    out = tmp_path / "data.json"
    argv = ["bench", "data", "--samples", "16", "--workers", "0", "--workers", "1", "--repeats", "1", "--out", str(out)]
    argv += ["--png", str(tmp_path / "data.png")]
    assert cli.main(argv) == 0
    result, said = json.loads(out.read_text()), capsys.readouterr().out
    assert list(result["records_per_second"]) == ["0", "1"]
    assert all(0 < f["median"] <= f["max"] for f in result["records_per_second"].values())
    assert len(decoded) == 16 + 8, "those that are counted, and a batch before; workers decode elsewhere"
    shape, s = Shape(published.config_of("7b", "1.5")), Settings("bf16", rank=64)
    assert result["data"] in said
    mix = llava_mix.mix(1024, 0)
    fast, slow = (sum(estimate.flops(shape, s, mode, sample, False) for sample in mix) for mode in ("fast", "slow"))
    assert result["wanted"]["20.0"] == pytest.approx(1024 * 20e12 / (0.98 * fast + 0.02 * slow))


def test_a_recipes_own_records(tmp_path, capsys, checkpoint):
    file = album(tmp_path, 12)
    made = tmp_path / "r.toml"
    data = f'kind = "chat"\nfile = "{file}"\nimages = "{tmp_path}/images"'
    made.write_text(f'[model]\npath = "{checkpoint("llava")}"\n[data]\n{data}\n[train]\nsteps = 1\n')
    assert cli.main(["bench", "data", str(made), "--samples", "8", "--workers", "0", "--repeats", "1"]) == 0
    assert file in capsys.readouterr().out


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ({"samples": 1}, "at least 8"),
        ({"repeats": 0}, "at least"),
        ({"workers": (-1,)}, "workers = "),
        ({"family": "1.7"}, "unknown family"),
    ],
)
def test_mistakes_are_named(how, says):
    with pytest.raises(UserError, match=says):
        harness.run(data, **how)


def test_digits_are_no_conversations(capsys):
    assert cli.main(["bench", "data", "digits"]) == 2
    assert "must be conversations" in capsys.readouterr().err
