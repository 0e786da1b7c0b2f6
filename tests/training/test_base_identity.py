"""A run goes on, is exported and is opened only with the base model that it began with, wherever that is now."""

import json
import shutil
from pathlib import Path

import huggingface_hub
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from support.runs import fails, flip, settings, train_until

from tinyspeed import UserError, recipe
from tinyspeed.models import loading
from tinyspeed.training import build, checkpoint, train, trained_model

OTHER = "the base model is not the one that the run began with"
CHANGES = ("lora.rank=2", "train.steps=4")


@pytest.fixture(scope="module")
def begun(home, tmp_path_factory):
    """A run that has taken two of its four steps, and its own copy of the base model."""
    folder = tmp_path_factory.mktemp("begun")
    shutil.copytree(home / "llava", folder / "base")
    made = settings(home, folder, "run", *CHANGES, f"model.path={folder / 'base'}")
    train_until(made, 2)
    return made


@pytest.fixture
def copied(begun, tmp_path):
    """A copy of that run and of its base model, to be changed. The folder is another one."""
    shutil.copytree(begun.folder.parent, tmp_path / "all")
    file = tmp_path / "all" / "run" / "recipe.toml"
    file.write_text(file.read_text().replace(str(begun.folder.parent), str(tmp_path / "all")))
    return recipe.of_run(str(file.parent))


def refused(made, said: str) -> None:
    for use in (
        lambda: train.train(made, resume=True, bar=False),
        lambda: trained_model.export(made, made.folder / "out"),
        lambda: trained_model.export(made, made.folder / "out", adapter_only=True),
        lambda: trained_model.load_trained(made),
    ):
        with pytest.raises(UserError, match=rf"{OTHER}: {said}"):
            use()
    assert not (made.folder / "out").exists()


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "processor_config.json", "config.json"])
def test_a_changed_file_of_the_base_is_refused_by_its_name(copied, name):
    base = Path(copied.model.path)
    if name == "model.safetensors":
        flip(base / name, -2)
    else:
        (base / name).write_text((base / name).read_text() + "\n")
    refused(copied, rf"{name} of {base} differs")


def test_a_command_says_so_in_one_line(copied, capsys):
    flip(Path(copied.model.path) / "model.safetensors", -2)
    assert OTHER in fails(capsys, "export", copied.folder, copied.folder / "out")
    assert OTHER in fails(capsys, "train", copied.folder / "recipe.toml", "--resume")


def test_a_file_that_has_gone_or_come_is_refused(copied):
    base, was = Path(copied.model.path), build.base_files(copied)
    shutil.move(base / "chat_template.jinja", base / "kept")
    with pytest.raises(UserError, match=rf"{OTHER}: chat_template\.jinja of"):
        trained_model.require_same_base(copied, was)
    shutil.move(base / "kept", base / "chat_template.jinja")
    (base / "chat_template.json").write_text("{}")
    with pytest.raises(UserError, match=rf"{OTHER}: chat_template\.json of"):
        trained_model.require_same_base(copied, was)


@hypothesis_settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_flipped_bit_of_what_training_depends_on_is_noticed(begun, data):
    base = Path(begun.model.path)
    was = build.base_files(begun)
    name = data.draw(st.sampled_from(sorted(path.name for path in base.iterdir() if path.name in was)))
    before = (base / name).read_bytes()
    flip(base / name, data.draw(st.integers(0, len(before) - 1)), data.draw(st.integers(0, 7)))
    try:
        with pytest.raises(UserError, match=rf"{OTHER}: {name} of"):
            trained_model.require_same_base(begun, was)
    finally:
        (base / name).write_bytes(before)
    trained_model.require_same_base(begun, was)


def test_all_files_that_a_saved_model_and_processor_have_count(begun):
    """But the settings of generation, which no step reads."""
    there = {path.name for path in Path(begun.model.path).iterdir()}
    assert build.base_files(begun).keys() == there - {"generation_config.json"}


def test_a_base_that_was_moved_is_the_same(begun, copied, tmp_path):
    assert copied.model.path != begun.model.path
    (Path(copied.model.path) / "README.md").write_text("Notes change nothing.")
    trained_model.export(copied, tmp_path / "out")


def test_a_checkpoint_of_an_earlier_version_is_gone_on_with(copied):
    path = checkpoint.newest(copied.folder / "checkpoints")
    state = json.loads((path / checkpoint.STATE).read_text())["state"]
    assert state["totals"].pop("base")
    (path / checkpoint.STATE).write_text(json.dumps({"state": state, "crc32": checkpoint._crc(state)}))
    assert train.train(copied, resume=True, bar=False).totals.steps == 4


def test_weights_beside_an_index_are_those_that_are_loaded(home, tmp_path):
    """transformers reads model.safetensors where both are there."""
    shutil.copytree(home / "llava", tmp_path / "base")
    whole = tmp_path / "base" / "model.safetensors"
    loading.load_model(str(home / "llava"), "fp32").save_pretrained(tmp_path / "parts", max_shard_size="40KB")
    for part in (tmp_path / "parts").glob("*.safetensors*"):
        shutil.copy(part, tmp_path / "base")
    before = loading.identity(tmp_path / "base", tmp_path)
    assert "model.safetensors" in before
    flip(whole, -2)
    assert loading.identity(tmp_path / "base", tmp_path) != before


# Hub ids


@pytest.fixture
def hub(home, tmp_path, monkeypatch):
    """The hub's cache as its client leaves it, with one model, and no network."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(loading, "snapshot_download", lambda *_, **__: pytest.fail("asked the hub"))
    repository = tmp_path / "hub" / "models--org--tiny"
    commit(repository, "1f" * 20, home / "llava")
    return repository


def commit(repository: Path, name: str, model: Path) -> Path:
    snapshot = repository / "snapshots" / name
    for folder in (snapshot, repository / "blobs", repository / "refs"):
        folder.mkdir(parents=True, exist_ok=True)
    for file in model.iterdir():
        blob = repository / "blobs" / f"{hash((name, file.name)) & (2**160 - 1):040x}"
        shutil.copy(file, blob)
        (snapshot / file.name).symlink_to(blob)
    (repository / "refs" / "main").write_text(name)
    return snapshot


def test_a_hub_id_is_known_by_its_files(home, hub, begun, tmp_path):
    made = settings(home, tmp_path, "hub", *CHANGES, "model.path=org/tiny")
    was = build.base_files(begun)
    assert build.base_files(made) == was, "a copy in a folder is the same model"
    trained_model.require_same_base(made, was)
    snapshot = next(hub.glob("snapshots/*"))
    (snapshot / "vocab.json").write_text("{}")  # a file of the same commit that was not needed before
    trained_model.require_same_base(made, was)
    flip((snapshot / "model.safetensors").resolve(), -2)
    with pytest.raises(UserError, match=rf"{OTHER}: model\.safetensors of org/tiny differs"):
        trained_model.require_same_base(made, was)


def test_another_commit_of_a_hub_id_is_another_model(home, hub, tmp_path):
    made = settings(home, tmp_path, "hub", *CHANGES, "model.path=org/tiny")
    was = build.base_files(made)
    shutil.copytree(home / "llava", tmp_path / "newer")
    flip(tmp_path / "newer" / "model.safetensors", -2)
    commit(hub, "2e" * 20, tmp_path / "newer")
    with pytest.raises(UserError, match=rf"{OTHER}: model\.safetensors of org/tiny differs"):
        trained_model.require_same_base(made, was)


def test_what_is_missing_of_a_hub_id_is_downloaded(home, hub, monkeypatch):
    snapshot = next(hub.glob("snapshots/*"))
    assert loading.local_folder("org/tiny") == snapshot
    (snapshot / "model.safetensors").unlink()
    monkeypatch.setattr(loading, "snapshot_download", lambda name, **_: f"{home}/{name}")
    assert loading.local_folder("org/tiny") == home / "org/tiny"
