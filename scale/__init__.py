"""scale: the same `tinyspeed.DualSpeed` on many GPUs. The dealing and the planner are here; the sharding is not yet.

The core never imports this package.
"""
