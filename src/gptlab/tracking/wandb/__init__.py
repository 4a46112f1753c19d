"""Weights & Biases: a run's record, its samples, checkpoints and alerts. A run never depends on it."""
