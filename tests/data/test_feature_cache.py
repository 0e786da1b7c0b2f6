"""Features kept on disk are the tower's own, are found by content, stay within their size, and change no run."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from support import tiny
from support.runs import Killed, content_of

from tinyspeed import DualSpeed, UserError
from tinyspeed.data import feature_cache
from tinyspeed.data.conversations import Conversations
from tinyspeed.data.examples import collate
from tinyspeed.data.feature_cache import FeatureCache
from tinyspeed.models.families import family as adapter
from tinyspeed.recipe import DataSection
from tinyspeed.scheduler import Plan


def source(home, family):
    data = DataSection(kind="chat", file=str(home / "train.json"), images=str(home / "images"), workers=0, max_rows=512)
    return Conversations(data, tiny.processor(family), home / "cache", bar=False)


def kept(folder, made, net, most=1e9, precision="fp32"):
    store = FeatureCache(folder, adapter(net), made.processor.image_processor, precision)
    store.fill(made.pictures(), adapter(net), most, bar=False)
    return store


def files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def test_training_from_features_is_training_from_pictures(home, family, tmp_path):
    net, made = tiny.model(family), source(home, family)
    plain = collate([made.example(i) for i in range(10)], tiny.PAD)
    made.features = kept(tmp_path, made, net)
    stored = collate([made.example(i) for i in range(10)], tiny.PAD)
    assert "pixel_values" not in stored
    model = DualSpeed(net, keep=0.3).train()
    for plan in (Plan("full"), Plan("fast", keep=0.3), Plan("slow", keep=0.3, distill=1.0)):
        found = []
        for batch in (plain, stored):
            model.zero_grad(set_to_none=True)
            loss = model(**batch, plan=plan).loss
            loss.backward()
            found.append({"loss": loss, **tiny.gradients(model)})
        assert not tiny.difference(found[1], found[0])


def test_no_picture_is_decoded_and_no_tower_runs(home, family, tmp_path, monkeypatch):
    net, made = tiny.model(family), source(home, family)
    made.features = kept(tmp_path, made, net)
    monkeypatch.setattr(feature_cache.images, "decode", None)
    batch = collate([made.example(i) for i in range(10)], tiny.PAD)
    net.model.vision_tower.forward = None
    assert DualSpeed(net, keep=0.3).train()(**batch, plan=Plan("fast", keep=0.3)).loss.isfinite()


def test_files_are_found_by_content_and_made_once(home, family, tmp_path):
    net, made = tiny.model(family), source(home, family)
    kept(tmp_path, made, net)
    first = {p: p.stat().st_mtime_ns for p in files(tmp_path)}
    assert len(first) == len(set(made.pictures()))
    shutil.copytree(home / "images", tmp_path / "moved" / "images")
    shutil.copy(home / "train.json", tmp_path / "moved")
    again = source(tmp_path / "moved", family)
    store = kept(tmp_path, again, tiny.model(family))
    assert {p: p.stat().st_mtime_ns for p in first} == first, "other paths, same pictures"
    other = kept(tmp_path, made, tiny.model(family, seed=1))
    half = FeatureCache(tmp_path, adapter(net), made.processor.image_processor, "bf16")
    picture = next(iter(made.pictures()))
    assert len({store.file(picture), other.file(picture), half.file(picture)}) == 3, "another tower, another precision"
    Image.open(picture).convert("RGB").rotate(90).save(tmp_path / "turned.png")
    assert store.file(tmp_path / "turned.png") != store.file(picture)


def test_the_size_is_never_exceeded_and_old_features_make_room(home, tmp_path):
    made, one, other = source(home, "llava"), tiny.model("llava"), tiny.model("llava", seed=1)
    kept(tmp_path, made, one)
    needed = sum(p.stat().st_size for p in files(tmp_path))
    old = files(tmp_path)
    for age, file in enumerate(old):
        os.utime(file, (age, age))
    kept(tmp_path, made, other, most=1.5 * needed)
    assert sum(p.stat().st_size for p in files(tmp_path)) <= 1.5 * needed
    left = [p for p in old if p.exists()]
    assert 0 < len(left) < len(old)
    assert left == old[-len(left) :], "the oldest go first"
    with pytest.raises(UserError, match=r"take more than 0\.0 GB.*feature_cache_gb"):
        kept(tmp_path / "small", made, one, most=0.5 * needed)
    assert sum(p.stat().st_size for p in files(tmp_path / "small")) <= 0.5 * needed


def test_an_interruption_loses_one_file_at_most(home, tmp_path, monkeypatch):
    made, net, count = source(home, "llava"), tiny.model("llava"), []

    def dying(*arguments):
        count.append(1)
        if len(count) == 4:
            raise Killed
        return original(*arguments)

    original = feature_cache.images.decode
    with monkeypatch.context() as patch:
        patch.setattr(feature_cache.images, "decode", dying)
        with pytest.raises(Killed):
            kept(tmp_path, made, net)
    assert len(files(tmp_path)) == 3
    store = kept(tmp_path, made, net)
    whole = kept(tmp_path / "whole", made, net)
    for picture in made.pictures():
        assert torch.equal(store.read(picture)["tower_features"], whole.read(picture)["tower_features"])


def test_an_interruption_while_a_file_is_written_leaves_no_half_of_it_behind(home, tmp_path, monkeypatch):
    made, net, original = source(home, "llava"), tiny.model("llava"), Path.write_bytes

    def half(path, content):
        original(path, content[: len(content) // 2])
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", half)
        with pytest.raises(Killed):
            kept(tmp_path, made, net)
    assert not files(tmp_path)
    store = kept(tmp_path, made, net)
    assert all(store.read(picture)["tower_features"].isfinite().all() for picture in made.pictures())


def test_a_damaged_file_is_named(home, tmp_path):
    made, net = source(home, "llava"), tiny.model("llava")
    store = kept(tmp_path, made, net)
    picture = next(made.pictures())
    store.file(picture).write_bytes(b"not what was written")
    with pytest.raises(UserError, match=r"deleted or damaged.*--resume"):
        store.read(picture)
    store.file(picture).unlink()
    with pytest.raises(UserError, match=r"deleted or damaged.*--resume"):
        store.read(picture)


@settings(max_examples=100, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(at=st.floats(0, 1, exclude_max=True), bit=st.integers(0, 7))
@pytest.mark.parametrize("kind", tiny.FAMILIES)
def test_any_flipped_bit_is_noticed(one_file, at, bit):
    content = bytearray(one_file.read_bytes())
    content[int(at * len(content))] ^= 1 << bit
    damaged = one_file.with_name("damaged") / one_file.name
    damaged.parent.mkdir(exist_ok=True)
    damaged.write_bytes(content)
    assert feature_cache._read(one_file) is not None
    assert feature_cache._read(damaged) is None


@pytest.fixture
def one_file(home, kind, tmp_path):
    """The features of a picture."""
    made = source(home, kind)
    store = kept(tmp_path, made, tiny.model(kind))
    return store.file(next(made.pictures()))


def cut(one, other):
    one.write_bytes(one.read_bytes()[:-1])


def flipped(one, other):
    content = bytearray(one.read_bytes())
    content[-3] ^= 1
    one.write_bytes(content)


def swapped(one, other):
    one.rename(one.with_name("x"))
    other.rename(one)
    one.with_name("x").rename(other)


def of_an_earlier_version(one, other):
    save_file(load_file(one), one)


def a_folder(one, other):
    one.unlink()
    one.mkdir()


@pytest.mark.parametrize(
    ("damage", "count"), [(cut, 1), (flipped, 1), (swapped, 2), (of_an_earlier_version, 1), (a_folder, 1)]
)
def test_damaged_and_swapped_files_are_made_anew(home, tmp_path, capsys, damage, count):
    made, net = source(home, "llava_next"), tiny.model("llava_next")
    store = kept(tmp_path, made, net)
    whole, used = {file: file.read_bytes() for file in files(tmp_path)}, sum(p.stat().st_size for p in files(tmp_path))
    capsys.readouterr()
    kept(tmp_path, made, net)
    assert not capsys.readouterr().err, "sound ones are not"
    pictures = sorted({*made.pictures()})[:2]
    damage(*map(store.file, pictures))
    with pytest.raises(UserError, match=rf"the features of {pictures[0]} in .*damaged.*--resume"):
        store.read(pictures[0])
    kept(tmp_path, made, net, most=used)
    said = capsys.readouterr().err.strip()
    assert f"features of {count} picture" in said
    assert "made anew" in said
    assert "\n" not in said
    assert {file: content_of(file.name, file.read_bytes()) for file in files(tmp_path)} == {
        file: content_of(file.name, content) for file, content in whole.items()
    }


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes here")
def test_a_pipe_in_the_cache_is_not_waited_for(home, tmp_path):
    made, net = source(home, "llava"), tiny.model("llava")
    store = kept(tmp_path, made, net)
    picture = next(made.pictures())
    store.file(picture).unlink()
    os.mkfifo(store.file(picture))
    with pytest.raises(UserError, match="deleted or damaged"):
        store.read(picture)


def test_features_that_are_not_finite_are_neither_kept_nor_read(home, tmp_path):
    made, net = source(home, "llava"), tiny.model("llava")
    store = kept(tmp_path, made, net)
    picture = next(made.pictures())
    tensors = load_file(store.file(picture))
    tensors["features"].view(-1)[7] = float("inf")
    save_file(tensors, store.file(picture))
    with pytest.raises(UserError, match=rf"features of {picture} .*damaged.*--resume"):
        store.read(picture)
    with torch.no_grad():
        next(net.model.vision_tower.parameters()).view(-1)[0] = float("nan")
    with pytest.raises(UserError, match=r"features of .* are not finite.*precision"):
        kept(tmp_path / "other", made, net)
    assert not files(tmp_path / "other")


def test_what_a_killed_run_left_half_written_is_swept(home, tmp_path):
    made, net = source(home, "llava"), tiny.model("llava")
    kept(tmp_path, made, net)
    old, new = (files(tmp_path)[0].parent / f".{name}.safetensors.1.tmp" for name in ("old", "new"))
    for file in (old, new):
        file.write_bytes(b"half")
    os.utime(old, (1, 1))
    kept(tmp_path, made, net)
    assert not old.exists()
    assert new.exists()
