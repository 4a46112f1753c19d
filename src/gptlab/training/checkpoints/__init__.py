"""Crash-safe checkpoints: writing, reading, records and verification.

A checkpoint is a directory with a record of its files' hashes, which is renamed into place once it is complete. Only
tensors and plain data are unpickled.
"""
