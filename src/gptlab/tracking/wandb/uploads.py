"""Uploads to W&B beside the metrics: checkpoints as artifacts, sent by a background thread, and alerts."""

import itertools
import logging
import math
import os
import queue
import shutil
import threading
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, Literal

from gptlab.training.callbacks.health_monitor import SPIKE
from gptlab.training.checkpoints.records import CheckpointMetadata

log = logging.getLogger(__name__)

FOLDER = "wandb/checkpoints"  # in the run directory
STALL = "No progress"
WARNINGS = {SPIKE}  # alerts of every other kind are errors


class BackgroundUploader:
    """Runs uploads one after the other in a background thread; a failed upload is logged and skipped.

    W&B's client waits for its server during some of them.
    """

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._send_all, name="wandb", daemon=True)
        self._thread.start()

    def put(self, what: str, send: Callable[[], None]) -> None:
        """Queues an upload; ``what`` names it in messages."""
        self._waiting.put((what, send))

    def close(self, seconds: float) -> None:
        """Waits at most so many seconds for the queued uploads."""
        self._waiting.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("W&B has not taken all samples and checkpoints in %g seconds.", seconds)

    def _send_all(self) -> None:
        while (upload := self._waiting.get()) is not None:
            what, send = upload
            try:
                send()
            except Exception as error:  # whatever it is, the run is worth more
                log.warning("W&B does not get %s: %s", what, " ".join(str(error).split()))


class CheckpointArtifacts:
    """Uploads checkpoints as artifacts, without making training wait.

    Their files are hard-linked into ``<run_dir>/wandb/checkpoints`` until they are uploaded, even if the checkpoint is
    deleted meanwhile; only then does this take disk space.

    Args:
        run: W&B's run.
        run_dir: Run directory.
        uploader: Thread that uploads.
        which: All checkpoints, or those that were the best when they were written.
        best: Lowest validation loss so far.
    """

    def __init__(
        self,
        run: Any,
        run_dir: Path,
        uploader: BackgroundUploader,
        which: Literal["best", "all"],
        best: float = math.inf,
    ) -> None:
        self.run, self.folder, self.uploader = run, run_dir / FOLDER, uploader
        self.which, self.best = which, best

    def upload(self, checkpoint_dir: Path, metadata: CheckpointMetadata) -> None:
        """Queues a committed checkpoint, if it is wanted."""
        is_best = metadata.val_loss is not None and metadata.val_loss < self.best
        if metadata.val_loss is not None and is_best:
            self.best = metadata.val_loss
        if is_best or self.which == "all":
            aliases = ["latest", f"step-{metadata.step}", *(["best"] if is_best else [])]
            what = f"the checkpoint of step {metadata.step}"
            try:
                self.uploader.put(what, partial(self._send, self._link(checkpoint_dir), metadata, aliases))
            except OSError as error:
                log.warning("W&B does not get %s: %s", what, error)

    def clear(self) -> None:
        """Removes the links, once W&B has the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _link(self, checkpoint_dir: Path) -> Path:
        """Links a checkpoint's files into a new folder; copies them if the file system has no links."""
        name = checkpoint_dir.name
        folder = next(path for i in itertools.count() if not (path := self.folder / f"{name}.{i}").exists())
        folder.mkdir(parents=True)
        for path in checkpoint_dir.iterdir():
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copyfile(path, folder / path.name)
        return folder

    def _send(self, folder: Path, metadata: CheckpointMetadata, aliases: list[str]) -> None:
        import wandb

        values = metadata.model_dump(mode="json", exclude={"evaluation_due"})
        artifact = wandb.Artifact(f"model-{self.run.id}", type="model", metadata=values)
        for path in sorted(folder.iterdir()):
            artifact.add_file(str(path), policy="immutable", skip_cache=True)  # neither copied here nor to the cache
        self.run.log_artifact(artifact, aliases=aliases)


class Alerts:
    """Sends alerts, at most one of a kind in ``wait`` seconds.

    W&B limits them too, but on its server: an offline run would keep all of them.

    Args:
        run: W&B's run.
        wait: Seconds between two alerts of a kind.
        clock: Returns the time in seconds.
    """

    def __init__(self, run: Any, wait: float, clock: Callable[[], float] = time.monotonic) -> None:
        self.run, self.wait, self.clock = run, wait, clock
        self._sent: dict[str, float] = {}

    def send(self, kind: str, sentence: str) -> None:
        """Sends an alert, unless one of its kind was sent less than ``wait`` seconds ago."""
        now = self.clock()
        if now - self._sent.get(kind, -math.inf) < self.wait:
            return
        self._sent[kind] = now
        level = "WARN" if kind in WARNINGS else "ERROR"
        self.run.alert(title=kind, text=sentence, level=level, wait_duration=self.wait)
