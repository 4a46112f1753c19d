"""From a checked configuration to the processes that train: preflight, launcher, supervisor, workers, SLURM."""
