"""The loop: killed and resumed is the same as never killed; stopping saves; nothing goes wrong in silence."""

import itertools
import json
import os
import random
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from safetensors.torch import load_file
from support.digits_runs import ALIGN, TUNE, settings, small_base
from support.runs import log_of, train_through, unlike

from tinyspeed import UserError, recipe
from tinyspeed.data import digits, loader
from tinyspeed.data.examples import collate
from tinyspeed.scheduler import Plan
from tinyspeed.training import build, checkpoint, loop, run_folder, stopping, train, trained_model
from tinyspeed.training.loop import StageRun, Totals
from tinyspeed.training.optimizer import learning_rate
from tinyspeed.util import paths


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return small_base(tmp_path_factory.mktemp("base") / "base")


@pytest.fixture(scope="module")
def uninterrupted(base, tmp_path_factory):
    made = settings(base, tmp_path_factory.mktemp("whole"), "whole")
    train.train(made, bar=False)
    return made


@pytest.mark.parametrize("deaths", [(1,), (ALIGN,), (4,), (1, 4)], ids=str)
def test_killed_and_resumed_equals_never_killed_bit_for_bit(deaths, base, uninterrupted, tmp_path, monkeypatch):
    made = settings(base, tmp_path, "run")
    train_through(monkeypatch, made, *deaths)
    assert not unlike(made, uninterrupted)


@pytest.mark.parametrize(("number", "step"), [(signal.SIGINT, 1), (signal.SIGTERM, 6)])
def test_a_signal_finishes_the_step_and_saves(number, step, base, uninterrupted, tmp_path, monkeypatch):
    made, original = settings(base, tmp_path, "run", "run.save_every=100"), StageRun._step

    def signalled(self, *args):
        if self.totals.steps == step:
            os.kill(os.getpid(), number)
        return original(self, *args)

    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(StageRun, "_step", signalled)
        result = train.train(made, bar=False)
    assert result.stopped_by == number
    assert signal.getsignal(number) == before
    assert checkpoint.newest(made.folder / "checkpoints").name == f"step-{step + 1:08d}"
    train.train(made, resume=True, bar=False)
    assert not unlike(made, uninterrupted)


def closed(number, frame):
    raise ConnectionAbortedError("the terminal is closed")


@pytest.mark.parametrize("usual", [closed, signal.SIG_IGN], ids=["terminal", "nohup"])
def test_a_closed_terminal_asks_to_stop_and_one_that_nohup_ignores_does_not(usual, capfd):
    before = signal.signal(signal.SIGHUP, usual)
    try:
        with stopping.stop_requested() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == usual
    finally:
        signal.signal(signal.SIGHUP, before)
    assert stop == [signal.SIGHUP] * (usual == closed)
    assert ("SIGHUP: this step, then saving" in capfd.readouterr().err) == bool(stop)


def steps_saved(made) -> list[int]:
    return [int(path.name.removeprefix("step-")) for path in sorted((made.folder / "checkpoints").iterdir())]


def test_when_a_run_saves_changes_none_of_its_bits(base, uninterrupted, tmp_path):
    often = ("run.save_every=100", "run.save_minutes=0", "run.keep_checkpoints=99")
    made = settings(base, tmp_path, "run", *often)
    train.train(made, bar=False)
    assert steps_saved(made) == list(range(1, ALIGN + TUNE + 1))
    assert not unlike(made, uninterrupted)
    assert not run_folder.differences(made, settings(base, tmp_path, "run")), "a resumed run may save at other times"


MINUTES = ((0.5, 0.5, 1, 3, 0, 7, 0.5, 0, 0, 0, 0, 0.5, 0.5, 0, 10, 0), (4, 4, 4, 4, 25, 0, 0, 0.5, 0, 0, 0))


@pytest.mark.parametrize("minutes", MINUTES)
def test_checkpoints_come_after_steps_after_minutes_and_at_the_ends_of_epochs(minutes, base, tmp_path, monkeypatch):
    """On a clock that only steps move. Ten pictures, four in a step: the third step and the fifth end an epoch."""
    made = settings(
        base, tmp_path, "run", "align.steps=0", f"train.steps={len(minutes)}", "digits.pictures=10", "run.save_every=6",
        "run.keep_checkpoints=99",
    )  # fmt: skip
    now, original = [1e6], StageRun._step

    def timed(self, step, *given):
        done = original(self, step, *given)
        now[0] += 60 * minutes[step]
        return done

    monkeypatch.setattr(loop, "time", SimpleNamespace(perf_counter=lambda: now[0]))
    monkeypatch.setattr(StageRun, "_step", timed)
    train.train(made, bar=False)
    wanted, age = [], 0
    for step, took in enumerate(minutes, 1):
        age, ends = age + took, any(picture % 10 == 0 for picture in range(4 * step - 3, 4 * step + 1))
        if step % 6 == 0 or step == len(minutes) or age >= 10 or (ends and age >= 1):
            wanted, age = [*wanted, step], 0
    assert steps_saved(made) == wanted


@pytest.mark.parametrize("seed", range(2))
def test_a_clock_that_jumps_by_days_spoils_neither_run_nor_log(seed, base, uninterrupted, tmp_path, monkeypatch):
    made, draw = settings(base, tmp_path, "run"), random.Random(seed)
    jumping = lambda: 1e6 + draw.choice((-1, 0, 1)) * 86400 * draw.random()
    for clock in ("time.perf_counter", "time.time", "time.monotonic", "tqdm.std.time"):
        monkeypatch.setattr(clock, jumping)
    train.train(made)
    monkeypatch.undo()
    assert not unlike(made, uninterrupted)
    lines = log_of(made)
    assert all(line["rows_per_second"] > 0 and (line["speedup"] or 0) >= 0 for line in lines)
    assert all(a["seconds"] < b["seconds"] for a, b in itertools.pairwise(lines))
    train.train(made, resume=True, bar=False)  # and its checkpoint is not taken for a damaged one


def test_steps_win_over_epochs_but_not_in_silence(base, tmp_path, capsys):
    made = settings(base, tmp_path, "run", "train.epochs=3")
    model, source = build.build(made)
    capsys.readouterr()
    for number, (name, stage) in enumerate(made.stages()):
        run = StageRun(made, model, source, name, number, stage, Totals())
        assert run.steps == stage.steps
        run._announce()
    assert capsys.readouterr().err.splitlines() == [f"train.steps = {TUNE} is used, train.epochs = 3 is not"]


def test_a_signal_while_the_model_is_written_is_not_lost(base, uninterrupted, tmp_path, monkeypatch):
    """The model is complete then, and whoever trains several runs, as `compare` does, stops behind this one."""
    made, original = settings(base, tmp_path, "run"), train.export

    def signalled(*given):
        os.kill(os.getpid(), signal.SIGTERM)
        original(*given)

    monkeypatch.setattr(train, "export", signalled)
    assert train.train(made, bar=False).stopped_by == signal.SIGTERM
    assert not unlike(made, uninterrupted)


def test_micro_batches_change_nothing(base, uninterrupted, tmp_path):
    made = settings(base, tmp_path, "run", "train.row_budget=100", "align.row_budget=100")
    # Dropout draws differently for differently cut batches: leave it out on both sides.
    model = build.build(made)[0]
    model.model.config.text_config.attention_dropout = 0.0
    gradients = []
    for budget in (0, 100, 10**6):
        stage = recipe.StageSection(steps=5, batch=6, row_budget=budget)
        run = StageRun(made, model.eval(), build.build(made)[1], "train", 1, stage, Totals())
        model.vlm.language_model.config.attention_dropout = 0.0
        for layer in model.vlm.language_model.layers:
            layer.self_attn.attention_dropout = 0.0
        for mode in ("fast", "slow"):
            plan = Plan(mode, keep=0.1, distill=1.0 if mode == "slow" else 0.0)
            parts = (part for part, _ in run._parts(2, plan))
            done = run._forward_backward(2, plan, loader.batches(run.source, parts, run.pad))
            moved = {n: p.grad.clone() for p, n in run.names.items() if p.grad is not None}
            gradients.append((budget, mode, float(done["loss"]), moved))
            run.optimizer.zero_grad(set_to_none=True)
    for mode in ("fast", "slow"):
        whole, *others = [g for g in gradients if g[1] == mode]
        for other in others:
            assert other[2] == pytest.approx(whole[2], rel=1e-5)
            assert other[3].keys() == whole[3].keys()
            for name in whole[3]:  # fp32 sums in another order
                torch.testing.assert_close(other[3][name], whole[3][name], rtol=1e-4, atol=1e-6)


def test_a_loss_that_is_not_finite_stops_before_the_optimizer(base, tmp_path, monkeypatch):
    made, original = settings(base, tmp_path, "run"), StageRun._forward_backward

    def poisoned(self, step, *arguments):
        done = original(self, step, *arguments)
        if self.totals.steps == 5:
            done["loss"] = done["loss"] * float("nan")
        return done

    monkeypatch.setattr(StageRun, "_forward_backward", poisoned)
    with pytest.raises(UserError, match=r"step 6 .*Stopped before the optimizer.*new run with a lower train\.lr"):
        train.train(made, bar=False)
    tensors, state = checkpoint.read(checkpoint.newest(made.folder / "checkpoints"))
    assert state["totals"]["steps"] == 5
    assert all(t.isfinite().all() for t in tensors.values() if t.is_floating_point())


def test_a_second_run_goes_on_with_the_isolator_of_the_first(base, uninterrupted, tmp_path):
    first = uninterrupted.folder
    made = settings(base, tmp_path, "second", f"dualspeed.isolator_from={first}", "dualspeed.isolator=4")
    learned = trained_model.load_trained(uninterrupted).isolator.weight
    assert torch.equal(build.build_model(made).isolator.weight, learned)
    assert not torch.equal(build.build_model(settings(base, tmp_path, "other")).isolator.weight, learned)
    with pytest.raises(UserError, match=r"isolator.weight in .* is \(4, 32\), not \(2, 32\)"):
        build.build_model(settings(base, tmp_path, "two", f"dualspeed.isolator_from={first}", "dualspeed.isolator=2"))
    with pytest.raises(UserError, match="was that run finished"):
        build.build_model(settings(base, tmp_path, "none", f"dualspeed.isolator_from={tmp_path / 'absent'}"))


def test_an_isolator_that_is_something_else_is_refused(base, tmp_path):
    (tmp_path / "first").mkdir()
    (tmp_path / "first" / paths.ISOLATOR).write_bytes(b"x" * 100)
    with pytest.raises(UserError, match=r"isolator\.safetensors is damaged, or of an older version"):
        build.build_model(settings(base, tmp_path, "run", f"dualspeed.isolator_from={tmp_path / 'first'}"))


def test_the_tower_stays_frozen_and_stage_one_trains_only_projector_and_isolator(base, uninterrupted, tmp_path):
    before = load_file(Path(base) / "model.safetensors")
    after = load_file(uninterrupted.folder / "model" / "model.safetensors")
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert not any("vision_tower" in name for name in changed)
    assert any("projector" in name for name in changed)
    assert any("language_model" in name for name in changed)
    aligned = settings(base, tmp_path, "aligned", "train.steps=0")
    train.train(aligned, bar=False)
    after = load_file(aligned.folder / "model" / "model.safetensors")
    assert all("projector" in name for name in before if not torch.equal(before[name], after[name]))
    modes = [json.loads(line)["mode"] for line in (aligned.folder / "metrics.jsonl").read_text().splitlines()]
    assert modes == ["fast"] * ALIGN


def test_what_a_run_leaves_behind(uninterrupted):
    folder = uninterrupted.folder
    assert recipe.read(str(folder / "recipe.toml")) == uninterrupted
    record = json.loads((folder / "record.json").read_text())
    assert torch.__version__.startswith(record["versions"]["torch"])
    assert {"command", "commit", "device", "seed", "threads"} <= record.keys()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, ALIGN + TUNE + 1))
    assert {line["mode"] for line in lines} == {"fast", "slow"}
    for line in lines:
        assert line["rows_full"] == 4 * (1 + 4 * 6 + 144)
        assert line["rows_kept"] == (4 * (1 + 4 * 6 + 14 + 4) if line["mode"] == "fast" else line["rows_full"])


def test_an_exported_model_is_a_plain_llava(uninterrupted):
    from transformers import AutoModelForImageTextToText

    assert "tinyspeed" not in (uninterrupted.folder / "model" / "config.json").read_text()
    plain = AutoModelForImageTextToText.from_pretrained(uninterrupted.folder / "model").eval()
    ours = trained_model.load_trained(uninterrupted).eval()
    batch = collate([digits.Digits(9, 2, "eval").example(i) for i in range(3)], 0)
    assert not any("isolator" in name for name, _ in plain.named_parameters())
    assert torch.equal(plain(**batch).logits, ours(**batch).logits)


def test_existing_runs_are_never_overwritten(base, uninterrupted, tmp_path):
    with pytest.raises(UserError, match="holds a run already"):
        train.train(uninterrupted, bar=False)
    with pytest.raises(UserError, match="no run to resume"):
        train.train(settings(base, tmp_path, "absent"), resume=True, bar=False)
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "notes.txt").write_text("years of work")
    with pytest.raises(UserError, match="is not a run"):
        train.train(settings(base, tmp_path, "thesis"), bar=False)
    assert [p.name for p in (tmp_path / "thesis").iterdir()] == ["notes.txt"]
    other = settings(base, uninterrupted.run.folder, "whole", "train.lr=1e-5")
    with pytest.raises(UserError, match="another recipe"):
        train.train(other, resume=True, bar=False)


def test_a_failed_start_does_not_take_the_name(base, tmp_path):
    with pytest.raises(UserError, match="no model folder"):
        train.train(settings("/no/such/model", tmp_path, "run"), bar=False)
    made = settings(base, tmp_path, "run", "train.steps=1")
    train.train(made, bar=False)
    assert (made.folder / "model").exists()


def test_another_llava_than_the_digits_own_is_refused(tmp_path):
    from support import tiny

    other = tiny.checkpoint("llava", tmp_path / "other")
    with pytest.raises(UserError, match="is not a model for data"):
        train.train(settings(str(other), tmp_path, "run"), bar=False)


def gpu_is_full():
    raise torch.OutOfMemoryError


@pytest.mark.parametrize("allocate", [gpu_is_full, lambda: torch.empty(1 << 58), lambda: np.empty(1 << 58)])
def test_running_out_of_memory_names_mode_tokens_and_setting(base, tmp_path, monkeypatch, allocate):
    made, original = settings(base, tmp_path, "run", "align.steps=0"), StageRun._micro_batch

    def too_large(self, batch, rows, plan, answers):
        if plan.mode == "slow" or (plan.mode == "full" and allocate is gpu_is_full):
            allocate()
        return original(self, batch, rows, plan, answers)

    monkeypatch.setattr(StageRun, "_micro_batch", too_large)
    rows = 4 * (1 + 4 * 6 + 144)
    with pytest.raises(UserError, match=rf"a slow micro-batch of {rows} tokens .4 samples. .* train\.row_budget below"):
        train.train(made, bar=False)
    if allocate is gpu_is_full:  # a run without slow steps does not mind that a full step could not even be timed
        fast = settings(base, tmp_path, "fast", "align.steps=0", "dualspeed.schedule=fast")
        totals = train.train(fast, bar=False).totals
        assert (totals.steps, totals.full_seconds, totals.speedup) == (fast.train.steps, 0, None)


@given(st.integers(0, 99), st.floats(0.1, 120), st.just(0.0) | st.floats(0.1, 1000))
@example(21, 6.0, 1.9)
def test_a_speedup_is_told_of_many_steps_or_of_long_ones(steps, seconds, full_seconds):
    found = Totals(steps=steps, seconds=seconds, full_seconds=full_seconds).speedup
    if full_seconds and (steps >= 50 or seconds >= 60):
        assert found * seconds == pytest.approx(full_seconds)
    else:
        assert found is None


def test_a_damaged_checkpoint_is_named_and_a_half_written_one_removed(base, tmp_path, capsys):
    made = settings(base, tmp_path, "run", "train.steps=2")
    train.train(made, bar=False)
    newest = checkpoint.newest(made.folder / "checkpoints")
    half = made.folder / "checkpoints" / ".tmp-step-00000009"
    half.mkdir()
    train.train(made, resume=True, bar=False)
    assert f"removing {half}" in capsys.readouterr().err
    assert not half.exists()
    file = newest / checkpoint.TENSORS
    file.write_bytes(file.read_bytes()[:-9])
    with pytest.raises(UserError, match=f"{newest.name} is damaged"):
        train.train(made, resume=True, bar=False)


def test_the_learning_rate_warms_up_and_comes_down():
    stage = recipe.StageSection(steps=100, warmup=0.1)
    rates = [learning_rate(stage, step, 100) for step in range(100)]
    assert rates[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert rates[9:] == sorted(rates[9:], reverse=True)
    assert rates[-1] < 0.01


@pytest.fixture
def stopped(base, uninterrupted, tmp_path):
    """A run as it was left after step 9, to be broken."""
    made = settings(base, tmp_path, "stopped")
    shutil.copytree(uninterrupted.folder, made.folder)
    (made.folder / "recipe.toml").write_text(made.to_toml())
    for path in (made.folder / "checkpoints").iterdir():
        if path.name > "step-00000009":
            shutil.rmtree(path)
    shutil.rmtree(made.folder / "model")
    return made


def test_a_checkpoint_of_another_run_is_refused(stopped, base, tmp_path):
    other = settings(base, tmp_path, "other", "run.seed=9")
    train.train(other, bar=False)
    newest = checkpoint.newest(stopped.folder / "checkpoints")
    shutil.rmtree(newest)
    shutil.copytree(checkpoint.newest(other.folder / "checkpoints"), newest.with_name("step-00000010"))
    for use in (lambda: train.train(stopped, resume=True, bar=False), lambda: trained_model.load_trained(stopped)):
        with pytest.raises(UserError, match="is of another run"):
            use()


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("stage", 7), ("stage", "x"), ("stage", True), ("stage_step", -1), ("stage_step", 99), ("totals", []),
        ("totals", {"steps": 3}), ("threads", None), ("schedule", 3), ("scale", None),
        ("scale", {"scale": "", "good": 0, "moving": False}),
        ("scale", {"scale": float("nan"), "good": 0, "moving": False}),
    ],
)  # fmt: skip
def test_a_state_of_another_shape_is_damage(stopped, key, value):
    path = checkpoint.newest(stopped.folder / "checkpoints")
    state = {**json.loads((path / checkpoint.STATE).read_text())["state"], key: value}
    (path / checkpoint.STATE).write_text(json.dumps({"state": state, "crc32": checkpoint._crc(state)}))
    with pytest.raises(UserError, match=r"damaged|was made with"):
        train.train(stopped, resume=True, bar=False)


@pytest.mark.parametrize("damage", ["cut", "not text", "one digit", "another order", "no end", "empty"])
def test_a_damaged_log_is_named_and_not_gone_on_with(stopped, damage):
    log = stopped.folder / "metrics.jsonl"
    lines = log.read_bytes().splitlines(keepends=True)
    steps = int(checkpoint.newest(stopped.folder / "checkpoints").name.removeprefix("step-"))
    lines = {
        "cut": [*lines[:3], lines[3][:20]], "not text": [b"\xff\xfe" + lines[0], *lines[1:]],
        "one digit": [lines[0].replace(b'"loss": ', b'"loss": 1'), *lines[1:]],
        "another order": [lines[1], lines[0], *lines[2:]], "no end": [*lines[: steps - 1], lines[steps - 1][:-1]],
        "empty": [],
    }[damage]  # fmt: skip
    log.write_bytes(b"".join(lines))
    with pytest.raises(UserError, match=r"metrics\.jsonl is damaged: its first"):
        train.train(stopped, resume=True, bar=False)


def test_a_log_that_is_gone_is_said_to_be(stopped, uninterrupted, capsys):
    (stopped.folder / "metrics.jsonl").unlink()
    train.train(stopped, resume=True, bar=False)
    assert "the log begins at step" in capsys.readouterr().err
    steps = [json.loads(line)["step"] for line in (stopped.folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == [ALIGN + TUNE]
    (stopped.folder / "metrics.jsonl").open("a").write("what came behind the checkpoint")
    train.train(stopped, resume=True, bar=False)
    assert json.loads((stopped.folder / "metrics.jsonl").read_text())["step"] == ALIGN + TUNE


@pytest.mark.parametrize("text", ["{", "[]", "3", '{"resumed": 7}', "\x00"])
def test_a_damaged_record_is_named(stopped, text):
    (stopped.folder / "record.json").write_text(text)
    with pytest.raises(UserError, match=r"record\.json is damaged"):
        train.train(stopped, resume=True, bar=False)


def test_a_damaged_isolator_is_named_before_it_is_used(uninterrupted, base, tmp_path):
    first = tmp_path / "first"
    first.mkdir()
    content = bytearray((uninterrupted.folder / "isolator.safetensors").read_bytes())
    content[-3] ^= 16
    (first / "isolator.safetensors").write_bytes(content)
    made = settings(base, tmp_path, "second", f"dualspeed.isolator_from={first}")
    with pytest.raises(UserError, match="damaged"):
        build.build_model(made)
    (first / "isolator.safetensors").write_bytes(content[:20])
    with pytest.raises(UserError, match="damaged"):
        build.build_model(made)
    (first / "isolator.safetensors").unlink()
    with pytest.raises(UserError, match="was that run finished"):
        run_folder.require_sources(made)


def test_gradients_whose_squares_overflow_are_told_from_infinite_ones(base, tmp_path, monkeypatch):
    for value, says in ((1e30, "gradients are too large, above all that of {}"), (-float("inf"), r"gradient of {} \(")):
        made, original, named = settings(base, tmp_path, f"run{value}"), StageRun._forward_backward, []

        def poisoned(self, *arguments, value=value, original=original, named=named):
            done = original(self, *arguments)
            p, name = next((p, name) for p, name in self.names.items() if p.grad is not None)
            p.grad.view(-1)[0] = value
            named.append(name)
            return done

        monkeypatch.setattr(StageRun, "_forward_backward", poisoned)
        with pytest.raises(UserError) as told:
            train.train(made, bar=False)
        monkeypatch.undo()
        assert re.search(r"^step 1 \(fast, align\): .*the " + says.format(re.escape(named[0])), str(told.value))
