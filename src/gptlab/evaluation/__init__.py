"""Scores of a model: loss and bits per byte."""
