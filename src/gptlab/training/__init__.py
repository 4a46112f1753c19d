"""The LightningModule and DataModule, optimizers, schedules, callbacks, devices and strategies."""
