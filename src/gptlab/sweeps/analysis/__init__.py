"""Analysis of sweeps: comparisons with a baseline, with their uncertainty, and scaling laws with intervals.

Imports no torch.
"""
