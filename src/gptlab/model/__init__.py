"""The model in plain torch: GPT-2 in ``gpt``, what has been found since in ``modern``, attention, kernels and the loss.

``config`` describes every option once. Imports no Lightning, no Hydra and nothing of ``data``.
"""
