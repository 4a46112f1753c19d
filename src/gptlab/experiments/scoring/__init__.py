"""Scoring trained models: what is asked for, the running of it, and its record."""
