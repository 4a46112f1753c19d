"""Several processes: process groups, DDP, FSDP2 and tensor parallelism, and what the launchers set."""
