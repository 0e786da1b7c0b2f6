"""Checkpoints are whole or not there."""

import json
import os
import zlib

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tinyspeed import UserError
from tinyspeed.models import manifest
from tinyspeed.recipe import StageSection
from tinyspeed.training import checkpoint
from tinyspeed.training.optimizer import make_optimizer
from tinyspeed.util import files


def tensors():
    return {"a": torch.arange(6.0).view(2, 3), "b/c": torch.linspace(0, 1, 40), "rng": torch.arange(99).byte()}


def test_what_is_saved_is_loaded(tmp_path):
    saved = tensors()
    path = checkpoint.save(tmp_path, 7, saved, {"x": [1, 2]}, keep=2)
    loaded, state = checkpoint.read(path)
    assert state["x"] == [1, 2]
    assert state["step"] == 7
    assert loaded.keys() == saved.keys()
    assert all(torch.equal(loaded[k], saved[k]) for k in saved)


def test_only_the_newest_are_kept_and_the_newest_is_by_number(tmp_path):
    for step in (9, 10, 100):
        checkpoint.save(tmp_path, step, tensors(), {}, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000010", "step-00000100"]
    assert checkpoint.newest(tmp_path).name == "step-00000100"


def test_a_half_written_one_is_listed_and_never_the_newest(tmp_path):
    checkpoint.save(tmp_path, 5, tensors(), {}, keep=2)
    half = tmp_path / ".tmp-step-00000006"
    half.mkdir()
    (half / checkpoint.TENSORS).write_bytes(b"half")
    assert checkpoint.newest(tmp_path).name == "step-00000005"
    assert checkpoint.unfinished(tmp_path) == [half]
    checkpoint.save(tmp_path, 6, tensors(), {}, keep=2)  # and it is no obstacle to the next attempt
    assert checkpoint.newest(tmp_path).name == "step-00000006"


def test_saving_fails_before_the_rename_leaves_the_old_one(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, 5, tensors(), {}, keep=1)
    monkeypatch.setattr(files, "flush", lambda _: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        checkpoint.save(tmp_path, 6, tensors(), {}, keep=1)
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000005"]
    checkpoint.read(checkpoint.newest(tmp_path))


def test_a_changed_state_is_noticed(tmp_path):
    path = checkpoint.save(tmp_path, 1, tensors(), {"stage_step": 400}, keep=1)
    text = (path / checkpoint.STATE).read_text()
    (path / checkpoint.STATE).write_text(text.replace("400", "600"))
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read(path)


def forge(path, change):
    """Another state, with the right checksum."""
    state = json.loads((path / checkpoint.STATE).read_text())["state"]
    change(state)
    crc = zlib.crc32(json.dumps(state, sort_keys=True).encode())
    (path / checkpoint.STATE).write_text(json.dumps({"state": state, "crc32": crc}))


def test_a_step_under_another_ones_name_is_noticed(tmp_path):
    path = checkpoint.save(tmp_path, 5, tensors(), {}, keep=1)
    with pytest.raises(UserError, match="it is the checkpoint of step 5"):
        checkpoint.read(path.rename(tmp_path / "step-00000099"))


@pytest.mark.parametrize(
    "name", ["../step-00000001/tensors.safetensors", "/etc/passwd", "state.json", "", "a/b", "a\0"]
)
def test_no_file_outside_of_a_checkpoint_is_read(tmp_path, name):
    path = checkpoint.save(tmp_path, 1, tensors(), {}, keep=1)
    forge(path, lambda state: state["files"].update({name: state["files"][checkpoint.TENSORS]}))
    with pytest.raises(UserError, match="is not the name of a checkpoint's file"):
        checkpoint.read(path)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
@pytest.mark.parametrize("name", [checkpoint.TENSORS, checkpoint.STATE])
def test_a_pipe_is_not_waited_for(tmp_path, name):
    path = checkpoint.save(tmp_path, 1, tensors(), {}, keep=1)
    (path / name).unlink()
    os.mkfifo(path / name)
    with pytest.raises(UserError, match="not a file"):
        checkpoint.read(path)


@pytest.mark.parametrize(("first", "of"), [(2, 6), (4, 7), (0, 3), (-1, 6), (3, 5)])
def test_rows_that_are_there_twice_or_not_at_all_are_noticed(tmp_path, first, of):
    temporary, whole, files = checkpoint.begin(tmp_path, 5), torch.arange(6.0), {}
    for number, (part, rows) in enumerate([(whole[:3], (0, 6)), (whole[3:], (first, of))]):
        files |= checkpoint.write(temporary, {"a": part}, {"a": rows}, f"-{number}")
    with pytest.raises(UserError, match="rows"):
        checkpoint.read(checkpoint.finish(temporary, {}, files, 1))


def test_a_built_base_that_was_changed_is_noticed(tmp_path):
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "a.bin").write_bytes(b"abc")
    manifest.write(folder, "label.json", {"seed": 1})
    manifest.verify(folder, "label.json", {"seed": 1})
    with pytest.raises(UserError, match="was not built with"):
        manifest.verify(folder, "label.json", {"seed": 2})
    (folder / "a.bin").write_bytes(b"abd")
    with pytest.raises(UserError, match=r"a\.bin is not what was written"):
        manifest.verify(folder, "label.json", {"seed": 1})
    (folder / "label.json").write_text("[]")
    with pytest.raises(UserError, match="damaged"):
        manifest.verify(folder, "label.json", {"seed": 1})


def test_a_users_copies_are_neither_used_nor_deleted(tmp_path):
    checkpoint.save(tmp_path, 5, tensors(), {}, keep=1)
    (tmp_path / "step-00000005").rename(tmp_path / "step-00000005.bak")
    for step in (6, 7):
        checkpoint.save(tmp_path, step, tensors(), {}, keep=1)
    assert checkpoint.newest(tmp_path).name == "step-00000007"
    assert (tmp_path / "step-00000005.bak" / checkpoint.TENSORS).exists()


def test_a_run_belongs_to_one_process_at_a_time(tmp_path):
    with (
        checkpoint.only_one(tmp_path),
        pytest.raises(UserError, match="another process"),
        checkpoint.only_one(tmp_path),
    ):
        pass
    with checkpoint.only_one(tmp_path):
        assert (tmp_path / ".lock").exists()


@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
def test_any_flipped_bit_of_the_tensors_is_noticed(tmp_path_factory, at, bit):
    path = checkpoint.save(tmp_path_factory.mktemp("damage"), 1, tensors(), {}, keep=1)
    content = bytearray((path / checkpoint.TENSORS).read_bytes())
    content[int(at * len(content))] ^= 1 << bit
    (path / checkpoint.TENSORS).write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        checkpoint.read(path)


@given(at=st.floats(0, 1, exclude_max=True), name=st.sampled_from([checkpoint.TENSORS, checkpoint.STATE]))
def test_a_file_cut_short_or_gone_is_noticed(tmp_path_factory, at, name):
    path = checkpoint.save(tmp_path_factory.mktemp("short"), 1, tensors(), {}, keep=1)
    content = (path / name).read_bytes()
    (path / name).write_bytes(content[: int(at * len(content))])
    with pytest.raises(UserError, match=path.name):
        checkpoint.read(path)
    (path / name).unlink()
    with pytest.raises(UserError, match=path.name):
        checkpoint.read(path)


@given(st.integers(1, 4), st.integers(1, 4), st.integers(1, 9), st.integers(0, 7))
def test_rows_written_by_many_are_read_by_as_many_as_one_likes(tmp_path_factory, writers, readers, rows, begin):
    """An oracle: the tensors as they were before they were cut."""
    split, alone = torch.arange(rows * 3.0).view(rows, 3), torch.tensor(4)
    temporary = checkpoint.begin(tmp_path_factory.mktemp("many"), 5)
    files, per = {}, -(-rows // writers)
    for number in range(writers):
        first = min(rows, number * per)
        mine = {"split": split[first : first + per]} if first < rows else {}
        mine |= {"alone": alone} if number == 0 else {f"own/{number}": torch.tensor([number])}
        files |= checkpoint.write(temporary, mine, {"split": (first, rows)}, f"-{number}")
    saved, state = checkpoint.read(checkpoint.finish(temporary, {"x": 1}, files, 1))
    assert state["x"] == 1
    assert set(saved) == {"split", "alone", *(f"own/{n}" for n in range(1, writers))}
    assert torch.equal(saved["split"], split)
    assert torch.equal(saved["alone"], alone)
    assert saved.shape("split") == (rows, 3)
    per = -(-rows // readers)
    for low in range(0, rows, per):
        assert torch.equal(saved.part("split", low, min(rows, low + per)), split[low : low + per])
    begin = min(begin, rows)
    assert saved.part("split", begin, begin).shape == (0, 3)


def test_moments_exist_from_step_zero_and_round_trip(tmp_path):
    layer = torch.nn.Linear(3, 2)
    names = {p: n for n, p in layer.named_parameters()}
    optimizer = make_optimizer(StageSection(), [layer.weight], [layer.bias])
    assert set(checkpoint.optimizer_tensors(optimizer, names)) == {
        f"optimizer/{key}/{name}" for key in ("step", "exp_avg", "exp_avg_sq") for name in ("weight", "bias")
    }
    layer(torch.randn(4, 3)).sum().backward()
    optimizer.step()
    tensors = checkpoint.optimizer_tensors(optimizer, names)
    saved, _ = checkpoint.read(checkpoint.save(tmp_path, 1, tensors, {}, 1))
    other = make_optimizer(StageSection(), [layer.weight], [layer.bias])
    checkpoint.load_optimizer(other, names, saved)
    again = checkpoint.optimizer_tensors(other, names)
    assert all(torch.equal(again[k], saved[k]) for k in saved)
    with pytest.raises(UserError, match="another model or recipe"):
        checkpoint.load_optimizer(other, {p: f"other.{n}" for p, n in names.items()}, saved)


def test_zero_moments_start_like_no_moments():
    a, b = torch.nn.Linear(5, 5), torch.nn.Linear(5, 5)
    b.load_state_dict(a.state_dict())
    plain = torch.optim.AdamW(a.parameters(), lr=StageSection().lr, weight_decay=0.1, fused=True)
    started = make_optimizer(StageSection(weight_decay=0.1), [b.weight], [b.bias])
    x = torch.randn(8, 5)
    for model, optimizer in ((a, plain), (b, started)):
        for _ in range(3):
            model(x).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("inf"), -float("inf")])
def test_what_is_not_finite_is_not_saved_and_the_older_one_stays(tmp_path, poison):
    checkpoint.save(tmp_path, 5, tensors(), {}, keep=1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    bad = tensors()
    bad["a"][1, 2] = poison
    for given_tensors, state, said in (
        (bad, {}, rf"step 6 was not written: a \(1 of 6 numbers, {poison}\)"),
        (tensors(), {"schedule": {"sums": [0.0, poison]}}, rf"schedule\.sums\.1 is {poison}"),
    ):
        with pytest.raises(UserError, match=said):
            checkpoint.save(tmp_path, 6, given_tensors, state, keep=1)
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_what_an_older_version_saved_is_read_only_if_it_is_finite(tmp_path):
    bad = {**tensors(), "scalar": torch.tensor(float("inf"))}
    bad["a"][0, 1] = float("nan")
    temporary = checkpoint.begin(tmp_path, 1)
    saved, _ = checkpoint.read(checkpoint.finish(temporary, {}, checkpoint.write(temporary, bad), keep=2))
    assert torch.equal(saved["b/c"], bad["b/c"])
    assert torch.equal(saved.part("a", 1, 2), bad["a"][1:])
    for name in ("a", "scalar"):
        with pytest.raises(UserError, match=rf"step-00000001 is not finite: {name} .*delete the folder"):
            saved[name]
    temporary = checkpoint.begin(tmp_path, 2)
    path = checkpoint.finish(temporary, {"sums": [float("nan")]}, checkpoint.write(temporary, tensors()), keep=2)
    with pytest.raises(UserError, match=r"step-00000002 is damaged .*NaN.*delete the folder"):
        checkpoint.read(path)
