"""Several processes: who started them, the process group, DDP, FSDP2 and tensor parallelism."""
