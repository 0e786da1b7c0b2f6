"""The picture of a comparison: how every arm learns, and what its speed costs in accuracy.

Of more arms than can be told apart, each gets a line of its own instead of a colour.
"""

import math
from pathlib import Path

import numpy as np

from ..util.errors import UserError
from ..util.plots import (
    COLOURS,
    DASHES,
    DPI,
    GREY,
    MARKERS,
    figure,
    fit_scale,
    label_ends,
    label_points,
    plain_axes,
    save,
    smooth,
)

CROWD, LONG = 12, 20  # from more arms, or longer names, on a comparison is drawn a line an arm


def draw_compare(results: dict, out: Path | str) -> Path:
    """Draw the runs of a comparison: {"runs": [{"arm", "seed", "accuracy_full", "seconds", "curve": [[step, ce,
    mode], ...]}, ...]}. Speed is measured against the arm "full", seed by seed; without one, seconds are drawn."""
    return save(compare_figure(results), out)


def compare_figure(results: dict):
    """Left: how the loss of every arm falls. Right: its accuracy against its speed. Of more arms than can be told apart
    so: a line an arm, its accuracy and its speed. A matplotlib Figure."""
    runs = results.get("runs") or []
    if not runs:
        raise UserError("the comparison holds no run: nothing to draw")
    arms = list(dict.fromkeys(run["arm"] for run in runs))
    full = {run["seed"]: run["seconds"] for run in runs if run["arm"] == "full"}
    usual = np.mean(list(full.values())) if full else None  # for a seed that the full arm did not run

    def measured(arm: str) -> tuple[np.ndarray, np.ndarray]:
        """Speed (or, without the arm `full`, seconds) and accuracy of its seeds."""
        mine = [run for run in runs if run["arm"] == arm]
        speed = [full.get(run["seed"], usual) / run["seconds"] if full else run["seconds"] for run in mine]
        return np.array(speed), np.array([run["accuracy_full"] for run in mine], dtype=float)

    if len(arms) > CROWD or max(map(len, arms)) > LONG:
        return _lines_figure({arm: measured(arm) for arm in arms}, bool(full), len({run["seed"] for run in runs}))
    fig = figure(13, 5.4)
    left, right = fig.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.1]})
    fig.subplots_adjust(left=0.055, right=0.985, top=0.91, bottom=0.11, wspace=0.42)
    ends, heights, points, spans = [], [], [], []
    for i, arm in enumerate(arms):
        mine = [run for run in runs if run["arm"] == arm]
        colour, marker = COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]
        curve = _mean_curve([run["curve"] for run in mine])
        if curve is not None:
            at, ce = curve
            left.plot(
                at, ce, color=colour, linestyle=DASHES[i % len(DASHES)], linewidth=1.5, marker=marker, markersize=4.5,
                markevery=(0.05 + 0.1 * (i % 9) / 9, 0.2),
            )  # fmt: skip
            ends.append((at[-1], ce[-1], arm, colour))
            heights += list(ce)
        speed, accuracy = measured(arm)
        x, y = speed.mean(), accuracy.mean()
        right.errorbar(
            x, y, [[y - accuracy.min()], [accuracy.max() - y]], [[x - speed.min()], [speed.max() - x]],
            color=colour, marker=marker, markersize=7, linestyle="", elinewidth=1, capsize=2.5,
        )  # fmt: skip
        points.append((x, y, arm, colour))
        spans.append((speed.min(), accuracy.min(), speed.max(), accuracy.max()))

    seeds = len({run["seed"] for run in runs})
    each = f", mean of {seeds} seeds" if seeds > 1 else ""
    plain_axes(left)
    left.set_title(f"Training loss, smoothed{each}", loc="left")
    left.set_xlabel("step")
    left.set_ylabel("cross-entropy of the answers")
    fit_scale(left, heights)
    if ends:
        left.set_xlim(right=max(x for x, *_ in ends))
        label_ends(left, ends)
    else:
        left.text(0.5, 0.5, "no losses were recorded", transform=left.transAxes, ha="center", color=GREY)
    plain_axes(right)
    bars = f", bars from worst to best of {seeds} seeds" if seeds > 1 else ""
    right.set_title(f"Accuracy against {'speed' if full else 'time'}{bars}", loc="left")
    right.set_xlabel("training speed-up over full" if full else "seconds of training")
    right.set_ylabel("accuracy on full tokens, %")
    right.margins(0.16, 0.3)
    _wrong_answers(right.yaxis, min(span[1] for span in spans), max(span[3] for span in spans))
    if full:
        right.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    label_points(right, points, spans)
    return fig


def _lines_figure(arms: dict[str, tuple[np.ndarray, np.ndarray]], speeds: bool, seeds: int):
    """Accuracy and speed of each arm on a line of its own: the mean of the seeds, and from worst to best."""
    names = list(arms)
    fig = figure(13, 1.3 + 0.2 * len(names))
    labels = [fig.text(0, 0, name, fontsize=9, va="center", ha="right", parse_math=False) for name in names]
    wide = max(label.get_window_extent().width for label in labels) / DPI + 0.25
    fig.set_size_inches(9 + wide, fig.get_figheight())
    tall = fig.get_figheight()
    left, right = fig.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [1.25, 1]})
    fig.subplots_adjust(
        left=wide / (9 + wide), right=1 - 0.2 / (9 + wide), top=1 - 0.45 / tall, bottom=0.65 / tall, wspace=0.06
    )
    bars = f", bars from worst to best of {seeds} seeds" if seeds > 1 else ""
    left.set_title(f"Accuracy{bars}", loc="left")
    left.set_xlabel("accuracy on full tokens, %")
    right.set_title("Speed" if speeds else "Time", loc="left")
    right.set_xlabel("training speed-up over full" if speeds else "seconds of training")
    for ax, which in ((left, 1), (right, 0)):
        plain_axes(ax)
        ax.grid(axis="y", color="#eeeeee", linewidth=0.6)
        ax.grid(axis="x", color="#dddddd", linewidth=0.6)
        ax.tick_params(axis="y", length=0, labelleft=False)
        for at, name in enumerate(names):
            values = arms[name][which]
            mean = values.mean()
            ax.errorbar(
                mean, at, xerr=[[mean - values.min()], [values.max() - mean]], color=COLOURS[name != "full"],
                marker="os"[name == "full"], markersize=5.5, linestyle="", elinewidth=1, capsize=2.5,
            )  # fmt: skip
        if "full" in arms:  # what all are measured against
            ax.axvline(arms["full"][which].mean(), color=COLOURS[0], linewidth=0.8, linestyle=DASHES[2], zorder=0.9)
    left.set_yticks(range(len(names)))
    left.set_ylim(len(names) - 0.5, -0.5)
    every = np.concatenate([accuracy for _, accuracy in arms.values()])
    _wrong_answers(left.xaxis, every.min(), every.max())
    if speeds:
        right.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")
    for at, label in enumerate(labels):
        _, y = left.transData.transform((0, at))
        label.set_position(((wide - 0.1) / (9 + wide), y / (tall * DPI)))
    return fig


def _wrong_answers(axis, low: float, high: float) -> None:
    """Accuracies by their wrong answers, logarithmically: 97 differs from 98 % as 40 from 60 %, and one bad arm does
    not flatten the others."""
    forth, back = (lambda a: -np.log(np.maximum(100.5 - a, 0.05))), (lambda v: 100.5 - np.exp(-v))
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    set_scale("function", functions=(forth, back))
    axis.set_ticks([t for t in (0, 25, 50, 70, 80, 90, 95, 97, 98, 99, 100) if low - 5 <= t <= high + 1])


def _mean_curve(curves: list[list]) -> tuple[np.ndarray, np.ndarray] | None:
    """Smoothed, then averaged over the seeds on the steps that all of them reached. Fast and slow steps go into one
    curve: in one arm their mixture stays the same from beginning to end."""
    smoothed = []
    for curve in curves:
        points = np.array([(step, ce) for step, ce, *_ in curve if ce is not None and math.isfinite(ce)], dtype=float)
        if len(points):
            points = points[points[:, 0].argsort(kind="stable")]
            smoothed.append((points[:, 0], smooth(points[:, 1])))
    if not smoothed:
        return None
    low, high = max(at[0] for at, _ in smoothed), min(at[-1] for at, _ in smoothed)
    at = np.linspace(low, high, 200) if high > low else np.array([low])
    return at, np.mean([np.interp(at, *curve) for curve in smoothed], axis=0)
