"""Checkpoints that survive a crash at any moment: how they are written, recorded, verified and read."""
