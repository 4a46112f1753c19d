"""Corpora and the readers of their files: text, JSON Lines and Parquet, compressed or not.

A corpus is divided into tasks of about the same size, which are read independently and in any order.
"""
