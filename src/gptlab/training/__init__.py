"""Training: the LightningModule, the LightningDataModule, the batch plan and the hardware.

Optimizers and schedules are in ``optim``, strategies in ``distributed``, Lightning callbacks in ``callbacks`` and
checkpoint files in ``checkpoints``. This package depends on neither Hydra nor loggers; it takes validated
configurations.
"""
