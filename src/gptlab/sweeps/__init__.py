"""Sweeps: search space, search, launchers, pruning, and the state of a sweep on disk.

An interrupted sweep resumes when the same command is run again. ``analysis`` computes and prints the results.
"""
