"""Which rank gets which samples of a step, so that no rank waits for another.

`assign` gives every rank equally many forwards of nearly equal rows. From the longest sample to the shortest, each goes
to the rank that has the fewest rows so far. The fullest rank then has at most 4/3 - 1/(3 ranks) times the rows of the
best assignment (Graham 1969). Each rank cuts its own samples with `batching.cut`. FSDP's all-gathers must meet, so a
rank that needs fewer micro-batches than another splits its own; if it has too few samples for that, all are assigned
again with enough reserved for each.

`LengthGroupedOrder` makes batches of similar samples. No assignment is even when one sample is longer than a rank's
share: the fullest rank has at least max(mean, longest) rows. With two samples per rank that is nearly every batch of
LLaVA's mix, where texts of 2,000 rows stand beside pictures that a fast step cuts to 60. So a window of several batches
is sorted by visual rows, then by text, and cut into batches, which are shuffled. LLaVA's own training groups a batch by
modality for the same reason and reports that it "does not affect the final outcome" (LLaVA-1.5, appendix). Sorting by
length beyond that is ours.

The price is that a batch is no longer an independent draw. Its loss is divided by its answers, so a short answer weighs
more among short ones than it would beside long ones. With a window of 1 every batch is what `batching.Order` makes it.

Both are pure functions. A sample's batch depends on (data, seed, position) and not on plan or ranks, so a run can
resume on another number of machines; its rank depends on (rows, ranks, budget).
"""

import heapq
import math
from collections.abc import Callable

import numpy as np

from tinyspeed.data.examples import Sample
from tinyspeed.training.batching import Order, cut

WINDOW = 64  # batches. More would be more alike; 64 of 128 samples are a hundredth of LLaVA's epoch


def assign(rows: list[int], ranks: int, budget: int) -> list[list[list[int]]]:
    """Returns the samples of each micro-batch of each rank. As `cut` has it, a micro-batch is at most `budget` rows
    once padded. All ranks have equally many; some are empty only if there are fewer samples than micro-batches."""
    forwards, needed = 0, 1
    while forwards < needed:
        forwards = needed
        every = _samples_of_ranks(rows, ranks, min(forwards, len(rows) // ranks))
        parts = [[[mine[i] for i in part] for part in cut([rows[s] for s in mine], budget)] for mine in every]
        needed = max(map(len, parts))
    return [_split(part, rows, needed) for part in parts]


def _samples_of_ranks(rows: list[int], ranks: int, least: int) -> list[list[int]]:
    """Returns the samples of each rank, at least `least`, from the longest to the shortest."""
    every: list[list[int]] = [[] for _ in range(ranks)]
    loads = [(0, rank) for rank in range(ranks)]
    lacking = least * ranks
    longest_first = sorted(range(len(rows)), key=lambda sample: (-rows[sample], sample))
    for assigned, sample in enumerate(longest_first):
        load, rank = heapq.heappop(loads)
        while lacking == len(rows) - assigned and len(every[rank]) >= least:  # the rest is reserved for the others
            load, rank = heapq.heappop(loads)
        lacking -= len(every[rank]) < least
        every[rank].append(sample)
        heapq.heappush(loads, (load + rows[sample], rank))
    return every


def _split(parts: list[list[int]], rows: list[int], forwards: int) -> list[list[int]]:
    """Returns this many micro-batches, still from long to short: the one with most rows is halved again and again."""
    parts = list(parts)
    while len(parts) < forwards:
        several = [i for i, part in enumerate(parts) if len(part) > 1]
        if not several:
            return parts + [[]] * (forwards - len(parts))
        most = max(several, key=lambda i: (sum(rows[sample] for sample in parts[i]), -i))
        half = (len(parts[most]) + 1) // 2
        parts[most : most + 1] = [parts[most][:half], parts[most][half:]]
    return parts


class LengthGroupedOrder(Order):
    """An `Order` for batches of `size` out of `n` samples of these lengths (those of a `Source`)."""

    def __init__(self, lengths: Callable[[int], Sample], n: int, seed: int, size: int, window: int = WINDOW):
        super().__init__(n, seed)
        self.lengths, self.size, self.window = lengths, size, window
        self._start, self._samples = 0, []  # the window that was last asked for

    def __getitem__(self, position: int) -> int:
        if not self._start <= position < self._start + len(self._samples):
            self._start, self._samples = self._window(position)
        return self._samples[position - self._start]

    def _window(self, position: int) -> tuple[int, list[int]]:
        """Returns the first position and the samples of the window around a position. Windows end where epochs end, and
        a batch that crosses the end of a window is made of both."""
        length, epoch = self.window * self.size, position // self.n
        start = max(position // length * length, epoch * self.n)
        end = min(position // length * length + length, (epoch + 1) * self.n)
        samples = [super(LengthGroupedOrder, self).__getitem__(p) for p in range(start, end)]
        if self.window == 1:
            return start, samples
        edges = [start, *range(start // self.size * self.size + self.size, end, self.size), end]
        order = np.random.default_rng([self.seed, start]).permutation(len(edges) - 1)
        rest = iter(self._sorted(samples))
        batches = {batch: [next(rest) for _ in range(edges[batch], edges[batch + 1])] for batch in order}
        return start, [sample for batch in sorted(batches) for sample in batches[batch]]

    def _sorted(self, samples: list[int]) -> list[int]:
        """Sorts by visual rows, in classes a fifth apart, and within a class by text: ascending and descending in turn,
        so that a batch that spans two classes has texts of similar length."""
        rows = {i: self.lengths(i) for i in samples}
        classes = {i: round(4 * math.log2(1 + sum(rows[i][1]))) for i in samples}
        number = {value: n for n, value in enumerate(sorted(set(classes.values())))}
        return sorted(samples, key=lambda i: (classes[i], rows[i][0] if number[classes[i]] % 2 else -rows[i][0], i))
