"""Sweeps: a search space, the search that proposes points, launchers that train them, and the sweep's state on disk.

A sweep that was interrupted resumes with the same command; ``analysis`` says what it found.
"""
