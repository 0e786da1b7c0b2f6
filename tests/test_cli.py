"""The command line: every mistake is one line and exit code 2, and loses nothing."""

import json
import os
import re
import signal
import subprocess
import sys
import tomllib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.runs import fails

from tinyspeed import cli, recipe
from tinyspeed.data import digits_model
from tinyspeed.models import loading


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    folder = tmp_path_factory.mktemp("base") / "base"
    return digits_model.prepare(folder, 0, bar=False, width=16, layers=1, tower_width=16, tower_layers=1, tower_steps=1)


@pytest.fixture
def small(base, tmp_path):
    values = [f"model.path={base}", f"run.folder={tmp_path}", "align.steps=1", "train.steps=2", "train.batch=2"]
    values += ["align.batch=2", "data.eval_pictures=10"]
    return ["digits", *(word for value in values for word in ("--set", value))]


def test_code_from_the_hub_is_not_installed_to_us(tmp_path):
    """bitsandbytes gets some as it is imported, on some processors, where the package `kernels` is there."""
    (tmp_path / "kernels.py").write_text("raise SystemExit('code from the hub')")
    see = "from tinyspeed import cli; assert cli.main(['export', 'nowhere', 'out']) == 2\nimport importlib.util\n"
    see += "assert importlib.util.find_spec('kernels') is None\ntry:\n    import kernels\nexcept ImportError: pass"
    paths = f"{tmp_path}{os.pathsep}{Path(cli.__file__).parents[1]}"
    done = subprocess.run([sys.executable, "-c", see], env={**os.environ, "PYTHONPATH": paths}, capture_output=True)
    assert done.returncode == 0, done.stderr.decode()


def test_mistakes_in_a_recipe(capsys, tmp_path, small):
    assert "did you mean 'train.lr'" in fails(capsys, "train", *small, "--set", "train.lrr=1")
    assert "did you mean 'divprune'" in fails(capsys, "train", *small, "--set", "dualspeed.plugin=divprun")
    assert "at most 1" in fails(capsys, "train", *small, "--set", "dualspeed.keep=2")
    assert "no recipe file" in fails(capsys, "train", tmp_path / "absent.toml")
    absent = tmp_path / "no" / "model"
    assert f"no model folder {absent}" in fails(capsys, "train", *small, "--set", f"model.path={absent}")


@pytest.mark.parametrize("command", ["compare", "demo"])
def test_what_asks_about_digits_does_not_train_on_other_pictures(capsys, tmp_path, command):
    assert "about digits" in fails(capsys, command, "llava-1.5-7b-qlora-8gb", "--set", f"run.folder={tmp_path}")
    assert list(tmp_path.iterdir()) == []


def test_a_model_with_broken_weights(capsys, tmp_path, small, base):
    import shutil

    from safetensors.torch import load_file, save_file

    broken = shutil.copytree(base, tmp_path / "broken")
    tensors = load_file(broken / "model.safetensors")
    name = next(n for n in tensors if "projector" in n and n.endswith("weight"))
    tensors[name][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    said = fails(capsys, "train", *small, "--set", f"model.path={broken}")
    assert re.search(r"step 1 \(fast, align\): the weight \S*projector\S* \(.*nan\).* copy the base model again", said)
    (broken / "model.safetensors").write_bytes((broken / "model.safetensors").read_bytes()[:999])
    assert "cannot load the model" in fails(capsys, "train", *small, "--set", f"model.path={broken}")


def test_train_eval_export_and_resume(capsys, tmp_path, small):
    assert cli.main(["train", *small]) == 0
    run = tmp_path / "demo"
    assert re.search(r"3 steps, \d+ s; model in", capsys.readouterr().out), "too few to tell a speed-up"
    assert (run / "report.png").stat().st_size > 10_000
    assert cli.main(["eval", str(run)]) == 0
    assert re.search(r"full .*\d", capsys.readouterr().out)
    assert cli.main(["export", str(run), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "config.json").exists()
    capsys.readouterr()
    assert "exists already" in fails(capsys, "export", run, tmp_path / "out")
    assert "holds a run already" in fails(capsys, "train", *small)
    assert "train.lr differs." in fails(capsys, "train", *small, "--set", "train.lr=1e-9", "--resume")
    assert cli.main(["train", *small, "--resume"]) == 0
    assert "complete already" in capsys.readouterr().out
    assert "is not a run" in fails(capsys, "eval", tmp_path / "out")


@pytest.fixture
def terminal():
    """Closing it ends whatever does not handle that, also where the tests themselves run under nohup."""

    def closed(number, frame):
        raise ConnectionAbortedError("the terminal is closed")

    before = signal.signal(signal.SIGHUP, closed)
    yield
    signal.signal(signal.SIGHUP, before)


def test_exit_codes_of_signals(capsys, monkeypatch, small, terminal):
    from tinyspeed.training.loop import StageRun

    original = StageRun._step
    for number, code in ((signal.SIGINT, 0), (signal.SIGTERM, 143), (signal.SIGHUP, 129)):

        def signalled(self, *arguments, number=number):
            os.kill(os.getpid(), number)
            return original(self, *arguments)

        with monkeypatch.context() as patch:
            patch.setattr(StageRun, "_step", signalled)
            assert cli.main(["train", *small, "--set", f"run.name=by-{number}"]) == code
            assert "continue with --resume" in capsys.readouterr().err
            assert cli.main(["compare", *small, "--set", f"run.name=by-{number}", "--only", "full"]) == code
        assert cli.main(["train", *small, "--set", f"run.name=by-{number}", "--resume"]) == 0


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGHUP, 129)])
def test_a_signal_while_a_model_is_exported_leaves_nothing_half_written(
    capsys, monkeypatch, tmp_path, small, terminal, number, code
):
    from tinyspeed.training import trained_model

    before = signal.getsignal(number)
    assert cli.main(["train", *small]) == 0
    with monkeypatch.context() as patch:
        patch.setattr(trained_model, "_make_readable", lambda folder: os.kill(os.getpid(), number))
        with pytest.raises(SystemExit) as ended:
            cli.main(["export", str(tmp_path / "demo"), str(tmp_path / "out")])
    assert ended.value.code == code
    assert sorted(path.name for path in tmp_path.iterdir()) == ["demo"]
    assert signal.getsignal(number) == before
    assert cli.main(["export", str(tmp_path / "demo"), str(tmp_path / "out")]) == 0


@pytest.mark.parametrize(
    "allocate", [lambda: torch.empty(1 << 58), lambda: np.empty(1 << 58), lambda: b"a" * (1 << 60)]
)
def test_running_out_of_memory_is_one_line(capsys, monkeypatch, small, allocate):
    monkeypatch.setattr("tinyspeed.training.train.finish", lambda recipe: allocate())
    said = fails(capsys, "train", *small)
    assert re.search(r"memory ran out during `tinyspeed train` \(.+\); `tinyspeed estimate` says", said)


def test_a_question_may_be_longer_than_a_file_name(capsys, tmp_path):
    assert "no model folder" in fails(capsys, "ask", f"./{tmp_path.name}", "what is this? " * 40)


def test_scores_do_not_replace_the_predictions(capsys, tmp_path, small):
    assert cli.main(["train", *small]) == 0
    (tmp_path / "questions.json").write_text('{"question_id": 1, "image": "a.jpg", "text": "A?", "label": "yes"}\n')
    capsys.readouterr()
    task = ("--task", "pope", "--questions", tmp_path / "questions.json", "--images", tmp_path)
    said = fails(capsys, "eval", tmp_path / "demo", *task, "--out", tmp_path / "mine.json")
    assert "call this one mine.jsonl" in said
    assert not (tmp_path / "mine.json").exists()


def test_a_damaged_checkpoint_is_one_line_and_left_as_it_is(capsys, tmp_path, small):
    assert cli.main(["train", *small]) == 0
    damaged = max((tmp_path / "demo" / "checkpoints").glob("step-*/tensors.safetensors"))
    damaged.write_bytes(damaged.read_bytes()[:100])
    capsys.readouterr()
    before = {p: p.read_bytes() for p in (tmp_path / "demo").rglob("*") if p.is_file()}
    assert "is damaged" in fails(capsys, "train", *small, "--resume")
    assert "is damaged" in fails(capsys, "eval", tmp_path / "demo")
    assert {p: p.read_bytes() for p in (tmp_path / "demo").rglob("*") if p.is_file()} == before


def test_the_demo_trains_once_and_then_shows_its_results_again(capsys, tmp_path, small):
    words = ["demo", *small, "--set", "run.name=d"]
    assert cli.main(words) == 0
    first = capsys.readouterr().out
    assert re.search(r"% right on full tokens .*\d", first)
    for name in ("report.png", "kept.png"):
        assert (tmp_path / "d" / name).stat().st_size > 10_000
    weights = (tmp_path / "d" / "model" / "model.safetensors").stat().st_mtime_ns
    assert cli.main(words) == 0
    assert capsys.readouterr().out == first
    assert (tmp_path / "d" / "model" / "model.safetensors").stat().st_mtime_ns == weights
    assert "another recipe" in fails(capsys, *words, "--set", "train.steps=3")


def test_a_disk_that_says_no_is_one_line(capsys, tmp_path, small):
    (tmp_path / "file").write_text("in the way")
    assert "file" in fails(capsys, "train", *small, "--set", f"run.folder={tmp_path / 'file'}")


def test_a_second_process_changes_nothing_of_the_first(capsys, tmp_path, small):
    from tinyspeed.training import checkpoint

    run = tmp_path / "demo"
    run.mkdir()
    with checkpoint.only_one(run):
        (run / "recipe.toml").write_text("the first one's")
        assert "another process" in fails(capsys, "train", *small)
    assert (run / "recipe.toml").read_text() == "the first one's"
    (tmp_path / "demo-compare").mkdir()
    with checkpoint.only_one(tmp_path / "demo-compare"):
        assert "another process" in fails(capsys, "compare", *small, "--only", "full")


def test_look_and_its_mistakes(capsys, tmp_path, base):
    from tinyspeed.evaluation.demo import draw_example

    picture = draw_example(tmp_path / "p.png", 0)
    assert cli.main(["look", str(picture), "--tower", str(base), "--out", str(tmp_path / "o.png")]) == 0
    assert "divprune keeps 14" in capsys.readouterr().out
    assert fails(capsys, "look", tmp_path / "absent.png", "--out", tmp_path / "q.png")
    assert "at most 1" in fails(capsys, "look", picture, "--keep", "3", "--out", tmp_path / "q.png")
    assert not (tmp_path / "q.png").exists()
    before = picture.read_bytes()
    assert "is the picture itself" in fails(capsys, "look", picture, "--out", picture)
    assert picture.read_bytes() == before


def test_look_names_its_drawing_after_the_picture_and_draws_over_no_other_file(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (40, 30), "red").save("cat.jpg")
    drawing, words = tmp_path / "cat-kept.png", ("look", "cat.jpg", "--plugin")
    drawing.write_bytes(mine := Path("cat.jpg").read_bytes())
    assert "cat-kept.png exists already" in fails(capsys, *words, "grid")
    assert drawing.read_bytes() == mine
    drawing.unlink()
    assert cli.main([*words, "grid"]) == 0
    assert "cat-kept.png: grid keeps" in capsys.readouterr().out
    first = drawing.read_bytes()
    assert cli.main([*words, "random"]) == 0
    assert drawing.read_bytes() != first, "an older drawing makes room for the next"
    (tmp_path / "other.png").write_bytes(mine)
    assert cli.main([*words, "grid", "--out", "other.png"]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"cat.jpg", "cat-kept.png", "other.png"}


def test_a_gpu_is_as_large_as_its_box_says(capsys):
    """12 GB on the box of a card are 12 GiB, as the drivers count."""
    words, said = ("estimate", "llava-1.5-7b-qlora-12gb", "--gpu"), set()
    for size in ("12", "12.0", "12GB", "12gb", "12 GB", "12GiB", "12 GiB", "12G"):
        assert cli.main([*words, size]) == 0
        said.add(capsys.readouterr().out)
    assert len(said) == 1
    assert "Fits 12 GiB" in said.pop()
    for size in ("twelve", "12MB", "", "GB"):
        assert "--gpu" in fails(capsys, *words, size)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("", "COMMAND"),
        ("trian digits", "'trian' .choose from .*train"),
        ("bench stpe", "'stpe' .choose from .*step"),
        ("train", "RECIPE"),
        ("train digits --resme", "unknown flag '--resme'; did you mean '--resume'"),
        ("train digits --skipbad", "did you mean '--skip-bad'"),
        ("train --gpu=12 digits", "unknown flag '--gpu'; known: --dry-run"),
        ("compare digits --seed 2", "unknown flag '--seed'; did you mean '--seeds'"),
        ("bench step --gpu 12", "unknown flag '--gpu'; known: "),
        ("train my recipe.toml", "'recipe.toml' is one argument too many"),
        ("train digits train.lr=1e-4", "'train.lr=1e-4' is one argument too many: is a flag missing before it"),
        ("train llava-1.5-7b-qlora-12g", "did you mean 'llava-1.5-7b-qlora-12gb'"),
        ("train llava-1.5-7b-qlora-12gb", "no file train.json; give yours with --set data.file=FILE"),
        ("estimate birds.json", "birds.json is not valid TOML, as a recipe file must be"),
        ("ask some/model birds.json What is it?", 'ask IMAGE "QUESTION": .*birds.json is not a picture'),
        ("ask some/model Which? birds.json", "birds.json is a file, but the last argument must be the question"),
        ("eval some/model", "some/model is not a run on the digits: give --task"),
        ("export new out", "new has no checkpoint yet: train it first"),
        ("compare --arms papr", "there is no file of arms 'papr'; did you mean 'paper'"),
        ("look .", "cannot read the picture .: . is not a file"),
        ("look birds.json", "birds.json is not a picture"),
    ],
)
def test_what_a_newcomer_may_type_is_answered_in_one_line(capsys, tmp_path, monkeypatch, words, says):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "birds.json").write_text('[{"id": 1}]')
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "recipe.toml").write_text(recipe.read("digits").to_toml())
    assert re.search(says, fails(capsys, *words.split()))
    assert {path.name for path in tmp_path.iterdir()} == {"birds.json", "new"}


def test_compare_makes_its_table_and_goes_on_where_it_was(capsys, tmp_path, small):
    words = ["compare", *small, "--seeds", "2", "--only", "full,original r=0.02", "--set", "run.name=c"]
    assert cli.main(words) == 0
    table = capsys.readouterr().out
    assert re.search(r"\| original r=0.02 .*\d to .*\d", table)
    assert (tmp_path / "c-compare" / "compare.png").stat().st_size > 10_000
    results = list((tmp_path / "c-compare").rglob("result.json"))
    assert len(results) == 4
    times = {p: p.stat().st_mtime_ns for p in results}
    results[0].unlink()
    assert cli.main(words) == 0
    assert {p for p in times if p.stat().st_mtime_ns != times[p]} == {results[0]}
    assert "did you mean 'full'" in fails(capsys, "compare", *small, "--only", "fulll")


def test_one_folder_collects_arms_and_measures_none_twice(capsys, tmp_path, small):
    mine = tmp_path / "mine.toml"
    mine.write_text('[full.dualspeed]\nschedule = "full"\n["own arm".train]\nlr = 1e-4\n')
    words = ["compare", *small, "--set", "run.name=c"]
    assert cli.main([*words, "--arms", str(mine)]) == 0
    times = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("result.json")}
    assert {p.parent.name for p in times} == {"full", "own-arm"}
    assert cli.main([*words, "--vary", "dualspeed.plugin=grid,random", "--vary", "dualspeed.keep=0.5"]) == 0
    assert {p: p.stat().st_mtime_ns for p in times} == times
    runs = json.loads((tmp_path / "c-compare" / "compare.json").read_text())["runs"]
    assert [run["arm"] for run in runs] == ["full", "plugin=grid keep=0.5", "plugin=random keep=0.5", "own arm"]
    for run in runs:
        told = recipe.from_tables(tomllib.loads(run["recipe"]), "here")
        named = [f"plugin={told.dualspeed.plugin} keep={told.dualspeed.keep}", "own arm", "full"]
        assert run["arm"] in named
        assert (told.train.lr == 1e-4) == (run["arm"] == "own arm")
        assert {"commit", "device", "versions", "threads"} <= set(run["record"])
        assert min(run["rows"], run["steps"]) > 0
        assert run["area"] == run["rows"] * loading.load_config(told.model.path).text_config.num_hidden_layers
    table = (tmp_path / "c-compare" / "compare.md").read_text().splitlines()[2:]
    assert [line.split("|")[1].strip() for line in table] == [run["arm"] for run in runs]
    mine.write_text('[late.train]\nlr = 1e-5\n["own arm".train]\nlr = 1e-3\n')  # refused before `late` is run
    assert "measured with another recipe" in fails(capsys, *words, "--arms", mine)
    assert not (tmp_path / "c-compare" / "seed-0" / "late").exists()


@pytest.mark.parametrize(
    ("arms", "says"),
    [
        ("[a.dualsped]\nkeep = 0.1", "did you mean 'dualspeed'"),
        ("[a.dualspeed]\nkep = 0.1", "did you mean 'dualspeed.keep'"),
        ('[a.dualspeed]\nplugin = "divprun"', "did you mean 'divprune'"),
        ("[a.dualspeed]\nkeep = 2", "arm 'a': [dualspeed] "),
        ("[a.train]\nlr = true", "must be of type float"),
        ("[a]\nlr = 1.0", "lr"),
        ("[a]\ntrain = 1.0", "must be a table"),
        ("a = 1", "must be a table"),
        ("", "no arm"),
        ("[a", "not valid TOML"),
        ("[a.run]\nseed = 1", "run.seed is the same for all arms"),
        ("[a.digits]\nlayers = 1", "digits.layers is the same for all arms"),
        ('[a.model]\npath = "x"', "model.path is the same for all arms"),
        ("[base.train]\nlr = 1.0", "'base' cannot be an arm's name"),
        ('["../a".train]\nlr = 1.0', "cannot be an arm's name"),
        ('["a b".train]\nlr = 1.0\n["a-b".train]\nlr = 1.0', "would share a folder"),
        ("[good.train]\nlr = 1.0\n[a.sts]\nskip = 0.3", "arm 'a': skip = 0.3"),
        ("[good.train]\nlr = 1.0\n[a.regate]\nkeep = 0.5", "arm 'a': regate.keep: no sample is seen twice"),
    ],
)
def test_mistakes_in_a_file_of_arms_are_named_before_anything_runs(capsys, tmp_path, small, arms, says):
    (tmp_path / "mine.toml").write_text(arms)
    assert says in fails(capsys, "compare", *small, "--arms", tmp_path / "mine.toml")
    assert [path.name for path in tmp_path.iterdir()] == ["mine.toml"]


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--arms", "papre"], "did you mean 'paper'"),
        (["--arms", "mine.toml"], "known: compositions, "),
        (["--only", "full,dualspeedd"], "did you mean 'dualspeed'"),
        (["--seeds", "0"], "at least one seed"),
        (["--vary", "keep=0.1"], "did you mean 'dualspeed.keep'"),
        (["--vary", "dualspeed.keep"], "for example dualspeed.keep=0.1,0.25"),
        (["--vary", "dualspeed.kep=0.1,0.2"], "did you mean 'dualspeed.keep'"),
        (["--vary", "dualspeed.keep=0.1,3"], "arm 'keep=3'"),
        (["--vary", "dualspeed.keep=0.1", "--vary", "dualspeed.keep=0.2"], "given twice"),
        (["--vary", "run.seed=1,2"], "run.seed is the same for all arms"),
        (["--vary", "data.kind=chat"], "data"),
    ],
)
def test_mistakes_in_the_choice_of_arms(capsys, tmp_path, small, words, says):
    assert says in fails(capsys, "compare", *small, *words)
    assert list(tmp_path.iterdir()) == []
