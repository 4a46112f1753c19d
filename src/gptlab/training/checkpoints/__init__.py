"""Crash-safe checkpoints: writing, reading, records and verification.

A checkpoint is a folder with a record of its files' hashes, renamed into place when it is complete. Only tensors and
plain data are unpickled.
"""
