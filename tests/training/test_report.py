"""Tables that stay aligned, curves that tell the truth, and pictures in which no name covers another."""

import json
import math
import os
import sys

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.text import Text
from PIL import Image

from tinyspeed import UserError
from tinyspeed.evaluation.comparison_figure import compare_figure
from tinyspeed.training.metrics import read_metrics
from tinyspeed.training.report import draw_run, run_figure
from tinyspeed.util import plots
from tinyspeed.util.plots import _spread, figure, save, smooth
from tinyspeed.util.tables import table

# Tables


def test_a_table_is_aligned_markdown_with_numbers_to_the_right():
    rows = [["full", 98.123456, 1, "1.0x", None], ["original r=0.1", 8.5, 12345, "4.61x", "98.4 ± 0.2"]]
    assert table(["arm", "accuracy", "steps", "speed", "spread"], rows).splitlines() == [
        "| arm            | accuracy | steps | speed |     spread |",
        "| -------------- | -------: | ----: | ----: | ---------: |",
        "| full           |    98.12 |     1 |  1.0x |            |",
        "| original r=0.1 |      8.5 | 12345 | 4.61x | 98.4 ± 0.2 |",
    ]


@given(
    st.lists(st.lists(st.one_of(st.none(), st.text(max_size=12), st.integers(), st.floats()), min_size=3, max_size=3))
)
def test_every_table_has_one_width_and_one_line_a_row(rows):
    lines = table(["a", "b|c", "d"], rows).split("\n")
    assert len(lines) == 2 + len(rows)
    assert len({len(line) for line in lines}) == 1
    for line in lines:  # every unescaped bar is a column's border
        assert line.replace("\\|", "").count("|") == 4


@pytest.mark.parametrize(
    "number",
    ["1", "-3.4e-5", "1,234", "3.1x", "98.4 %", "98.4 ± 0.2", "9.1 (8.8 to 9.3)", "<0.1 ms", "nan", "-", "12 MiB"],
)
def test_numbers_are_known_with_their_units(number):
    assert ":" in table(["x"], [[number]])
    assert ":" not in table(["x"], [[number], ["full"]])


# Curves


@given(st.lists(st.floats(-100, 100), min_size=1, max_size=300))
def test_smoothing_keeps_constants_length_and_range(values):
    values = np.array(values)
    curve = smooth(values)
    assert curve.shape == values.shape
    assert curve.min() >= values.min() - 1e-9
    assert curve.max() <= values.max() + 1e-9
    np.testing.assert_allclose(smooth(np.full(len(values), 3.0)), 3.0)


def test_smoothing_lags_behind_nothing_and_quiets_noise():
    ramp = np.arange(400.0)
    np.testing.assert_allclose(smooth(ramp)[20:-20], ramp[20:-20])
    noise = np.random.default_rng(0).standard_normal(400)
    assert smooth(noise).std() < 0.4
    assert list(smooth(np.array([5.0, 1.0]))) == [5, 1]


@given(st.lists(st.tuples(st.floats(0, 400), st.sampled_from([12.0, 24.0])), min_size=1, max_size=20))
def test_spread_labels_do_not_touch_and_stay_as_they_were_if_they_may(labels):
    labels = sorted(labels)
    wanted, tall = (np.array(column) for column in zip(*labels, strict=True))
    placed = _spread(wanted, tall, 0, 400)
    gaps = (tall[:-1] + tall[1:]) / 2
    assert (np.diff(placed) >= gaps - 1e-6).all()
    if (np.diff(wanted) >= gaps).all():
        np.testing.assert_allclose(placed, wanted, atol=1e-6)
    if gaps.sum() <= 400:
        assert placed.min() >= -1e-6
        assert placed.max() <= 400 + 1e-6


# Pictures


def names(fig) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Every text of a drawing that is no number on an axis, with the box that it fills."""
    renderer = fig.canvas.get_renderer()
    fig.canvas.draw()
    ticks = {t for ax in fig.axes for axis in (ax.xaxis, ax.yaxis) for t in axis.findobj(Text) if t is not axis.label}
    texts = [t for t in fig.findobj(Text) if t.get_visible() and t.get_text() and t not in ticks]
    boxes = [Text.get_window_extent(t, renderer) for t in texts]  # of an annotation, without its line
    return [(t.get_text(), (b.x0, b.y0, b.x1, b.y1)) for t, b in zip(texts, boxes, strict=True)]


def assert_legible(fig) -> set[str]:
    """No text covers another or leaves the picture."""
    found = names(fig)
    width, height = fig.canvas.get_width_height()
    for i, (text, (x0, y0, x1, y1)) in enumerate(found):
        assert 0 <= x0 < x1 <= width, f"{text!r} leaves the picture"
        assert 0 <= y0 < y1 <= height, f"{text!r} leaves the picture"
        for other, (u0, v0, u1, v1) in found[:i]:
            assert x1 <= u0 or u1 <= x0 or y1 <= v0 or v1 <= y0, f"{text!r} and {other!r} overlap"
    return {text for text, _ in found}


def steps(
    align: int = 60, tune: int = 240, slow: float = 0.2, speedup: float | None = 3.2, seed: int = 0
) -> list[dict]:
    rng = np.random.default_rng(seed)
    seconds, rows = 0.0, []
    for step in range(align + tune):
        mode = "slow" if step >= align and rng.random() < slow else "fast"
        full = 9000 + int(rng.integers(-500, 500))
        kept, taught = (full, full // 6) if mode == "slow" else (full // 6, 0)
        seconds += (kept + taught / 3) / 20000
        ce = (3 * math.exp(-step / 80) + 0.2) * rng.uniform(0.8, 1.2)
        rows.append(
            {
                "step": step, "stage": "align" if step < align else "tune", "mode": mode, "loss": ce, "ce": ce, "kl": 0,
                "answers": 30, "rows_kept": kept, "rows_taught": taught, "rows_full": full, "seconds": seconds,
                "rows_per_second": 20000.0, "grad_norm": 1.0, "lr": 1e-3, "memory_mib": None,
                "speedup": speedup if step > 10 else None,
            }
        )  # fmt: skip
    return rows


def write(folder, rows: list[dict], tail: str = ""):
    folder.mkdir(exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows) + tail)
    return folder


def lines(ax) -> list:
    return [line for line in ax.get_lines() if len(line.get_xdata()) > 2 and line.get_linestyle() != "None"]


def test_a_run_is_drawn_with_its_stages_modes_and_saving(tmp_path):
    rows = steps()
    path = draw_run(write(tmp_path / "my_$run$", rows))  # no formula, whatever TeX makes of dollars
    assert path == tmp_path / "my_$run$" / "report.png"
    assert Image.open(path).size == (1020, 1080)

    fig = run_figure(read_metrics(path.parent / "metrics.jsonl"), "my_$run$")
    texts = assert_legible(fig)
    assert {"fast", "slow", "align ◂", "▸ tune", "without pruning", "this run"} <= texts
    kept, taught, full = (sum(row[key] for row in rows) for key in ("rows_kept", "rows_taught", "rows_full"))
    assert f"Tokens through the LLM: {(kept + taught) / full:.0%} of full training's" in texts
    assert "Time: estimated speed-up 3.20x" in texts
    assert f"my_$run$: 300 steps in 0:0{round(rows[-1]['seconds']) // 60}:{round(rows[-1]['seconds']) % 60:02}" in texts

    loss, counts, time = fig.axes
    modes = {(stage, mode): [r for r in rows if (r["stage"], r["mode"]) == (stage, mode)] for stage, mode in
             (("align", "fast"), ("tune", "fast"), ("tune", "slow"))}  # fmt: skip
    curves = lines(loss)
    assert [list(c.get_xdata()) for c in curves] == [[r["step"] for r in mine] for mine in modes.values()]
    for curve, mine in zip(curves, modes.values(), strict=True):
        np.testing.assert_allclose(curve.get_ydata(), smooth(np.array([r["ce"] for r in mine])))
    fast, slow = curves[1], curves[2]
    assert fast.get_color() != slow.get_color()
    assert fast.get_linestyle() != slow.get_linestyle()
    np.testing.assert_allclose(lines(time)[0].get_ydata(), [r["seconds"] for r in rows])
    np.testing.assert_allclose(lines(time)[1].get_ydata(), [3.2 * r["seconds"] for r in rows[11:]])
    border = [line.get_xdata()[0] for line in counts.get_lines() if len(line.get_xdata()) == 2]
    assert border == [59.5]


def test_a_run_without_slow_steps_and_without_a_measured_speedup(tmp_path):
    fig = run_figure(read_metrics(write(tmp_path, steps(align=0, slow=0, speedup=None)) / "metrics.jsonl"))
    texts = assert_legible(fig)
    assert "fast" in texts
    assert "slow" not in texts
    assert not any("◂" in text for text in texts)
    assert "Time: speed-up not measured" in texts
    assert len(lines(fig.axes[2])) == 1


@pytest.mark.parametrize("n", [1, 2, 3])
def test_runs_of_a_few_steps_are_drawn(n, tmp_path):
    folder = write(tmp_path, steps(align=0, tune=n))
    assert_legible(run_figure(read_metrics(folder / "metrics.jsonl")))
    assert draw_run(folder).is_file()


@pytest.mark.skipif(sys.platform != "linux", reason="other systems want names in UTF-8")
def test_a_run_whose_name_is_not_utf8_is_drawn(tmp_path):
    assert draw_run(write(tmp_path / os.fsdecode(b"caf\xe9"), steps(align=0, tune=1))).is_file()


def test_losses_that_are_no_numbers_are_left_out(tmp_path):
    rows = steps(align=0, tune=30, slow=0)
    rows[3]["ce"], rows[4]["ce"] = None, math.nan
    loss = run_figure(read_metrics(write(tmp_path, rows) / "metrics.jsonl")).axes[0]
    assert list(lines(loss)[0].get_xdata()) == [i for i in range(30) if i not in (3, 4)]


def test_the_later_writing_of_a_step_counts_and_a_cut_last_line_does_not(tmp_path):
    rows = steps(align=0, tune=10)
    again = [row | {"ce": 7.0} for row in steps(align=0, tune=12)[6:]]  # stopped after 10 steps, resumed at 6
    found = read_metrics(write(tmp_path, rows + again, tail='{"step": 12, "sta') / "metrics.jsonl")
    assert [row["step"] for row in found] == list(range(12))
    assert [row["ce"] == 7 for row in found] == [False] * 6 + [True] * 6


def test_metrics_that_cannot_be_drawn_are_named(tmp_path):
    with pytest.raises(UserError, match="once it has trained"):
        draw_run(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no step yet"):
        draw_run(write(tmp_path, []))
    rows = steps(align=0, tune=3)
    del rows[1]["ce"]
    with pytest.raises(UserError, match="line 2 lacks ce"):
        draw_run(write(tmp_path, rows))
    write(tmp_path, [], tail='{"step": \n{}\n')
    with pytest.raises(UserError, match="line 1 is not JSON"):
        draw_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_text("[1]\n{}\n")
    with pytest.raises(UserError, match="line 1 lacks everything"):
        draw_run(tmp_path)
    (tmp_path / "metrics.jsonl").write_bytes(b"\xff\xfe\x00\n{}\n")
    with pytest.raises(UserError, match="line 1 is not JSON"):
        draw_run(tmp_path)
    assert not (tmp_path / "report.png").exists()


ARMS = {
    "full": (1, 98.1), "pruned-only": (4.6, 96.0), "dualspeed": (3.4, 97.4), "no isolator": (3.45, 97.2),
    "no distillation": (3.6, 97.3), "original r=0.1": (3.4, 98.4), "original r=0.05": (3.9, 98.4),
    "original r=0.02": (4.3, 98.2), "original r=0": (4.6, 96.1),
}  # fmt: skip


def comparison(seed: int = 0, seeds: int = 3, arms: dict = ARMS) -> dict:
    rng = np.random.default_rng(seed)
    runs = []
    for s in range(seeds):
        for arm, (speed, accuracy) in arms.items():
            curve = [[i, (2.5 * math.exp(-i / 200) + 0.1) * rng.uniform(0.8, 1.2), "fast"] for i in range(0, 900, 3)]
            runs.append(
                {
                    "arm": arm, "seed": s, "accuracy_full": accuracy + rng.normal(0, 0.2), "accuracy_pruned": 90.0,
                    "seconds": 600 * (1 + s) / speed * rng.uniform(0.98, 1.02), "rows": 1, "steps": 900, "curve": curve,
                }
            )  # fmt: skip
    return {"runs": runs}


@pytest.mark.parametrize("seed", range(4))
def test_nine_arms_are_all_named_and_no_name_covers_another(seed):
    texts = assert_legible(compare_figure(comparison(seed)))
    assert set(ARMS) <= texts


def test_arms_in_the_same_place_are_still_told_apart():
    arms = {name: (2.0 if i else 1.0, 98.0) for i, name in enumerate(ARMS)}
    results = comparison(arms=arms, seeds=1)
    for run in results["runs"]:
        run.update(accuracy_full=98.0, seconds=600 / arms[run["arm"]][0], curve=results["runs"][0]["curve"])
    assert set(ARMS) <= assert_legible(compare_figure(results))


def test_points_are_mean_accuracy_and_speed_over_full_of_the_same_seed(tmp_path):
    results = comparison(seeds=3)  # whose seeds take 1, 2 and 3 times as long: only pairs give the right ratio
    right = compare_figure(results).axes[1]
    at = {}
    for text in right.texts:
        if text.get_text():
            at[text.get_text()] = text.xy
    full = {run["seed"]: run["seconds"] for run in results["runs"] if run["arm"] == "full"}
    for arm, (speed, _) in ARMS.items():
        mine = [run for run in results["runs"] if run["arm"] == arm]
        assert at[arm][0] == pytest.approx(np.mean([full[run["seed"]] / run["seconds"] for run in mine]))
        assert at[arm][0] == pytest.approx(speed, rel=0.05)
        assert at[arm][1] == pytest.approx(np.mean([run["accuracy_full"] for run in mine]))
    assert at["full"][0] == 1
    assert Image.open(plots.save(compare_figure(results), tmp_path / "out.png")).size == (1560, 648)


@pytest.mark.parametrize("n", [13, 40])
@pytest.mark.parametrize("name", ["arm {}", "plugin=divprune_centred keep=0.25 positions=original {}", "$x_{}$"])
def test_many_arms_have_a_line_each_with_accuracy_and_speed(n, name):
    arms = {name.replace("{}", str(i)): (1 + i / 10, 99.0 - i / 2) for i in range(n - 1)}
    results = comparison(arms={"full": (1.0, 97.0), **arms})
    fig = compare_figure(results)
    assert {"full", *arms} <= assert_legible(fig)
    left, right = fig.axes
    fig.canvas.draw()
    heights = {text.get_text(): text.get_position()[1] * fig.bbox.height for text in fig.texts}
    full = {run["seed"]: run["seconds"] for run in results["runs"] if run["arm"] == "full"}
    for ax, value in ((left, lambda run: run["accuracy_full"]), (right, lambda r: full[r["seed"]] / r["seconds"])):
        drawn = {}
        for bar in ax.containers:
            ((x, y),) = bar.lines[0].get_xydata()
            ((low, high),) = [(a, b) for (a, _), (b, _) in bar.lines[2][0].get_segments()]
            drawn[round(ax.transData.transform((x, y))[1], 3)] = x, low, high
        for arm in ("full", *arms):
            values = [value(run) for run in results["runs"] if run["arm"] == arm]
            expected = np.mean(values), min(values), max(values)
            np.testing.assert_allclose(drawn[round(heights[arm], 3)], expected)
        assert min(x for _, x, _ in drawn.values()) >= ax.get_xlim()[0]
        assert max(x for _, _, x in drawn.values()) <= ax.get_xlim()[1]


def test_few_arms_with_long_names_have_a_line_each_too():
    arms = {f"plugin=divprune_centred keep=0.{i}": (2.0, 90.0 + i) for i in range(5)}
    results = comparison(arms=arms, seeds=1)
    fig = compare_figure(results)
    assert set(arms) | {"Time", "seconds of training", "Accuracy"} <= assert_legible(fig)


def test_without_a_full_arm_seconds_are_drawn():
    results = comparison(seeds=2)
    results["runs"] = [run for run in results["runs"] if run["arm"] != "full"]
    fig = compare_figure(results)
    texts = assert_legible(fig)
    assert "seconds of training" in texts
    assert "Accuracy against time, bars from worst to best of 2 seeds" in texts
    at = {text.get_text(): text.xy[0] for text in fig.axes[1].texts}
    seconds = [run["seconds"] for run in results["runs"] if run["arm"] == "dualspeed"]
    assert at["dualspeed"] == pytest.approx(np.mean(seconds))


def test_loss_curves_are_the_mean_over_seeds_on_the_steps_that_all_reached():
    runs = []
    for seed, n in enumerate((50, 31)):
        curve = [[step, 1.0 + seed, "full"] for step in range(n)]
        runs.append({"arm": "full", "seed": seed, "accuracy_full": 90.0, "seconds": 10.0, "curve": curve})
    (curve,) = lines(compare_figure({"runs": runs}).axes[0])
    assert (curve.get_xdata()[0], curve.get_xdata()[-1]) == (0, 30)
    np.testing.assert_allclose(curve.get_ydata(), 1.5)


def test_a_comparison_of_one_seed_without_losses_is_drawn(tmp_path):
    results = comparison(seeds=1)
    for run in results["runs"]:
        run["curve"] = []
    assert "no losses were recorded" in assert_legible(compare_figure(results))


def test_a_comparison_without_runs_is_refused(tmp_path):
    with pytest.raises(UserError, match="holds no run"):
        compare_figure({"runs": []})


def test_drawing_leaves_matplotlib_s_global_state_alone(tmp_path):
    import matplotlib.pyplot as plt

    before = dict(plt.rcParams)
    plots.save(compare_figure(comparison(seeds=1)), tmp_path / "out.png")
    assert plt.get_fignums() == []
    assert dict(plt.rcParams) == before


def test_pictures_are_saved_where_they_can_be(tmp_path):
    assert save(figure(1, 1), tmp_path / "a" / "b.svg").is_file()
    assert save(figure(1, 1), tmp_path / "bare") == tmp_path / "bare.png"
    assert (tmp_path / "bare.png").is_file()
    with pytest.raises(UserError, match="choose a name"):
        save(figure(1, 1), tmp_path / "c.docx")
    with pytest.raises(UserError, match="cannot write the picture"):
        save(figure(1, 1), tmp_path / "bare.png" / "d.png")
