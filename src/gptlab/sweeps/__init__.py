"""Sweeps: points of a search space, launchers that train them, pruning, and the state of the sweep on disk."""
