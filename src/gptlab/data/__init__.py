"""Corpora to tokens, to shards, to windows in a fixed order, to batches."""
