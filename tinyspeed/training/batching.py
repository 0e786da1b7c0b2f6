"""Which samples a step sees, and how they are cut into micro-batches.

The order of samples is a pure function of (seed, position): position p belongs to epoch p // n, and an epoch is a
permutation drawn from (seed, epoch). So the only state of the data is how many samples have been seen, and a run can
be resumed anywhere: in the middle of an epoch, at its end, twice, or on another number of machines.

An optimizer batch is a fixed number of samples, whatever its plan. Micro-batches are cut by the rows that are left
*after* pruning, since these are what memory holds: a fast step fits into a few large micro-batches, a slow step needs
many small ones. The loss is divided by the answers of the whole optimizer batch, so the cut does not change it.
"""

from collections.abc import Iterator

import numpy as np


class Order:
    """Maps positions to the numbers of `n` samples."""

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
    """Cuts samples with these rows into micro-batches of at most `budget` rows, padding included. A single sample may
    exceed it. Longest samples come first: sorting puts similar lengths together, which keeps padding small."""
    part, longest = [], 0
    for sample in sorted(range(len(rows)), key=lambda s: (-rows[s], s)):
        if part and budget and longest * (len(part) + 1) > budget:
            yield part
            part = []
        longest = longest if part else rows[sample]
        part.append(sample)
    if part:
        yield part
