"""Who gets which samples of a step, so that no rank waits for another.

    deal     one optimizer batch over the ranks: as many forwards on each, rows as equal as can be
    Alike    which samples make a batch: like goes with like, so that they can be dealt evenly

**Dealing.** Longest first, each sample goes to the rank that has the fewest rows so far: at most 4/3 - 1/(3 ranks) of
the best there is (Graham 1969). Then each rank cuts its own into micro-batches with `tinyspeed.batching.cut`. FSDP's
all-gathers must meet, so a rank that needs fewer micro-batches than another splits its own; and where a rank holds too
few samples for that, it is dealt again with so many kept back for everyone.

**Alike.** No dealing is even when one sample is longer than a rank's share: the most rows of a rank are at least
max(mean, longest). With two samples a rank that is nearly every batch of LLaVA's mix, where texts of 2,000 rows stand
beside pictures that a fast step cuts to 60. So batches are made of samples alike, out of a window of several: its
samples are sorted by visual rows, then by text, cut into batches, and these shuffled. LLaVA's own training keeps a
batch to one modality for the same reason, and reports that it "does not affect the final outcome" (LLaVA-1.5,
appendix); to sort by length beyond that is ours.

The price: a batch is no longer an independent draw, and as its loss is divided by its answers, a short answer weighs
more among its like than it would beside long ones. A window of 1 leaves every batch what `tinyspeed.batching.Order`
makes it.

Both are pure. A sample's batch depends on (data, seed, position), and not on plan or ranks, so that a run may be
resumed on another number of machines; and whose it is depends on (rows, ranks, budget).
"""

import heapq
import math
from collections.abc import Callable

import numpy as np

from tinyspeed.training.batching import Order, cut

WINDOW = 64  # batches: more of them are more alike, and 64 of 128 samples are a hundredth of LLaVA's epoch


def deal(rows: list[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """rank -> micro-batches -> numbers of samples. A micro-batch is at most `budget` rows once padded, as `cut` has it.
    All ranks have as many; some are empty only where there are fewer samples than micro-batches."""
    forwards, needed = 0, 1
    while forwards < needed:
        forwards = needed
        hands = _hands(rows, ranks, min(forwards, len(rows) // ranks))
        parts = [[[hand[i] for i in part] for part in cut([rows[s] for s in hand], budget)] for hand in hands]
        needed = max(map(len, parts))
    return [_split(part, rows, needed) for part in parts]


def _hands(rows: list[int], ranks: int, least: int) -> list[list[int]]:
    """The samples of each rank, at least `least`, longest first."""
    hands: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    lacking = least * ranks
    longest_first = sorted(range(len(rows)), key=lambda sample: (-rows[sample], sample))
    for dealt, sample in enumerate(longest_first):
        load, rank = heapq.heappop(loads)
        while lacking == len(rows) - dealt and len(hands[rank]) >= least:  # the rest is kept back for the others
            load, rank = heapq.heappop(loads)
        lacking -= len(hands[rank]) < least
        hands[rank].append(sample)
        heapq.heappush(loads, (load + rows[sample], rank))
    return hands


def _split(parts: list[list[int]], rows: list[int], forwards: int) -> list[list[int]]:
    """So many micro-batches, still longest samples first: the one of most rows is halved, again and again."""
    parts = list(parts)
    while len(parts) < forwards:
        several = [i for i, part in enumerate(parts) if len(part) > 1]
        if not several:
            return parts + [[]] * (forwards - len(parts))
        most = max(several, key=lambda i: (sum(rows[sample] for sample in parts[i]), -i))
        half = (len(parts[most]) + 1) // 2
        parts[most : most + 1] = [parts[most][:half], parts[most][half:]]
    return parts


class Alike(Order):
    """Sample numbers by position, for batches of `size` out of `n` samples. `lengths(i)` are a sample's text rows,
    visual rows of each image and tokens to learn, as a `tinyspeed.data.Source` has them."""

    def __init__(
        self,
        lengths: Callable[[int], tuple[int, list[int], int]],
        n: int,
        seed: int,
        size: int,
        window: int = WINDOW,
    ):
        super().__init__(n, seed)
        self.lengths, self.size, self.window = lengths, size, window
        self._start, self._samples = 0, []  # the window last asked for

    def __getitem__(self, position: int) -> int:
        if not self._start <= position < self._start + len(self._samples):
            self._start, self._samples = self._made(position)
        return self._samples[position - self._start]

    def _made(self, position: int) -> tuple[int, list[int]]:
        """The first position and the samples of the window that a position is in. Windows end where epochs end, and
        batches that reach over the end of a window are made of both."""
        whole, epoch = self.window * self.size, position // self.n
        start = max(position // whole * whole, epoch * self.n)
        end = min(position // whole * whole + whole, (epoch + 1) * self.n)
        samples = [super(Alike, self).__getitem__(p) for p in range(start, end)]
        if self.window == 1:
            return start, samples
        edges = [start, *range(start // self.size * self.size + self.size, end, self.size), end]
        order = np.random.default_rng([self.seed, start]).permutation(len(edges) - 1)
        rest, places = iter(self._sorted(samples)), {}
        for batch in order:
            places[batch] = [next(rest) for _ in range(edges[batch], edges[batch + 1])]
        return start, [sample for batch in range(len(order)) for sample in places[batch]]

    def _sorted(self, samples: list[int]) -> list[int]:
        """By visual rows, in steps of a fifth, and among those by text: up and down in turn, so that a batch that gets
        the last of one step and the first of the next has texts alike."""
        rows = {i: self.lengths(i) for i in samples}
        step = {i: round(4 * math.log2(1 + sum(rows[i][1]))) for i in samples}
        number = {value: n for n, value in enumerate(sorted(set(step.values())))}
        return sorted(samples, key=lambda i: (step[i], rows[i][0] if number[step[i]] % 2 else -rows[i][0], i))
