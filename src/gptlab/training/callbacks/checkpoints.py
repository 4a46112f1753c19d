"""Which checkpoints a run keeps."""

from pathlib import Path
from typing import Any

from lightning.pytorch.callbacks import ModelCheckpoint

from gptlab.training.config import BEST, LAST, CheckpointConfig


class Checkpoint(ModelCheckpoint):
    """Lightning's, except that a run directory may have been moved since."""

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take up the best score, and the paths where they are now."""
        here = Path(str(self.dirpath))

        def moved(path: str) -> str:
            return str(here / Path(path).name) if path else path

        paths = {
            name: moved(state_dict[name]) for name in ("best_model_path", "kth_best_model_path", "last_model_path")
        }
        best = {moved(path): score for path, score in state_dict["best_k_models"].items()}
        super().load_state_dict(state_dict | paths | {"dirpath": self.dirpath, "best_k_models": best})


def checkpoint_callbacks(config: CheckpointConfig, folder: Path) -> list[ModelCheckpoint]:
    """Keep the evaluation with the lowest val loss and the last one, each under a fixed name in ``folder``."""
    wanted = [(BEST, "val/loss")] * config.best + [(LAST, None)] * config.last
    return [
        Checkpoint(
            dirpath=folder,
            filename=Path(name).stem,
            monitor=monitor,
            mode="min",
            save_on_train_epoch_end=False,
            enable_version_counter=False,
        )
        for name, monitor in wanted
    ]
