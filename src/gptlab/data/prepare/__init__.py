"""Data preparation: splits a corpus into train and val, tokenizes it in worker processes, and caches the shards.

The shards are bit-identical for any number of workers and machines. An interrupted preparation resumes.
"""
