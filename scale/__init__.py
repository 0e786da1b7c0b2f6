"""scale: the same `tinyspeed.DualSpeed` on many GPUs. The core never imports this package."""
