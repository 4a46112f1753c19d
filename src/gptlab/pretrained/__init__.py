"""Trained models: runs of gptlab, Hugging Face models and nanoGPT checkpoints.

``source`` describes a model without importing torch, ``weights`` loads it, ``text_generator`` generates text with it,
and ``language_model`` is the Python API behind ``gptlab.load``.
"""
