"""Corpora, and the readers of their files."""
