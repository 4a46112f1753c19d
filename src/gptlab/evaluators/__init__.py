"""Evaluation of trained models, for ``python -m gptlab.evaluate``: what to score, on what, and what comes of it.

``gptlab.evaluation`` computes the scores; this package has the corpus in the model's own tokens, the device and the
processes, the tasks of lm-evaluation-harness, and the results as a table and as JSON.
"""
