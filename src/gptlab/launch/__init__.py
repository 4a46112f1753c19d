"""From a validated configuration to the processes that train: launcher, preflight, supervisor, signals, requeue.

The entry point of worker processes is ``gptlab.worker``, above this package: it adds the callbacks that a run has from
``planning`` and ``sweeps``.
"""
