"""Optimizers (AdamW and Muon) with their parameter groups, learning-rate schedules and weight averaging.

Schedules are pure functions of the step.
"""
