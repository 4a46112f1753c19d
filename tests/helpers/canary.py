"""A pickle with a side effect, which shows whether it was executed."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch


class Canary:
    """Creates a directory when its pickle is loaded.

    Args:
        path: Directory to create.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        pickle.loads(pickle.dumps(self))  # noqa: S301  (shows that the payload works)
        self._prove()

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)

    def was_run(self) -> bool:
        return self.path.exists()

    def write(self, file: Path, kind: str) -> Path:
        """Replaces ``file`` with the pickle, bare or in an archive of ``torch.save``."""
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "bare":
            file.write_bytes(pickle.dumps(self))
        else:
            archive = file.with_suffix(".pt")  # torch.load checks the suffix
            torch.save({"state_dict": self, "global_step": 1, "model": self, "model_args": {}}, archive)
            torch.load(archive, weights_only=False)
            self._prove()
            archive.rename(file)
        return file

    def _prove(self) -> None:
        assert self.was_run(), "the payload has no effect, so the test would prove nothing"
        self.path.rmdir()
