"""A pickle that does something when it is read as pickles are: what must never happen."""

import os
import pickle
from pathlib import Path
from typing import Any

import torch


class Canary:
    """Reading its pickle makes a folder.

    Args:
        path: That folder.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        pickle.loads(pickle.dumps(self))  # noqa: S301  (the proof)
        self._prove()

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)

    def was_run(self) -> bool:
        return self.path.exists()

    def write(self, file: Path, kind: str) -> Path:
        """Write it in place of ``file``: bare, or inside an archive as ``torch.save`` makes them."""
        file.parent.mkdir(parents=True, exist_ok=True)
        if kind == "bare":
            file.write_bytes(pickle.dumps(self))
        else:
            archive = file.with_suffix(".pt")  # torch.load goes by the name
            torch.save({"state_dict": self, "global_step": 1, "model": self, "model_args": {}}, archive)
            torch.load(archive, weights_only=False)
            self._prove()
            archive.rename(file)
        return file

    def _prove(self) -> None:
        assert self.was_run(), "the payload does nothing, so that nothing would be proven"
        self.path.rmdir()
