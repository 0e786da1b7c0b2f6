"""What waiting costs: a step is as long as its slowest rank.

    python -m scale.simulate scale/straggling.png      the tables and the picture of scale/README.md

Two ways to wait, on batches of a realistic mix (`lengths.py`), two samples a rank:

    who is slow     all ranks draw a step's mode together, as `tinyspeed.scheduler` does, or each for itself; then a
                    step is slow as soon as one rank is, 1 - (1 - r)^W of all steps
    who gets what   samples dealt by their number, as samplers do, or by rows, out of batches as they come or alike
                    (`dealing.py`)

Time is rows: of the student, and a third of the teacher's, which is forward only. No draw is simulated. Together, the
mean step is (1 - r) longest(fast) + r longest(slow). Apart, the longest of W ranks that are fast or slow for themselves
has the distribution

    P(longest <= v)  =  0 below the longest fast rank, and (1 - r)^(ranks whose slow step is longer than v) from there

The ideal that all is compared with is the mean work of a rank. What is left out: that ranks wait for each other in
every layer and not only at the end of a step (here a step is one forward), and that real steps also take time for what
no row needs. Ranks that draw apart would not even be slow: under FSDP they run other numbers of forwards, and hang.
"""

import sys
from dataclasses import dataclass

import numpy as np

from tinyspeed.data.llava_mix import mix
from tinyspeed.rows import plan_rows
from tinyspeed.scheduler import Plan
from tinyspeed.training import report
from tinyspeed.util import plots
from tinyspeed.util.tables import table

from ..dealing import WINDOW, Alike, deal

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
EACH = 2  # samples a rank: LLaVA's batch of 128 on 64 ranks
STEPS = 2 * WINDOW
SLOW = 0.1
MODES = {"fast": Plan("fast", keep=0.1), "slow": Plan("slow", keep=0.1)}
ISOLATOR, TEACHER = 4, 1 / 3


DEALT = ("by count", "by rows", "by count, alike", "by rows, alike")
DRAWN = ("apart", "together")


@dataclass(frozen=True)
class Waits:
    """What comes of each way, at one number of ranks."""

    ranks: int
    uneven: dict[tuple[str, str], float]  # (dealt, mode): most rows of a rank / mean rows, the mean over steps
    time: dict[tuple[str, str], float]  # (drawn, dealt): mean step / ideal step


def simulate(ranks: int, steps: int = STEPS, seed: int = 0) -> Waits:
    size = ranks * EACH
    samples = mix(steps * size, seed)
    rows = {mode: np.array([plan_rows(*s[:2], plan, ISOLATOR) for s in samples]) for mode, plan in MODES.items()}
    work = {"fast": rows["fast"], "slow": rows["slow"] + TEACHER * rows["fast"]}
    ideal = ((1 - SLOW) * work["fast"].sum() + SLOW * work["slow"].sum()) / ranks
    uneven, time = {}, {}
    for dealt in DEALT:
        window = WINDOW if dealt.endswith("alike") else 1
        order = Alike(samples.__getitem__, len(samples), seed, size, window)
        together = apart = 0.0
        ratios = dict.fromkeys(MODES, 0.0)
        for step in range(steps):
            chosen = np.array(order.batch(step, size))
            owners = {mode: _owners(rows[mode][chosen], ranks, dealt) for mode in MODES}
            for mode, share in (("fast", 1 - SLOW), ("slow", SLOW)):
                of_rank = np.bincount(owners[mode], rows[mode][chosen])
                ratios[mode] += of_rank.max() / of_rank.mean() / steps
                together += share * np.bincount(owners[mode], work[mode][chosen]).max()
            # Apart, nobody knows who will be slow: dealt as for a fast step.
            apart += expected_longest(*(np.bincount(owners["fast"], work[mode][chosen]) for mode in MODES), SLOW)
        uneven |= {(dealt, mode): ratio for mode, ratio in ratios.items()}
        time |= {("together", dealt): together / ideal, ("apart", dealt): apart / ideal}
    return Waits(ranks, uneven, time)


def _owners(rows: np.ndarray, ranks: int, dealt: str) -> np.ndarray:
    """The rank of each sample."""
    owners = np.arange(len(rows)) % ranks
    if dealt.startswith("by rows"):
        for rank, parts in enumerate(deal(rows.tolist(), ranks, 0)):
            owners[[sample for part in parts for sample in part]] = rank
    return owners


def expected_longest(fast: np.ndarray, slow: np.ndarray, share: float) -> float:
    """The mean longest of ranks that are slow with this probability each; none is shorter when it is slow."""
    values = np.unique(np.maximum(slow, fast.max()))
    values = np.union1d(values, fast.max())
    reached = (1 - share) ** (slow > values[:, None]).sum(1)
    return float(values @ np.diff(reached, prepend=0.0))


def tables(found: list[Waits]) -> str:
    """Markdown, as in scale/README.md."""
    uneven = [
        [f"{w.ranks:,}", *(f"{100 * (w.uneven[dealt, mode] - 1):.1f} %" for dealt in DEALT for mode in MODES)]
        for w in found
    ]
    time = [[f"{w.ranks:,}", *(f"{w.time[drawn, dealt]:.2f}" for drawn in DRAWN for dealt in DEALT)] for w in found]
    return "\n\n".join(
        [
            table(["ranks", *(f"{dealt}: {mode}" for dealt in DEALT for mode in MODES)], uneven),
            table(["ranks", *(f"{drawn}, {dealt}" for drawn in DRAWN for dealt in DEALT)], time),
        ]
    )


def draw(found: list[Waits]):
    """Both tables as a matplotlib Figure: ways are told apart by marker and dash, and named where they end."""
    fig = plots.figure(11, 4.2)
    left, right = fig.subplots(1, 2)
    fig.subplots_adjust(left=0.06, right=0.83, top=0.9, bottom=0.13, wspace=0.5)
    ranks = [w.ranks for w in found]
    curves = {
        left: [(dealt, [w.uneven[dealt, "fast"] for w in found]) for dealt in DEALT],
        right: [(f"{drawn}, {dealt}", [w.time[drawn, dealt] for w in found]) for drawn in DRAWN for dealt in DEALT],
    }
    for ax, title in ((left, "fast steps: most rows of a rank / mean"), (right, "time of a step / ideal")):
        ends = []
        for n, (name, values) in enumerate(curves[ax]):
            look = {"color": plots.COLOURS[n % 4], "linestyle": plots.DASHES[n // 4], "marker": plots.MARKERS[n % 4]}
            ax.plot(ranks, values, markersize=5, linewidth=1.4, **look)
            ends.append((ranks[-1], values[-1], name, plots.COLOURS[n % 4]))
        ax.set_xscale("log", base=2)
        ax.set_xticks(ranks, [f"{n:,}" for n in ranks])
        ax.set_xlim(right=ranks[-1])
        ax.set_ylim(bottom=0.9)
        ax.set_title(title, loc="left")
        ax.set_xlabel(f"ranks, {EACH} samples each")
        ax.spines[["top", "right"]].set_visible(False)
        report.label_ends(ax, ends)
    return fig


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python -m scale.simulate OUT.png", file=sys.stderr)
        return 2
    found = [simulate(ranks) for ranks in RANKS]
    print(tables(found))
    print(f"\n{plots.save(draw(found), argv[0])}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
