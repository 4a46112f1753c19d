"""Trained models to start from and to use: of runs, and of other programs."""
