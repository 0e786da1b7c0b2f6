"""What waiting costs: a step takes as long as its slowest rank.

    python tutorials/straggling.py scale/straggling.png      the tables and the picture of scale/README.md

There are two reasons to wait, tried on batches of a realistic mix (`llava_mix.py`) with two samples per rank:

    who is slow     all ranks draw a step's mode together, as `tinyspeed.scheduler` does, or each for itself; then a
                    step is slow as soon as one rank is, which is 1 - (1 - r)^W of all steps
    who gets what   samples are distributed by their number, as samplers do, or by rows; out of batches in random order
                    or of similar samples ("alike"; `balancing.py`)

Time is counted in rows: those of the student, and a third of the teacher's, whose pass is forward only. The drawing of
modes is not simulated. Together, the mean step takes (1 - r) longest(fast) + r longest(slow). Apart, the longest of W
ranks, each of which is fast or slow by itself, has the distribution

    P(longest <= v)  =  0 below the longest fast rank, and (1 - r)^(ranks whose slow step is longer than v) from there

Everything is compared with the mean work of a rank. Two things are left out: ranks wait for each other in every layer
and not only at the end of a step (here a step is one forward), and real steps also take time that no row needs. Ranks
that draw apart would not even be slow: under FSDP they run different numbers of forwards, and hang.
"""

import sys
from dataclasses import dataclass

import numpy as np

from scale.balancing import WINDOW, LengthGroupedOrder, assign
from scale.planner import curves
from tinyspeed.data.llava_mix import mix
from tinyspeed.rows import plan_rows
from tinyspeed.scheduler import Plan
from tinyspeed.util import plots
from tinyspeed.util.tables import table

RANKS = (8, 16, 32, 64, 128, 256, 512, 1024)
EACH = 2  # samples per rank: LLaVA's batch of 128 on 64 ranks
STEPS = 2 * WINDOW
SLOW = 0.1
MODES = {"fast": Plan("fast", keep=0.1), "slow": Plan("slow", keep=0.1)}
ISOLATOR, TEACHER = 4, 1 / 3
WAYS = ("by count", "by rows", "by count, alike", "by rows, alike")  # samples are assigned
DRAWN = ("apart", "together")  # modes are drawn


@dataclass(frozen=True)
class Waits:
    """What each way costs, for one number of ranks."""

    ranks: int
    uneven: dict[tuple[str, str], float]  # (way, mode): most rows of a rank / mean rows, the mean over steps
    time: dict[tuple[str, str], float]  # (drawn, way): mean step / ideal step


def simulate(ranks: int, steps: int = STEPS, seed: int = 0) -> Waits:
    size = ranks * EACH
    samples = mix(steps * size, seed)
    rows = {mode: np.array([plan_rows(*s[:2], plan, ISOLATOR) for s in samples]) for mode, plan in MODES.items()}
    work = {"fast": rows["fast"], "slow": rows["slow"] + TEACHER * rows["fast"]}
    ideal = ((1 - SLOW) * work["fast"].sum() + SLOW * work["slow"].sum()) / ranks
    uneven, time = {}, {}
    for way in WAYS:
        window = WINDOW if way.endswith("alike") else 1
        order = LengthGroupedOrder(samples.__getitem__, len(samples), seed, size, window)
        together = apart = 0.0
        ratios = dict.fromkeys(MODES, 0.0)
        for step in range(steps):
            chosen = np.array(order.batch(step, size))
            owners = {mode: _owners(rows[mode][chosen], ranks, way) for mode in MODES}
            for mode, share in (("fast", 1 - SLOW), ("slow", SLOW)):
                of_rank = np.bincount(owners[mode], rows[mode][chosen])
                ratios[mode] += of_rank.max() / of_rank.mean() / steps
                together += share * np.bincount(owners[mode], work[mode][chosen]).max()
            # Apart, no rank knows who will be slow, so samples are assigned as for a fast step.
            apart += expected_longest(*(np.bincount(owners["fast"], work[mode][chosen]) for mode in MODES), SLOW)
        uneven |= {(way, mode): ratio for mode, ratio in ratios.items()}
        time |= {("together", way): together / ideal, ("apart", way): apart / ideal}
    return Waits(ranks, uneven, time)


def _owners(rows: np.ndarray, ranks: int, way: str) -> np.ndarray:
    """Returns the rank of each sample."""
    owners = np.arange(len(rows)) % ranks
    if way.startswith("by rows"):
        for rank, parts in enumerate(assign(rows.tolist(), ranks, 0)):
            owners[[sample for part in parts for sample in part]] = rank
    return owners


def expected_longest(fast: np.ndarray, slow: np.ndarray, share: float) -> float:
    """Returns the expected time of the longest rank, if each is slow with this probability. Slow is never shorter."""
    values = np.union1d(np.maximum(slow, fast.max()), fast.max())
    reached = (1 - share) ** (slow > values[:, None]).sum(1)
    return float(values @ np.diff(reached, prepend=0.0))


def tables(found: list[Waits]) -> str:
    """Markdown, as in scale/README.md."""
    share = lambda ratio: f"{100 * (ratio - 1):.1f} %"
    uneven = [[f"{w.ranks:,}", *(share(w.uneven[way, mode]) for way in WAYS for mode in MODES)] for w in found]
    time = [[f"{w.ranks:,}", *(f"{w.time[drawn, way]:.2f}" for drawn in DRAWN for way in WAYS)] for w in found]
    uneven = table(["ranks", *(f"{way}: {mode}" for way in WAYS for mode in MODES)], uneven)
    return f"{uneven}\n\n{table(['ranks', *(f'{drawn}, {way}' for drawn in DRAWN for way in WAYS)], time)}"


def draw(found: list[Waits]):
    """Draws both tables as a matplotlib Figure. The ways differ by marker and dash and are named where they end."""
    look = lambda n: {
        "color": plots.COLOURS[n % 4], "linestyle": plots.DASHES[n // 4], "marker": plots.MARKERS[n % 4],
        "markersize": 5, "linewidth": 1.4,
    }  # fmt: skip
    rows = [(way, [w.uneven[way, "fast"] for w in found]) for way in WAYS]
    time = [(f"{drawn}, {way}", [w.time[drawn, way] for w in found]) for drawn in DRAWN for way in WAYS]
    panels = {"fast steps: most rows of a rank / mean": rows, "time of a step / ideal": time}
    panels = {title: [(*curve, look(n)) for n, curve in enumerate(several)] for title, several in panels.items()}
    return curves.draw([w.ranks for w in found], panels, f"ranks, {EACH} samples each", log=False)


def main(argv: list[str]) -> int:
    if len(argv) != 1:
        print("usage: python tutorials/straggling.py OUT.png", file=sys.stderr)
        return 2
    found = [simulate(ranks) for ranks in RANKS]
    print(tables(found))
    print(f"\n{plots.save(draw(found), argv[0])}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
