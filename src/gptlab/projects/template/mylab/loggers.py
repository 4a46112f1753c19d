"""Loggers: any ``lightning.pytorch.loggers.Logger``."""

import json
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only


class JSONLinesLogger(Logger):
    """Writes one JSON object per row of metrics.

    Args:
        save_dir: Run directory, from gptlab.
        file: Name of the file.
    """

    def __init__(self, save_dir: str, file: str) -> None:
        super().__init__()
        self.path = Path(save_dir) / file

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "jsonl"

    @property
    def version(self) -> str:
        """Version of the logger, which is not used."""
        return ""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Appends a row."""
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **metrics}) + "\n")

    def log_hyperparams(self, params: Any) -> None:
        """Does nothing: the run directory has the configuration."""
