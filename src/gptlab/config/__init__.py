"""Configuration of a run: schema, config groups, the Hydra application, and the keys that may change on a resume.

``base`` validates and rebuilds configurations, ``schema`` defines the config keys of a run, and ``command`` decorates
the ``main`` of every command. Imports no torch.
"""
