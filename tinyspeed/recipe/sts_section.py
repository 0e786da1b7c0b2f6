"""The recipe's section on STS, stage-aware sparsity (arXiv 2509.18150): fewer visual rows while aligning, fewer layers
while tuning. Off by default. How layers are skipped, and what of that is ours: `layers.py`.

Nothing is known of the paper's visual token compressor but that it works before the rows enter the LLM, which is
where every pruning plugin works: `compress` is the share of rows that one keeps.
"""

from dataclasses import dataclass

from ..util.errors import require, require_known


@dataclass(frozen=True)
class StsSection:
    skip: float = 0.0  # share of the LLM's layers that a step of `train` leaves out; 0 = none
    layers: str = "random"  # which: "random", deeper ones more often, or "influence": those that change answers least
    protect_first: int = 1  # layers that always run
    protect_last: int = 1
    every: int = 10  # one step in so many runs every layer, as slow ones do; 0 = only these
    compress: float = 0.0  # share of visual rows that `align` keeps; 0 = dualspeed.keep
    compressor: str = ""  # the pruning plugin that chooses them; empty: dualspeed.plugin

    def __post_init__(self):
        for name in ("skip", "compress"):
            require(0 <= getattr(self, name) <= 1, f"sts.{name} = {getattr(self, name)}: must be between 0 and 1")
        for name in ("protect_first", "protect_last", "every"):
            require(getattr(self, name) >= 0, f"sts.{name} = {getattr(self, name)}: must not be negative")
        require(
            not self.skip or self.every != 1, "sts.every = 1: every step would run every layer, and sts.skip skip none"
        )
        require(bool(self.compress) or not self.compressor, "sts.compressor is given: set sts.compress too")
        if self.layers != type(self).layers or self.compressor:
            from .. import pruning, sts  # here, for they import torch

            require_known("sts.layers", self.layers, sts.CHOICES)
            if self.compressor:
                require_known("sts.compressor", self.compressor, pruning.names())
