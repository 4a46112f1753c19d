"""``gptlab.dashboard``: W&B workspaces and sweep files, made from the configuration. Imports no torch."""
