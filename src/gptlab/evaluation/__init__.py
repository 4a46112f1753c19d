"""Evaluation metrics: loss and bits per byte, HellaSwag, and the model adapter for lm-evaluation-harness.

Imports neither Lightning nor Hydra. Used for validation during training and by ``gptlab.evaluators``.
"""
