"""Checkpoints that survive a crash at any moment: their record, how they are written, how they are read."""
