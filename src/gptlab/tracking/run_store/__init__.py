"""Runs and sweeps on disk: the files of their directories, found, read and listed, while they run or later.

Imports no torch.
"""
