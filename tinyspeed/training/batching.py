"""Which samples a step sees, and how they are cut into micro-batches.

Samples come in an order that is a pure function of (seed, position): position p belongs to epoch p // n, and an
epoch is a permutation drawn from (seed, epoch). So the only state of the data is how many samples have been seen,
and a run resumes anywhere: in the middle of an epoch, at its edge, twice, on another number of machines.

An optimizer batch is a fixed number of samples, whatever its plan; micro-batches are cut by rows *after* the plan,
since rows are what memory holds: a fast step fits in a few large ones, a slow step needs many small ones. The loss
is divided by the answers of the whole optimizer batch, so how it is cut changes nothing.
"""

from collections.abc import Iterator

import numpy as np


class Order:
    """Sample numbers by position, for `n` samples."""

    def __init__(self, n: int, seed: int):
        self.n, self.seed = n, seed
        self._epoch, self._permutation = -1, None

    def __getitem__(self, position: int) -> int:
        epoch, offset = divmod(position, self.n)
        if epoch != self._epoch:
            self._epoch, self._permutation = epoch, np.random.default_rng([self.seed, epoch]).permutation(self.n)
        return int(self._permutation[offset])

    def batch(self, step: int, size: int) -> list[int]:
        return [self[position] for position in range(step * size, (step + 1) * size)]


def cut(rows: list[int], budget: int) -> Iterator[list[int]]:
    """Micro-batches of samples with these rows: longest first, each at most `budget` rows once padded to its longest
    sample (one sample may exceed it alone). Sorting puts like lengths together, which is what keeps padding small."""
    part: list[int] = []
    longest = 0
    for sample in sorted(range(len(rows)), key=lambda s: (-rows[s], s)):
        if part and budget and longest * (len(part) + 1) > budget:
            yield part
            part = []
        longest = longest if part else rows[sample]
        part.append(sample)
    if part:
        yield part
