"""Which checkpoints a run keeps."""

from pathlib import Path

from lightning.pytorch.callbacks import ModelCheckpoint

from gptlab.training.config import CheckpointConfig

BEST, LAST = "best.ckpt", "last.ckpt"


def checkpoint_callbacks(config: CheckpointConfig, folder: Path) -> list[ModelCheckpoint]:
    """Keep the evaluation with the lowest val loss and the last one, each under a fixed name in ``folder``."""
    wanted = [(BEST, "val/loss")] * config.best + [(LAST, None)] * config.last
    return [
        ModelCheckpoint(
            dirpath=folder,
            filename=Path(name).stem,
            monitor=monitor,
            mode="min",
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        for name, monitor in wanted
    ]
