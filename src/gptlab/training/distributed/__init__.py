"""Distributed training: process launchers, the process group, DDP, FSDP2 and tensor parallelism.

``processes`` reads the environment and imports no torch; ``strategies`` builds Lightning's strategy.
"""
