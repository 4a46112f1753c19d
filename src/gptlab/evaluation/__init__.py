"""Scoring a model: loss and bits per byte, HellaSwag, and the model adapter of lm-evaluation-harness.

No Lightning, no Hydra: training validates with it, and ``gptlab.evaluators`` evaluates trained models with it.
"""
