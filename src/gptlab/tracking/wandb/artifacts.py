"""A run's checkpoints as W&B's artifacts."""

import itertools
import logging
import math
import os
import shutil
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gptlab.tracking.wandb.background_uploader import BackgroundUploader
from gptlab.training.checkpoints.records import CheckpointMetadata

log = logging.getLogger(__name__)

FOLDER = "wandb/checkpoints"  # in the run directory


class Artifacts:
    """Hands W&B's client checkpoints; training waits for none of it.

    The files are linked into ``<run>/wandb/checkpoints``, so that they are there until they are sent, whatever becomes
    of the checkpoint; that takes room only when the checkpoint itself is gone.

    Args:
        run: Of W&B.
        directory: The run's.
        sender: What sends them.
        which: All checkpoints, or those that were the best when they were made.
        best: The lowest val loss so far.
    """

    def __init__(
        self,
        run: Any,
        directory: Path,
        sender: BackgroundUploader,
        which: Literal["best", "all"],
        best: float = math.inf,
    ) -> None:
        self.run, self.folder, self.sender = run, directory / FOLDER, sender
        self.which, self.best = which, best

    def take(self, place: Path, facts: CheckpointMetadata) -> None:
        """Take a checkpoint that is there, whole."""
        is_best = facts.val_loss is not None and facts.val_loss < self.best
        if facts.val_loss is not None and is_best:
            self.best = facts.val_loss
        if is_best or self.which == "all":
            aliases = ["latest", f"step-{facts.step}", *(["best"] if is_best else [])]
            what = f"the checkpoint of step {facts.step}"
            try:
                self.sender.put(what, partial(self._send, self._linked(place), facts, aliases))
            except OSError as error:
                log.warning("W&B does not get %s: %s", what, error)

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

    def _send(self, folder: Path, facts: CheckpointMetadata, aliases: list[str]) -> None:
        import wandb

        metadata = facts.model_dump(mode="json", exclude={"evaluation_due"})
        artifact = wandb.Artifact(f"model-{self.run.id}", type="model", metadata=metadata)
        for path in sorted(folder.iterdir()):
            artifact.add_file(str(path), policy="immutable", skip_cache=True)  # neither copied here nor to the cache
        self.run.log_artifact(artifact, aliases=aliases)
