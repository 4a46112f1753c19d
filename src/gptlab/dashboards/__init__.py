"""``gptlab.dashboard``: W&B workspaces and sweep files, generated from the configuration.

The workspace has the panels of a project; the sweep files are the search spaces of ``sweeps/`` for `wandb sweep`.
Imports no torch.
"""
