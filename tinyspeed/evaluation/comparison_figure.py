"""The picture of a comparison: how the loss of every arm falls, and what its speed costs in accuracy.

Where there are more arms than can be told apart by colour, each gets a line of its own with its accuracy and its speed.
Speed is measured against the arm "full", seed by seed; without that arm seconds are drawn.
"""

import math

import numpy as np

from ..util import plots, require

CROWD, LONG = 12, 20  # with more arms, or longer names, every arm gets a line of its own


def compare_figure(results: dict):
    """Returns the figure of the runs of a comparison, {"runs": [{"arm", "seed", "accuracy_full", "seconds", "curve":
    [[step, ce, mode], ...]}, ...]}."""
    runs = results.get("runs") or []
    require(bool(runs), "the comparison holds no run: nothing to draw")
    arms = {arm: [run for run in runs if run["arm"] == arm] for arm in dict.fromkeys(run["arm"] for run in runs)}
    full = {run["seed"]: run["seconds"] for run in arms.get("full", ())}
    usual = np.mean(list(full.values())) if full else None  # for a seed that the full arm did not run
    measured = {}  # arm: speed (or seconds) and accuracy of its seeds
    for arm, mine in arms.items():
        speed = [full.get(run["seed"], usual) / run["seconds"] if full else run["seconds"] for run in mine]
        measured[arm] = np.array(speed), np.array([run["accuracy_full"] for run in mine], dtype=float)
    seeds = len({run["seed"] for run in runs})
    if len(arms) > CROWD or max(map(len, arms)) > LONG:
        return _lines_figure(measured, bool(full), seeds)

    fig = plots.figure(13, 5.4)
    left, right = fig.subplots(1, 2, gridspec_kw={"width_ratios": [1, 1.1]})
    fig.subplots_adjust(left=0.055, right=0.89, top=0.91, bottom=0.11, wspace=0.42)
    for ax in (left, right):
        plots.plain_axes(ax)
    _draw_losses(left, {arm: [run["curve"] for run in mine] for arm, mine in arms.items()}, seeds)
    points = []
    for i, (arm, (speed, accuracy)) in enumerate(measured.items()):
        colour, marker, _ = _style(i)
        x, y = speed.mean(), accuracy.mean()
        _error_bar(right, x, y, xerr=_spread(speed), yerr=_spread(accuracy), color=colour, marker=marker, markersize=7)
        points.append((x, y, arm, colour))
    right.set_title(f"Accuracy against {'speed' if full else 'time'}{_bars_of(seeds)}", loc="left")
    _label_speed(right, bool(full))
    right.set_ylabel("accuracy on full tokens, %")
    right.margins(0.08, 0.3)
    _scale_by_wrong_answers(right.yaxis, [accuracy for _, accuracy in measured.values()])
    plots.label_ends(right, points)
    return fig


def _draw_losses(ax, curves: dict[str, list[list]], seeds: int) -> None:
    """Draws the mean loss of every arm over its seeds, and its name at the end of the curve."""
    ends, heights = [], []
    for i, (arm, mine) in enumerate(curves.items()):
        colour, marker, dashes = _style(i)
        if (curve := _mean_curve(mine)) is None:
            continue
        at, ce = curve
        spots = (0.05 + 0.1 * (i % 9) / 9, 0.2)  # markers of different arms seldom cover each other
        look = {"color": colour, "linestyle": dashes, "linewidth": 1.5, "marker": marker, "markersize": 4.5}
        ax.plot(at, ce, **look, markevery=spots)
        ends.append((at[-1], ce[-1], arm, colour))
        heights += list(ce)
    ax.set_title(f"Training loss, smoothed{f', mean of {seeds} seeds' if seeds > 1 else ''}", loc="left")
    ax.set_xlabel("step")
    ax.set_ylabel("cross-entropy of the answers")
    plots.fit_scale(ax, heights)
    if ends:
        ax.set_xlim(right=max(x for x, *_ in ends))
        plots.label_ends(ax, ends)
    else:
        ax.text(0.5, 0.5, "no losses were recorded", transform=ax.transAxes, ha="center", color=plots.GREY)


def _lines_figure(arms: dict[str, tuple[np.ndarray, np.ndarray]], speeds: bool, seeds: int):
    """Accuracy and speed of each arm on a line of its own: the mean of the seeds, and from worst to best."""
    fig = plots.figure(13, 1.3 + 0.2 * len(arms))
    labels = [fig.text(0, 0, name, fontsize=9, va="center", ha="right", parse_math=False) for name in arms]
    names_width = max(label.get_window_extent().width for label in labels) / plots.DPI + 0.25  # inches
    width, height = 9 + names_width, fig.get_figheight()
    fig.set_size_inches(width, height)
    left, right = fig.subplots(1, 2, sharey=True, gridspec_kw={"width_ratios": [1.25, 1]})
    fig.subplots_adjust(
        left=names_width / width, right=1 - 0.2 / width, top=1 - 0.45 / height, bottom=0.65 / height, wspace=0.06
    )
    left.set_title(f"Accuracy{_bars_of(seeds)}", loc="left")
    left.set_xlabel("accuracy on full tokens, %")
    right.set_title("Speed" if speeds else "Time", loc="left")
    _label_speed(right, speeds)
    for ax, which in ((left, 1), (right, 0)):
        plots.plain_axes(ax)
        ax.grid(axis="y", color="#eeeeee", linewidth=0.6)
        ax.grid(axis="x", color="#dddddd", linewidth=0.6)
        ax.tick_params(axis="y", length=0, labelleft=False)
        for at, (name, values) in enumerate(arms.items()):
            is_full, mean, spread = name == "full", values[which].mean(), _spread(values[which])
            look = {"color": plots.COLOURS[not is_full], "marker": plots.MARKERS[is_full], "markersize": 5.5}
            _error_bar(ax, mean, at, xerr=spread, **look)
        if "full" in arms:  # all others are measured against it
            mean = arms["full"][which].mean()
            ax.axvline(mean, color=plots.COLOURS[0], linewidth=0.8, linestyle=plots.DASHES[2], zorder=0.9)
    left.set_yticks(range(len(arms)))
    left.set_ylim(len(arms) - 0.5, -0.5)
    _scale_by_wrong_answers(left.xaxis, [accuracy for _, accuracy in arms.values()])
    for at, label in enumerate(labels):
        _, y = left.transData.transform((0, at))
        label.set_position(((names_width - 0.1) / width, y / (height * plots.DPI)))
    return fig


def _style(i: int) -> tuple:
    """Returns colour, marker and dashes of the i-th arm."""
    return tuple(cycle[i % len(cycle)] for cycle in (plots.COLOURS, plots.MARKERS, plots.DASHES))


def _spread(values: np.ndarray) -> list[list[float]]:
    """Returns how far the lowest and the highest value are from the mean."""
    return [[values.mean() - values.min()], [values.max() - values.mean()]]


def _error_bar(ax, x: float, y: float, **look) -> None:
    ax.errorbar(x, y, linestyle="", elinewidth=1, capsize=2.5, **look)


def _bars_of(seeds: int) -> str:
    return f", bars from worst to best of {seeds} seeds" if seeds > 1 else ""


def _label_speed(ax, speeds: bool) -> None:
    ax.set_xlabel("training speed-up over full" if speeds else "seconds of training")
    if speeds:
        ax.xaxis.set_major_formatter(lambda value, _: f"{value:g}x")


def _scale_by_wrong_answers(axis, accuracies: list[np.ndarray]) -> None:
    """Scales an axis of accuracies by the logarithm of the wrong answers: 97 is as far from 98 % as 40 from 60 %, and
    one bad arm does not flatten the others."""
    forth, back = (lambda a: -np.log(np.maximum(100.5 - a, 0.05))), (lambda v: 100.5 - np.exp(-v))
    set_scale = axis.axes.set_xscale if axis.axis_name == "x" else axis.axes.set_yscale
    set_scale("function", functions=(forth, back))
    low, high = min(a.min() for a in accuracies), max(a.max() for a in accuracies)
    axis.set_ticks([t for t in (0, 25, 50, 70, 80, 90, 95, 97, 98, 99, 100) if low - 5 <= t <= high + 1])


def _mean_curve(curves: list[list]) -> tuple[np.ndarray, np.ndarray] | None:
    """Smooths each curve, and averages them over the steps that all of them reached. Fast and slow steps go into one
    curve, since an arm mixes them in the same way from beginning to end."""
    smoothed = []
    for curve in curves:
        points = np.array([(step, ce) for step, ce, *_ in curve if ce is not None and math.isfinite(ce)], dtype=float)
        if len(points):
            points = points[points[:, 0].argsort(kind="stable")]
            smoothed.append((points[:, 0], plots.smooth(points[:, 1])))
    if not smoothed:
        return None
    low, high = max(at[0] for at, _ in smoothed), min(at[-1] for at, _ in smoothed)
    at = np.linspace(low, high, 200) if high > low else np.array([low])
    return at, np.mean([np.interp(at, *curve) for curve in smoothed], axis=0)
