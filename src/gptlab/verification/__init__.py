"""``gptlab.prove``: verifies data order, resume and the equality of ranks for a configuration by running it.

Each proof compares the determinism traces of short runs, which are started as separate processes.
"""
