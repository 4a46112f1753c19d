"""Finds, reads and lists runs and sweeps from their directories, including those in progress.

Imports no torch.
"""
