"""Sweeps: points of a space, each run in a process or a cluster's job of its own, whatever happens to the others."""
