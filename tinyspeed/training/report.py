"""The picture of a run: loss, rows and seconds over its steps.

    draw_run("runs/demo")       metrics.jsonl -> report.png

The losses drawn are cross-entropies, since the loss of a slow step also has the distillation term. Fast and slow steps
are smoothed separately, because they see different rows.
"""

import itertools
from datetime import timedelta
from pathlib import Path

import numpy as np

from ..util import counted, paths
from ..util.plots import GREY, figure, fit_scale, label_ends, plain_axes, save, smooth
from .metrics import read_metrics

MODES = {  # mode -> how its curve and its single steps are drawn
    "full": {"color": "#000000", "linestyle": (0, (6, 2, 1, 2)), "marker": "s"},
    "fast": {"color": "#0072B2", "linestyle": "-", "marker": "."},
    "slow": {"color": "#D55E00", "linestyle": (0, (4, 1.5)), "marker": "^"},
}


def draw_run(folder: Path | str) -> Path:
    """Draws folder/metrics.jsonl as folder/report.png."""
    folder = Path(folder)
    paths.require_plain(folder, own=True)
    return save(run_figure(read_metrics(folder / "metrics.jsonl"), folder.resolve().name), folder / "report.png")


def run_figure(steps: list[dict], name: str = "run"):
    """Loss, rows and seconds over the steps of a run, as a matplotlib Figure."""
    fig = figure(8.5, 9)
    axes = loss, rows, time = fig.subplots(3, 1, sharex=True, gridspec_kw={"height_ratios": [3, 2, 2]})
    fig.subplots_adjust(left=0.1, right=0.84, top=0.91, bottom=0.06, hspace=0.24)
    for ax in axes:
        plain_axes(ax)
    x, seconds = _column(steps, "step"), _column(steps, "seconds")
    loss.set_xlim(x[0] - 0.5, x[-1] + 0.5)
    stages = list(dict.fromkeys(step["stage"] for step in steps))
    modes = [mode for mode in MODES if any(step["mode"] == mode for step in steps)]
    title = f"{name}: {counted(len(steps), 'step')} in {timedelta(seconds=round(seconds[-1]))}"
    fig.suptitle(title.encode(errors="replace").decode(), x=0.1, ha="left", weight="bold", parse_math=False)

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
    fit_scale(loss, heights)
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
    rows.set_ylabel("tokens a step")
    rows.set_title(f"Tokens through the LLM: {kept.sum() / max(full.sum(), 1):.0%} of full training's", loc="left")
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
            how = {"xycoords": ("data", "axes fraction"), "textcoords": "offset points", "fontsize": 9, "color": GREY}
            loss.annotate(text, (border, 1), (gap, 4), ha=side, **how)
    return fig


def _column(steps: list[dict], key: str) -> np.ndarray:
    return np.array([step.get(key) for step in steps], dtype=float)  # None becomes nan
