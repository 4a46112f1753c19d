"""Uploads to W&B in addition to metrics: alerts, and checkpoints as artifacts from a background thread."""

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
    """Runs uploads sequentially in a background thread, since W&B's client blocks during some of them.

    A failed upload is logged and skipped.
    """

    def __init__(self) -> None:
        self._waiting: queue.Queue[tuple[str, Callable[[], None]] | None] = queue.Queue()
        self._thread = threading.Thread(target=self._send_all, name="wandb", daemon=True)
        self._thread.start()

    def put(self, what: str, send: Callable[[], None]) -> None:
        """Queues the upload ``send``; ``what`` is its name in messages."""
        self._waiting.put((what, send))

    def close(self, seconds: float) -> None:
        """Waits at most ``seconds`` for the queued uploads, and logs a warning if some are not finished."""
        self._waiting.put(None)
        self._thread.join(seconds)
        if self._thread.is_alive():
            log.warning("W&B has not received all samples and checkpoints within %g seconds.", seconds)

    def _send_all(self) -> None:
        while (upload := self._waiting.get()) is not None:
            what, send = upload
            try:
                send()
            except Exception as error:  # any error: the run must not depend on W&B
                log.warning("Upload of %s to W&B failed: %s", what, " ".join(str(error).split()))


class CheckpointArtifacts:
    """Uploads checkpoints as artifacts without blocking training.

    Their files are hard-linked into ``<run_dir>/wandb/checkpoints`` until they are uploaded. The links take disk space
    only if the checkpoint is deleted in the meantime.

    Args:
        run: Run object of W&B's client.
        run_dir: Run directory.
        uploader: Background thread that uploads.
        which: "all" checkpoints, or each new "best" one.
        best: Lowest validation loss so far, nats per token.
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
        """Queues a completely saved checkpoint, if ``which`` includes it."""
        is_best = metadata.val_loss is not None and metadata.val_loss < self.best
        if metadata.val_loss is not None and is_best:
            self.best = metadata.val_loss
        if is_best or self.which == "all":
            aliases = ["latest", f"step-{metadata.step}", *(["best"] if is_best else [])]
            what = f"the checkpoint of step {metadata.step}"
            try:
                self.uploader.put(what, partial(self._send, self._link(checkpoint_dir), metadata, aliases))
            except OSError as error:
                log.warning("Upload of %s to W&B failed: %s", what, error)

    def clear(self) -> None:
        """Removes the links; called when W&B has received the files."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _link(self, checkpoint_dir: Path) -> Path:
        """Links a checkpoint's files into a new directory; copies them if the file system has no hard links."""
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
            artifact.add_file(str(path), policy="immutable", skip_cache=True)  # not copied locally
        self.run.log_artifact(artifact, aliases=aliases)


class Alerts:
    """Sends alerts, at most one of each kind per ``wait`` seconds.

    W&B also limits alerts, but only on its server: an offline run would record all of them.

    Args:
        run: Run object of W&B's client.
        wait: Minimum seconds between two alerts of a kind.
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
