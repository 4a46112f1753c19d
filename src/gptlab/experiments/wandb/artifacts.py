"""A run's checkpoints as W&B's artifacts."""

import itertools
import logging
import math
import os
import queue
import shutil
import threading
from pathlib import Path
from typing import Any, Literal

from gptlab.training.checkpoints.records import Facts

log = logging.getLogger(__name__)

FOLDER = "wandb/checkpoints"  # in the run directory


class Artifacts:
    """Hands W&B's client checkpoints, in a thread of its own.

    Training waits for none of it. The files are linked into ``<run>/wandb/checkpoints``, so that they are there until
    they are sent, whatever becomes of the checkpoint; that takes room only when the checkpoint itself is gone.

    Args:
        run: Of W&B.
        directory: The run's.
        which: All checkpoints, or those that were the best when they were made.
        best: The lowest val loss so far.
    """

    def __init__(self, run: Any, directory: Path, which: Literal["best", "all"], best: float = math.inf) -> None:
        self.run, self.folder, self.which, self.best = run, directory / FOLDER, which, best
        self._waiting: queue.Queue[tuple[Path, Facts, list[str]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._send_all, name="artifacts", daemon=True)
        self._thread.start()

    def take(self, place: Path, facts: Facts) -> None:
        """Take a checkpoint that is there, whole."""
        is_best = facts.val_loss is not None and facts.val_loss < self.best
        if facts.val_loss is not None and is_best:
            self.best = facts.val_loss
        if is_best or self.which == "all":
            aliases = ["latest", f"step-{facts.step}", *(["best"] if is_best else [])]
            try:
                self._waiting.put((self._linked(place), facts, aliases))
            except OSError as error:
                log.warning("W&B does not get the checkpoint of step %d: %s.", facts.step, error)

    def close(self, seconds: float) -> None:
        """Wait so long for those that were taken."""
        self._waiting.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("W&B does not get the last checkpoints: they could not be hashed in %g seconds.", seconds)

    def clear(self) -> None:
        """Remove what W&B has."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _linked(self, place: Path) -> Path:
        """Link a checkpoint's files into a folder of their own; copy them where there are no links."""
        folder = next(path for i in itertools.count() if not (path := self.folder / f"{place.name}.{i}").exists())
        folder.mkdir(parents=True)
        for path in place.iterdir():
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copyfile(path, folder / path.name)
        return folder

    def _send_all(self) -> None:
        while (taken := self._waiting.get()) is not None:
            try:
                self._send(*taken)
            except Exception as error:  # whatever it is, the run is worth more
                log.warning("W&B does not get the checkpoint of step %d: %s", taken[1].step, error)

    def _send(self, folder: Path, facts: Facts, aliases: list[str]) -> None:
        import wandb

        metadata = facts.model_dump(mode="json", exclude={"evaluation_due"})
        artifact = wandb.Artifact(f"model-{self.run.id}", type="model", metadata=metadata)
        for path in sorted(folder.iterdir()):
            artifact.add_file(str(path), policy="immutable", skip_cache=True)  # neither copied here nor to the cache
        self.run.log_artifact(artifact, aliases=aliases)
