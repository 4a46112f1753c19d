"""Trained models and their weights: runs, Hugging Face, nanoGPT.

``source`` says what a model is without torch, ``weights`` loads it, ``text_generator`` generates text with it, and
``language_model`` is the Python API, ``gptlab.load``.
"""
