"""``gptlab.bench``: compares the speed of alternating runs on one machine.

Each suite is a module, whose measurements run in processes started with ``python -m``. ``config`` defines the config
keys of all suites, ``measuring`` their common functions.
"""
