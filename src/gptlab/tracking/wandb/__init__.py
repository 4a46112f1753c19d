"""Weights & Biases: the record of a run, with its samples, checkpoints and alerts.

A run never depends on it: W&B may be unreachable, slow or forbidden, and the run directory has everything.
"""
