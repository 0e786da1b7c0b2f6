"""Plots: figures that need no window, one set of colours, and names written next to what they name.

A legend makes one look to and fro, and colours alone fail on grey printers. So names stand to the right of the axes,
each as near as possible to the height of its curve's end or of its point, and a thin line leads there. Distances are
measured in pixels, on the drawing as it will be saved.
"""

from pathlib import Path

import numpy as np

from . import files
from .errors import UserError

DPI = 120
GREY = "#666666"
# Okabe and Ito's colours, the pale ones darkened so that names can be written in them. Each goes with a dash and a
# marker. The three cycles have lengths 7, 4 and 9, so no two of the first 252 arms look alike.
COLOURS = ("#000000", "#0072B2", "#D55E00", "#008060", "#AA4499", "#8C6500", "#777777")
DASHES = ("-", (0, (5, 2)), (0, (1, 1.3)), (0, (6, 2, 1, 2)))
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "<", ">")


def figure(width: float, height: float):
    """An empty matplotlib Figure, in inches, that draws itself without a window or pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=(width, height), dpi=DPI)
    FigureCanvasAgg(fig)
    return fig


def save(fig, out: Path | str) -> Path:
    """Writes a Figure to a file, in the format that its name asks for."""
    out = Path(out) if Path(out).suffix else Path(f"{out}.png")
    try:
        with files.atomic(out) as temporary:
            fig.savefig(temporary, dpi=DPI, format=out.suffix[1:])
    except UserError:
        raise
    except OSError as error:
        raise UserError(f"cannot write the picture {out}: {error.strerror}") from error
    except ValueError as error:  # matplotlib does not know the suffix
        raise UserError(f"cannot write the picture {out}: choose a name that ends in .png, .svg or .pdf") from error
    return out


def smooth(values: np.ndarray) -> np.ndarray:
    """A centred running mean over a twentieth of the values, but of few values over at least 15 or a third of them. At
    both ends half of its window is missing, which bends the curve a little but leaves its last value honest."""
    n = len(values)
    half = max(n // 20, min(n // 3, 15)) // 2
    total = np.concatenate([[0.0], np.cumsum(values)])
    low, high = np.maximum(np.arange(n) - half, 0), np.minimum(np.arange(n) + half + 1, n)
    return (total[high] - total[low]) / (high - low)


def plain_axes(ax) -> None:
    ax.spines[["top", "right"]].set_visible(False)
    ax.grid(axis="y", color="#dddddd", linewidth=0.6)
    ax.set_axisbelow(True)


def fit_scale(ax, heights: list[float]) -> None:
    """Fits the y-axis to these heights of the smooth curves, not to single steps; logarithmic if they fall far."""
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


def label_ends(ax, ends: list[tuple[float, float, str, str]]) -> None:
    """Writes each name to the right of the axes, at the height of its point (x, y, name, colour) or as near to it as
    the other names leave room; a thin line leads there."""
    ax.figure.canvas.draw()  # settles the limits of the axes
    box = ax.get_window_extent()
    ends = sorted(ends, key=lambda end: (end[1], end[0]))
    wanted = np.array([ax.transData.transform((x, y))[1] for x, y, *_ in ends]).clip(box.y0, box.y1)
    tall = np.array([12.5 * ax.figure.dpi / 72 * (1 + text.count("\n")) for *_, text, _ in ends])
    for (x, y, text, colour), height in zip(ends, _spread(wanted, tall, box.y0, box.y1), strict=True):
        line = {"arrowstyle": "-", "color": colour, "linewidth": 0.6, "shrinkA": 1, "shrinkB": 2, "relpos": (0, 0.5)}
        ax.annotate(
            text, (x, y), (1.035, (height - box.y0) / box.height), xycoords="data", textcoords="axes fraction",
            va="center", fontsize=9, color=colour, annotation_clip=False, parse_math=False, arrowprops=line,
        )  # fmt: skip


def _spread(wanted: np.ndarray, tall: np.ndarray, low: float, high: float) -> np.ndarray:
    """Ascending heights near the wanted (ascending) ones, at which labels `tall` high do not touch and stay within
    low .. high if there is room at all. Labels that would touch are pooled into a block around its mean."""
    gaps = np.concatenate([[0.0], (tall[:-1] + tall[1:]) / 2]).cumsum()
    blocks: list[list[float]] = []  # [mean of (wanted - gap), members]
    for value in wanted - gaps:  # isotonic regression: where two labels touch, these are equal
        blocks.append([value, 1])
        while len(blocks) > 1 and blocks[-2][0] > blocks[-1][0]:
            mean, n = blocks.pop()
            blocks[-1] = [(blocks[-1][0] * blocks[-1][1] + mean * n) / (blocks[-1][1] + n), blocks[-1][1] + n]
    placed = np.concatenate([[mean] * n for mean, n in blocks]).clip(low, max(low, high - gaps[-1]))
    return placed + gaps
