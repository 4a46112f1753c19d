"""Corpora by name, and the readers of their files: text, JSON Lines and parquet, compressed or not."""
