"""Evaluation of trained models by ``python -m gptlab.evaluate``.

``gptlab.evaluation`` computes the metrics. This package prepares the corpus with the model's tokenizer, sets up devices
and processes, runs the tasks of lm-evaluation-harness, and reports the results as a table and as JSON.
"""
