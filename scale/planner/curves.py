"""Two panels of curves over the number of GPUs or ranks, each curve named where it ends."""

from tinyspeed.util import plots

Curve = tuple[str, list[float], dict]  # its name, its values, and how matplotlib draws it


def draw(counts: list[int], panels: dict[str, list[Curve]], xlabel: str, *, log: bool):
    """Returns a matplotlib Figure with a panel for each title. `log`: the vertical axes are logarithmic."""
    from matplotlib.ticker import LogLocator, NullLocator

    fig = plots.figure(11, 4.2)
    axes = fig.subplots(1, len(panels))
    fig.subplots_adjust(left=0.06, right=0.83, top=0.9, bottom=0.13, wspace=0.5)
    for ax, (title, curves) in zip(axes, panels.items(), strict=True):
        for _, values, look in curves:
            ax.plot(counts, values, **look)
        ax.set_xscale("log", base=2)
        ax.set_xticks(counts, [f"{n:,}" for n in counts])
        ax.set_xlim(right=counts[-1])
        if log:
            ax.set_yscale("log")
            ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            ax.yaxis.set_major_formatter("{x:g}")
            ax.yaxis.set_minor_locator(NullLocator())
        else:
            ax.set_ylim(bottom=0.9)
        ax.set_title(title, loc="left")
        ax.set_xlabel(xlabel)
        ax.spines[["top", "right"]].set_visible(False)
        plots.label_ends(ax, [(counts[-1], values[-1], name, look["color"]) for name, values, look in curves])
    return fig
