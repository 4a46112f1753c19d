"""Statistics of sweeps: comparisons with a baseline and their uncertainty, and scaling laws with intervals.

Imports no torch.
"""
