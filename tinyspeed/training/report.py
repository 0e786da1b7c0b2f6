"""What a run looked like: its picture, the picture of a comparison, and tables.

    draw_run("runs/demo")               metrics.jsonl -> report.png: loss, rows and seconds, step by step
    draw_compare(results, "out.png")    how every arm learns, and what its speed costs in accuracy
    table(headers, rows)                the tables that the commands print; they are Markdown too

The losses drawn are cross-entropies: a slow step's whole loss holds the distillation term too. Fast and slow steps are
smoothed apart, since they see different rows. Curves and points are named where they lie, never in a legend, and differ
by dash and marker as well as by colour, for grey printers and colour-blind eyes. matplotlib is imported when something
is drawn, and its global state is never touched.
"""

import itertools
import json
import math
import re
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import numpy as np

from ..util import files
from ..util.errors import UserError, counted
from ..util.plots import label_ends, label_points

DPI = 120
# Okabe and Ito's colours, the pale ones darkened so that names can be written in them. With each goes a dash and a
# marker; the three cycles have lengths 7, 4 and 9, so no two of the first 252 arms look alike.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#008060", "#AA4499", "#8C6500", "#777777")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 2, 1, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")
MODES = {  # mode -> how its curve and its single steps are drawn
    "full": {"color": "#000000", "linestyle": (0, (6, 2, 1, 2)), "marker": "s"},
    "fast": {"color": "#0072B2", "linestyle": "-", "marker": "."},
    "slow": {"color": "#D55E00", "linestyle": (0, (4, 1.5)), "marker": "^"},
}
GREY = "#666666"
CROWD, LONG = 12, 20  # from more arms, or longer names, on a comparison is drawn a line an arm


def table(headers: Sequence[str], rows: Sequence[Sequence]) -> str:
    """A monospaced table that is valid GitHub Markdown. Columns of numbers ("3.1x", "98.4 %" and blanks included)
    are aligned to the right."""
    cells = [[_cell(c) for c in row] for row in (headers, *rows)]
    assert all(len(row) == len(headers) for row in cells), "every row needs one cell a header"
    columns = list(zip(*cells, strict=True))
    widths = [max(3, *map(len, column)) for column in columns]
    right = [len(c) > 1 and any(c[1:]) and all(_NUMBER.fullmatch(text) for text in c[1:] if text) for c in columns]

    def line(texts: Sequence[str]) -> str:
        padded = (t.rjust(w) if r else t.ljust(w) for t, w, r in zip(texts, widths, right, strict=True))
        return f"| {' | '.join(padded)} |"

    rule = ["-" * (w - 1) + ":" if r else "-" * w for w, r in zip(widths, right, strict=True)]
    return "\n".join([line(cells[0]), f"| {' | '.join(rule)} |", *map(line, cells[1:])])


# A number, its unit, and how sure one is of it: 12, -3.4e-5, 1,234, 3.1x, 98.4 %, 98.4 ± 0.2, 9.1 (8.8 to 9.3), nan, -
_NUMBER = re.compile(
    r"[<>~]?[-+]?(\d[\d,]*\.?\d*(e[-+]?\d+)?( ?± ?[\d.]+)?( ?(%|[a-zA-Z/]{1,5}))?( \([^()]*\))?|nan|inf)|-"
)


def _cell(value) -> str:
    text = "" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
    return " ".join(text.split()).replace("|", "\\|")


def draw_run(folder: Path | str) -> Path:
    """Draw folder/metrics.jsonl as folder/report.png."""
    folder = Path(folder)
    return save(run_figure(read_metrics(folder / "metrics.jsonl"), folder.resolve().name), folder / "report.png")


NEEDED = ("step", "stage", "mode", "ce", "rows_kept", "rows_taught", "rows_full", "seconds")


def read_metrics(path: Path) -> list[dict]:
    """The steps of a metrics.jsonl in order. Of a step written twice the later writing counts; the last line may be
    cut short by a crash, no other may."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; a run's folder holds metrics.jsonl once it has trained") from error
    steps: dict[int, dict] = {}
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            if number == len(lines):
                break
            raise UserError(f"{path}, line {number} is not JSON: {error.msg}; delete the line to go on") from error
        missing = [key for key in NEEDED if key not in row] if isinstance(row, dict) else ["everything"]
        if missing:
            raise UserError(f"{path}, line {number} lacks {', '.join(missing)}: was it written by tinyspeed train?")
        steps[row["step"]] = row
    if not steps:
        raise UserError(f"{path} holds no step yet: train for at least one step first")
    return [steps[step] for step in sorted(steps)]


def run_figure(steps: list[dict], name: str = "run"):
    """Loss, rows and seconds over the steps of a run, as a matplotlib Figure."""
    fig = figure(8.5, 9)
    axes = loss, rows, time = fig.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2, 2]})
    fig.subplots_adjust(left=0.1, right=0.84, top=0.91, bottom=0.06, hspace=0.24)
    for ax in axes:
        _plain(ax)
    x, seconds = _column(steps, "step"), _column(steps, "seconds")
    loss.set_xlim(x[0] - 0.5, x[-1] + 0.5)
    stages = list(dict.fromkeys(step["stage"] for step in steps))
    modes = [mode for mode in MODES if any(step["mode"] == mode for step in steps)]
    title = f"{name}: {counted(len(steps), 'step')} in {timedelta(seconds=round(seconds[-1]))}"
    fig.suptitle(title, x=0.1, ha="left", weight="bold", parse_math=False)

    # Loss: pale single steps, and a smooth curve for each mode of each stage
    ends, heights = {}, []
    for mode, stage in itertools.product(modes, stages):
        chosen = [s for s in steps if (s["mode"], s["stage"]) == (mode, stage)]
        at, ce = _column(chosen, "step"), _column(chosen, "ce")
        at, ce = at[np.isfinite(ce)], ce[np.isfinite(ce)]
        if len(at):
            curve = smooth(ce)
            loss.plot(at, ce, **MODES[mode] | {"linestyle": "", "alpha": 0.2, "markersize": 3.5})
            loss.plot(at, curve, **MODES[mode] | {"marker": "." if len(at) == 1 else "", "linewidth": 1.8})
            heights += list(curve)
            ends[mode] = (at[-1], curve[-1], mode, MODES[mode]["color"])
    _scale(loss, heights)
    loss.set_ylabel("cross-entropy of the answers")
    loss.set_title("Loss, smoothed", loc="left", pad=6 if len(stages) == 1 else 18)
    if ends:
        label_ends(loss, list(ends.values()))

    # Rows, the teacher's included: the gap to the dashed line is what was saved
    kept, full = _column(steps, "rows_kept") + _column(steps, "rows_taught"), _column(steps, "rows_full")
    rows.plot(x, smooth(full), color=GREY, linestyle=(0, (5, 2)), linewidth=1.5, marker="_" if len(x) == 1 else "")
    ends = [(x[-1], smooth(full)[-1], "without pruning", GREY)]
    for mode in modes:
        mine = np.array([step["mode"] == mode for step in steps])
        rows.plot(x[mine], kept[mine], **MODES[mode] | {"linestyle": "", "markersize": 3.5})
        ends.append((x[mine][-1], kept[mine][-1], mode, MODES[mode]["color"]))
    rows.set_ylim(0, 1.1 * max(full.max(), kept.max(), 1))
    rows.yaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    rows.set_ylabel("rows a step")
    rows.set_title(f"Rows through the LLM: {kept.sum() / max(full.sum(), 1):.0%} of full training's", loc="left")
    label_ends(rows, ends)

    # Seconds
    units = {"hours": 3600, "minutes": 60, "seconds": 1}
    unit_name, unit = next((n, u) for n, u in units.items() if seconds[-1] >= 5 * u or u == 1)
    speedup = _column(steps, "speedup")
    measured = np.isfinite(speedup)
    time.plot(x, seconds / unit, color="#0072B2", linewidth=1.8, marker="." if len(x) == 1 else "")
    ends = [(x[-1], seconds[-1] / unit, "this run", "#0072B2")]
    title = "Time: speed-up not measured"
    if measured.any():
        estimate = (seconds * speedup / unit)[measured]
        time.plot(x[measured], estimate, color=GREY, linestyle=(0, (5, 2)), linewidth=1.5)
        ends.append((x[measured][-1], estimate[-1], "if every step\nwere full", GREY))
        title = f"Time: estimated speed-up {speedup[measured][-1]:.2f}x"
    time.set_ylim(0, 1.08 * max(y for _, y, *_ in ends) or 1)
    time.set_ylabel(unit_name)
    time.set_xlabel("step")
    time.set_title(title, loc="left")
    time.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    label_ends(time, ends)

    for before, after in itertools.pairwise(stages):
        border = next(step["step"] for step in steps if step["stage"] == after) - 0.5
        for ax in axes:
            ax.axvline(border, color=GREY, linewidth=0.8)
        for text, side, gap in ((f"{before} ◂", "right", -4), (f"▸ {after}", "left", 4)):
            loss.annotate(
                text, (border, 1), (gap, 4), xycoords=("data", "axes fraction"), textcoords="offset points", ha=side,
                fontsize=9, color=GREY,
            )  # fmt: skip
    return fig


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
    _plain(left)
    left.set_title(f"Training loss, smoothed{each}", loc="left")
    left.set_xlabel("step")
    left.set_ylabel("cross-entropy of the answers")
    _scale(left, heights)
    if ends:
        left.set_xlim(right=max(x for x, *_ in ends))
        label_ends(left, ends)
    else:
        left.text(0.5, 0.5, "no losses were recorded", transform=left.transAxes, ha="center", color=GREY)
    _plain(right)
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
        _plain(ax)
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


def figure(width: float, height: float):
    """An empty matplotlib Figure (inches) that draws itself and knows nothing of windows or pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(fig)
    return fig


def save(fig, out: Path | str) -> Path:
    """Write a Figure where the user wants it, in the format that the file's name asks for."""
    out = Path(out) if Path(out).suffix else Path(f"{out}.png")
    try:
        with files.about(out):
            out.parent.mkdir(parents=True, exist_ok=True)
        with files.atomic(out) as temporary:
            fig.savefig(temporary, dpi=DPI, format=out.suffix[1:])
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot write the picture {out}: {error.strerror}") from error
    except ValueError as error:  # matplotlib's word for an unknown suffix
        raise UserError(f"cannot write the picture {out}: choose a name that ends in .png, .svg or .pdf") from error
    return out


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over a twentieth of the values, and of few values over at least 15 or a third of them.
    At the ends half of its window is missing, which bends the curve a little and keeps the last value trustworthy."""
    n = len(values)
    half = max(n // 20, min(n // 3, 15)) // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    low, high = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half + 1, n)
    return (total[high] - total[low]) / (high - low)


def _column(steps: list[dict], key: str) -> np.ndarray:
    return np.array([step.get(key) for step in steps], dtype=float)  # None becomes nan


def _plain(ax) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)


def _scale(ax, heights: list[float]) -> None:
    """Show the curves, whatever single steps do; logarithmically where they fall far."""
    low, high = min(heights, default=0), max(heights, default=1)
    if low > 0 and high / low > 8:
        ax.set_yscale("log")
        ax.set_ylim(low / 1.3, high * 1.3)
        ax.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
        ax.yaxis.get_minor_locator().set_params(subs=())
        ax.yaxis.set_major_formatter(lambda value, _: f"{value:g}")
    else:
        pad = 0.08 * (high - low) or 0.1 * abs(high) or 1
        ax.set_ylim(low - pad, high + pad)
