"""Run directories and sweep directories: finding, reading and listing runs, also while they are in progress.

Imports no torch.
"""
