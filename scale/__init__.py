"""scale: the same `tinyspeed.DualSpeed`, sharded from outside under torchrun and FSDP2.

The core never imports this package.
"""
