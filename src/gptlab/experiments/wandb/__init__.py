"""Runs at Weights & Biases."""
