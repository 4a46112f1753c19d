"""Evaluation of trained models: corpora, HellaSwag and the tasks of lm-evaluation-harness."""
