"""Weights & Biases: logging of metrics, samples, checkpoints and alerts.

Runs never depend on W&B, which may be unreachable, slow or disabled. The run directory has all data.
"""
