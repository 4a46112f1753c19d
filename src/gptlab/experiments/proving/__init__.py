"""The proofs of ``python -m gptlab.prove``: a configuration, run for a few steps and held to its promises."""
