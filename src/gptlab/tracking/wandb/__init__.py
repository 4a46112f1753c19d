"""Weights & Biases: logging of metrics, samples, checkpoints and alerts.

W&B may be unreachable, slow or disabled. A run does not depend on it: the run directory contains all data.
"""
