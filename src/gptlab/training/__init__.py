"""The LightningModule and DataModule of a run, and how its batch and its hardware are chosen.

Optimizers and schedules are in ``optim``, strategies in ``distributed``; ``callbacks`` and ``checkpoints`` are those of
a run. Hydra and the loggers are above this package: it takes configurations that are already validated.
"""
