"""Checkpoints that survive a crash at any moment: how they are written, recorded, verified and read.

A checkpoint is a folder with a record of its files' hashes, renamed into place when it is complete. Nothing is
unpickled but tensors and plain data.
"""
