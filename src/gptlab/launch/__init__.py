"""Launching of runs: preflight checks, worker processes and their supervisor, signals, requeueing.

The entry point of worker processes is ``gptlab.worker``, above this package, which adds the callbacks of ``planning``
and ``sweeps``.
"""
