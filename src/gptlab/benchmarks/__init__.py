"""``gptlab.bench``: speed as ratios of runs that alternate on one machine.

Each suite is a file, whose processes are started with ``python -m``. ``config`` has what they measure, ``measuring``
what they share.
"""
