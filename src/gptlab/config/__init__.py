"""The configuration of a run: its schema, config groups, the Hydra application, and what a resume may change.

``base`` validates and rebuilds configurations, ``schema`` has the fields of a run, and ``command`` is the decorator of
every command's ``main``. Imports no torch.
"""
