"""scale: the same `tinyspeed.DualSpeed`, sharded from outside under torchrun and FSDP2. Nothing is here yet.

The core never imports this package.
"""
