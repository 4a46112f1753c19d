"""Preparation of a corpus: split into train and val, tokenized by worker processes, written into the cache.

The bytes are the same for any number of workers and machines, and an interrupted preparation resumes.
"""
