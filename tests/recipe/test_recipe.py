"""Recipes: what is written is what is read, and a mistake is named."""

import copy
import dataclasses
import json
import re
import tomllib
from pathlib import Path

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from tinyspeed import UserError, recipe
from tinyspeed.bench.estimate import estimate
from tinyspeed.models.memory import GIB
from tinyspeed.recipe import comparison, reading
from tinyspeed.training import run_folder

PICTURES = Path(__file__).parents[2] / "tutorials" / "guide" / "pictures.md"
share = st.floats(0.01, 1)


@given(
    seed=st.integers(0, 2**32 - 1),
    keep=share,
    slow=share,
    lr=st.floats(1e-8, 1),
    name=st.text(st.characters(codec="utf-8", exclude_characters="/\\.", exclude_categories=["C"]), min_size=1),
    folder=st.text(st.characters(codec="utf-8", exclude_categories=["C"])),
)
def test_a_recipe_survives_toml(seed, keep, slow, lr, name, folder):
    made = recipe.Recipe(
        run=recipe.RunSection(name=name, folder=folder, seed=seed),
        dualspeed=recipe.DualSpeedSection(keep=keep, slow=slow),
        train=recipe.StageSection(steps=3, lr=lr),
    )
    assert recipe.from_tables(tomllib.loads(made.to_toml()), "here") == made


@pytest.mark.parametrize("name", sorted(p.stem for p in recipe.BUILT_IN.glob("*.toml")))
def test_built_in_recipes_are_valid(name):
    assert recipe.read(name).stages()


@pytest.mark.parametrize("name", sorted(p.stem for p in recipe.BUILT_IN.glob("llava-*gb*.toml")))
def test_a_recipes_opening_and_the_guide_say_what_is_estimated(name):
    """For which card, how much memory, how much faster, and how that is known."""
    gib = int(re.search(r"(\d+)gb", name)[1])
    found = estimate(recipe.read(name), gib)
    _, full, ours = found.work("train")
    assert found.peak < gib * GIB
    memory, speedup = f"{found.peak / GIB:#.3g} GiB", f"{full / ours:.2f}x"
    opening = (recipe.BUILT_IN / f"{name}.toml").read_text().split("[run]")[0]
    card, said, faster, checked, *_ = opening.splitlines()
    assert f"{gib} GB" in card
    assert re.search(r"^# Memory: (\S+ GiB) ", said)[1] == memory
    assert re.search(r"^# Speed-up: (\S+) less", faster)[1] == speedup
    assert re.search(r"^# Checked: .* measured on a GPU", checked)
    row = next(line for line in PICTURES.read_text().splitlines() if line.startswith(f"| [{name}]"))
    assert [cell.strip() for cell in row.split("|")][-3:-1] == [memory, speedup]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ("train.lrr=1", "did you mean 'train.lr'"),
        ("train.rate=1", "known: train.batch, .*train.lr, "),
        ("trian.lr=1", "did you mean 'train'"),
        ("train.lr=fast", "must be of type float"),
        ("train.steps=1.5", "must be of type int"),
        ("train.steps=true", "must be of type int"),
        ("train.lr=0", "above 0"),
        ("train.lr=nan", "above 0"),
        ("train.batch=0", "at least 1"),
        ("dualspeed.plugin=divprun", "did you mean 'divprune'"),
        ("dualspeed.positions=orignal", "did you mean 'original'"),
        ("dualspeed.schedule=sometimes", "known:"),
        ("dualspeed.keep=0.0", "above 0"),
        ("dualspeed.keep=1.5", "at most 1"),
        ("dualspeed.slow=-1", "must not be negative"),
        ("dualspeed.distill=-1", "negative"),
        ("dualspeed.isolator=-1", "negative"),
        ("dualspeed.views=true", "set lora.rank"),
        ("run.seed=-1", "must not be negative"),
        ("train.epochs=inf", "finite number"),
        ("run.name=../up", "plain folder name"),
        ("lr=1", "did you mean 'align.lr' or 'train.lr'"),
        ("train.rank=8", "'train.rank'; did you mean 'lora.rank'"),
        ("run.keep=0.5", "did you mean 'dualspeed.keep' or 'regate.keep'"),
        ("train=1", "known: train.batch"),
        ("nonsense=1", "known: align, data"),
        ("train.lr", "section.key=value"),
        ("train.steps=" + "9" * 5000, "must be of type int"),
        ("train.lr=" + "9" * 400, "too large"),
        ("train.steps=" + "[" * 5000, "must be of type int"),
        ("train.steps=3\ntrain.batch=4", "must be of type int"),
        ("train.steps=2000000000", "at most 1,000,000,000"),
        ("train.epochs=1e300", "at most 1,000,000"),
        ("train.batch=10000000", "at most 1,000,000"),
        ("train.lr=11.0", "at most 10"),
        ("train.weight_decay=1000.0", "set it lower"),
        ("run.threads=100000", "at most 1,024"),
        ("run.name=a\x7fb", "plain folder name"),
        ("run.name=" + "a" * 300, "plain folder name"),
        ("run.folder=~nobody-here/runs", "no such user"),
        ("run.cache=~nobody-here/cache", "no such user"),
        ("model.path=~nobody-here/model", "no such user"),
        ("model.path=" + "a" * 300, "too long"),
        ("data.system=a\0b", "no recipe can have"),
        ("data.system=\udc80", "no recipe can have"),
        ("lora.rank=1000000", "at most 65,536"),
        ("lora.alpha=8", "set lora.rank too"),
        ("digits.side=1000", "at most 96"),
        ("dualspeed.isolator=100000", "at most 4,096"),
        ("dualspeed.temperature=1e-30", "at least 0.01"),
        ("scale.timeout=1e30", "at most"),
        ("scale.window=1000000", "at most 10,000"),
    ],
)
def test_mistakes_are_named(change, says):
    with pytest.raises(UserError, match=says):
        recipe.read("digits", [change])


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("learning_rate", "train.lr"), ("lr_rate", "train.lr"), ("batch_size", "train.batch"),
        ("per_device_train_batch_size", "train.batch"), ("num_train_epochs", "train.epochs"),
        ("max_steps", "train.steps"), ("max_seq_length", "data.max_rows"), ("max_length", "data.max_rows"),
        ("gradient_checkpointing", "train.checkpointing"), ("lora_r", "lora.rank"), ("r", "lora.rank"),
        ("lora_alpha", "lora.alpha"), ("warmup_ratio", "train.warmup"), ("model_name_or_path", "model.path"),
        ("output_dir", "run.folder"),
    ],
)  # fmt: skip
def test_a_key_by_the_name_that_other_programs_give_it(tmp_path, theirs, ours):
    (tmp_path / "flat.toml").write_text(f"{theirs} = 1")
    for read in (
        lambda: recipe.read("digits", [f"train.{theirs}=1"]),
        lambda: recipe.read("digits", [f"model.{theirs}=1"]),
        lambda: recipe.read("digits", [f"{theirs}=1"]),
        lambda: recipe.read(str(tmp_path / "flat.toml")),
    ):
        with pytest.raises(UserError, match=f"{theirs}'; did you mean '{ours}'"):
            read()


def test_what_is_suggested_is_a_key_in_the_same_stage_if_there_is_one():
    every = {
        f"{section}.{key}" for section, table in dataclasses.asdict(recipe.read("digits")).items() for key in table
    }
    assert set(reading.SYNONYMS.values()) <= every
    assert not {key.partition(".")[2] for key in every} & set(reading.SYNONYMS)
    with pytest.raises(UserError, match=r"did you mean 'align\.lr'\?"):
        recipe.read("digits", ["align.learning_rate=1"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("llava-1.5-7b-qlora-12g", "did you mean 'llava-1.5-7b-qlora-12gb'"),
        ("llava-1.5-7b-qlora-12gb.toml", "did you mean 'llava-1.5-7b-qlora-12gb'"),
        ("digit", "did you mean 'digits'"),
        ("", "known: digits, llava-1.5-13b"),
    ],
)
def test_a_wrong_name_of_a_recipe(name, says):
    with pytest.raises(UserError, match=f"there is no recipe file '{name}'; {says}"):
        recipe.read(name)


def test_a_runs_folder_in_place_of_a_recipe(tmp_path):
    (tmp_path / "recipe.toml").write_text("")
    with pytest.raises(UserError, match=rf"{tmp_path} is a run, and its recipe is {tmp_path}/recipe\.toml"):
        recipe.read(str(tmp_path))


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (["sts.skip=0.5", "sts.every=1"], "skip none"),
        (["regate.keep=0.5", "regate.cycle=8", "regate.refresh=8"], "no step would skip"),
        (["lora.rank=4", "dualspeed.views=true", "dualspeed.slow=0.0"], "there are none"),
        (["lora.rank=4", "dualspeed.views=true", "dualspeed.schedule=fast"], "there are none"),
        (["sts.skip=0.34", "dualspeed.slow=1.0"], "every step runs every layer"),
        (["regate.keep=0.5", "regate.fusion=mix"], "set regate.reference"),
        (["regate.keep=0.5", "regate.weight=0.9"], "set regate.reference"),
    ],
)
def test_what_would_do_nothing_is_refused(changes, says):
    with pytest.raises(UserError, match=says):
        recipe.read("digits", changes)


def test_a_home_is_the_users_own(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert recipe.read("digits", ["run.folder=~/runs", "run.name=a"]).folder == tmp_path / "runs" / "a"


def test_every_string_that_is_taken_can_be_written_down():
    made = recipe.read("digits", ["data.system=a\x7f\x1fb"])
    assert recipe.from_tables(tomllib.loads(made.to_toml()), "here").data.system == "a\x7f\x1fb"


def test_a_name_that_looks_like_a_date_or_a_number_is_a_name():
    assert recipe.read("digits", ["run.name=2026-11-20"]).run.name == "2026-11-20"
    assert recipe.read("digits", ["run.name=3"]).run.name == "3"


def test_changes_apply_and_keep_the_rest():
    changed, plain = recipe.read("digits", ["train.lr=1e-5", "dualspeed.plugin=grid"]), recipe.read("digits")
    assert changed.train.lr == 1e-5
    assert changed.dualspeed.plugin == "grid"
    assert dataclasses.replace(changed, train=plain.train, dualspeed=plain.dualspeed) == plain


def test_bad_files(tmp_path):
    with pytest.raises(UserError, match=r"there is no recipe file .*absent.toml.*; known: .*digits"):
        recipe.read(str(tmp_path / "absent.toml"))
    (tmp_path / "bad.toml").write_text("[train\nlr = 1")
    with pytest.raises(UserError, match="not valid TOML"):
        recipe.read(str(tmp_path / "bad.toml"))
    for text in ("train.steps = " + "9" * 5000, "a = " + "[" * 5000):
        (tmp_path / "bad.toml").write_text(text)
        with pytest.raises(UserError, match="not valid TOML"):
            recipe.read(str(tmp_path / "bad.toml"))
    (tmp_path / "empty.toml").write_text("")
    with pytest.raises(UserError, match="trains nothing"):
        recipe.read(str(tmp_path / "empty.toml"))
    (tmp_path / "flat.toml").write_text("train = 3")
    with pytest.raises(UserError, match="must be a table"):
        recipe.read(str(tmp_path / "flat.toml"))
    with pytest.raises(UserError, match="must be a table"):
        recipe.read(str(tmp_path / "flat.toml"), ["train.lr=1"])


KEYS = [(s.name, f.name, f.type) for s in dataclasses.fields(recipe.Recipe) for f in dataclasses.fields(s.type)]
# TOML: what a leaf may be, and lists and tables of them.
LEAVES = ("3", "-7", "0.5", "1e9", "inf", "true", "false", '"a"', "2026-11-28", "07:32:00", "1979-05-27T07:32:00Z")
VALUES = st.recursive(
    st.sampled_from(LEAVES),
    lambda inner: (
        st.lists(inner, max_size=4).map(lambda values: f"[{', '.join(values)}]")
        | st.dictionaries(st.text("abc.'", min_size=1, max_size=3), inner, max_size=3).map(
            lambda table: "{" + ", ".join(f"{json.dumps(key)} = {value}" for key, value in table.items()) + "}"
        )
    ),
    max_leaves=8,
)


@given(key=st.sampled_from(KEYS), text=VALUES, extra=st.sampled_from(KEYS))
def test_a_value_of_another_type_is_refused_by_the_name_of_its_key(tmp_path_factory, key, text, extra):
    section, name, wanted = key
    value = tomllib.loads(f"x = {text}")["x"]
    assume(type(value) is not wanted and (type(value), wanted) != (int, float))
    file = tmp_path_factory.mktemp("recipe") / "mine.toml"
    file.write_text(f"[{section}]\n{name} = {text}\n" + (f"[{extra[0]}]\n" if extra[0] != section else ""))
    said = rf"^{re.escape(str(file))}: {section}\.{name} = .* must be of type {wanted.__name__}$"
    with pytest.raises(UserError, match=said):
        recipe.read(str(file))


DEEP = 1000
NESTED = {
    "a table": "[train.lr" + ".a" * DEEP + "]",
    "a table at the top": "[a" + ".a" * DEEP + "]",
    "a dotted key": "train.lr" + ".a" * DEEP + " = 1",
    "inline": "train.lr = " + "{a = " * DEEP + "1" + "}" * DEEP,
    "a list": "train.lr = " + "[" * DEEP + "]" * DEEP,
    "lists in tables": "train.lr = " + "{a = [" * DEEP + "]}" * DEEP,
    "tables of lists": "".join(f"[[{'.'.join('train' for _ in range(depth))}]]\n" for depth in range(1, 100)),
}


@pytest.mark.parametrize("how", NESTED)
def test_what_is_nested_a_thousand_deep_is_refused_in_one_line(tmp_path, how):
    (tmp_path / "deep.toml").write_text(NESTED[how] + "\n")
    for use in (
        lambda: recipe.read(str(tmp_path / "deep.toml")),
        lambda: comparison.read(recipe.read("digits"), str(tmp_path / "deep.toml")),
        lambda: recipe.read("digits", [NESTED[how].splitlines()[0].replace(" = ", "=", 1)]),
    ):
        with pytest.raises(UserError) as error:
            use()
        assert "\n" not in str(error.value)
        assert len(str(error.value)) < 1100


def test_local_paths_mean_the_same_from_everywhere(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "mine.json").write_text("[]")
    monkeypatch.chdir(tmp_path)
    made = recipe.read("digits", ["model.path=model", "data.kind=chat", "data.file=mine.json", "data.images=absent"])
    assert made.model.path == str(tmp_path / "model")
    assert made.data.file == str(tmp_path / "mine.json")
    assert made.data.images == "absent", "what is not there may be a hub id, or a mistake that is named later"
    assert recipe.read("llava-1.5-7b-qlora-12gb").model.path == "llava-hf/llava-1.5-7b-hf"


def test_a_checkpoint_is_of_one_recipe_wherever_its_files_are():
    """Each key in turn: what the numbers of a run follow from, or not."""
    made = recipe.read("digits")
    for section, table in dataclasses.asdict(made).items():
        for key in table:
            changed = copy.deepcopy(made)
            object.__setattr__(getattr(changed, section), key, "another")
            free = key in (*run_folder.FREE.get(section, ()), *run_folder.PLACES.get(section, ()))
            assert (run_folder.fingerprint(changed) == run_folder.fingerprint(made)) == free, f"{section}.{key}"
