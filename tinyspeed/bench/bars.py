"""The picture of a benchmark: a panel for each case, and in it a bar for each contestant.

The dark part of a bar is its floor, where one is known. Our contestants are blue and the others black, so the two
differ without colours too.
"""

from dataclasses import dataclass

from ..util import plots


@dataclass(frozen=True)
class Bar:
    name: str
    length: float
    note: str = ""  # written behind the bar
    dark: float = 0.0  # how much of the bar is dark
    ours: bool = True


def draw(panels: dict[str, list[Bar]], unit: str):
    """Draws the same contestants from top to bottom in every panel. One that a panel lacks leaves a gap there."""
    names = list(dict.fromkeys(bar.name for bars in panels.values() for bar in bars))
    left, right = 0.3 + 0.075 * max(map(len, names)), 0.3  # inches
    width, height = left + 3.2 * len(panels) + right, 1.1 + 0.3 * len(names)
    fig = plots.figure(width, height)
    axes = fig.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    fig.subplots_adjust(
        left=left / width, right=1 - right / width, top=1 - 0.45 / height, bottom=0.6 / height, wspace=0.12
    )
    for ax, (title, bars) in zip(axes, panels.items(), strict=True):
        for bar in bars:
            at, colour = names.index(bar.name), plots.COLOURS[bar.ours]
            ax.barh(at, bar.length, color=colour, alpha=0.35)
            ax.barh(at, bar.dark, color=colour)
            ax.text(bar.length, at, f" {bar.note}", va="center", color=colour)
        ax.set_yticks(range(len(names)), names)
        ax.set_ylim(len(names) - 0.5, -0.5)
        ax.margins(x=0.2)
        ax.set_xlim(left=0)
        ax.set_title(title, loc="left")
        ax.set_xlabel(unit)
        ax.spines[["top", "right"]].set_visible(False)
    return fig
