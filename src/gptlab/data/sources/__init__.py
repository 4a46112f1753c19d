"""Corpora by name, and the readers of their files: text, JSON Lines and parquet, compressed or not.

A corpus is cut into tasks of about the same size, which are read independently and in any order.
"""
