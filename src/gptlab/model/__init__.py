"""The model in plain PyTorch: GPT-2 in ``gpt``, later variants in ``modern``, attention, kernels and the loss.

``config`` defines the config keys of the model. Imports no Lightning, no Hydra and nothing from ``gptlab.data``.
"""
