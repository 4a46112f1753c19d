"""``gptlab.dashboard``: W&B workspaces and sweep files, generated from the configuration.

The workspace defines the panels of a project. The sweep files define the sweeps of ``sweeps/`` for `wandb sweep`.
Imports no torch.
"""
