"""Alerts, artifacts and samples, with a stand-in for W&B's run."""

import contextlib
import json
import logging
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import wandb

from gptlab.errors import Diverged
from gptlab.tracking.wandb.logger import RunWandbLogger
from gptlab.tracking.wandb.uploads import Alerts, BackgroundUploader, CheckpointArtifacts
from gptlab.training.callbacks.preemption import Preempted
from gptlab.training.callbacks.samples import HEADING, parse_samples
from gptlab.training.checkpoints.records import CheckpointMetadata

WANDB = Path(sys.executable).parent / "wandb"


class Run:
    """Stand-in for W&B's run that records its arguments."""

    id, offline = "abc", True

    def __init__(self) -> None:
        self.alerts: list[dict[str, Any]] = []
        self.artifacts: list[tuple[wandb.Artifact, list[str]]] = []
        self.rows: list[tuple[int | None, bool | None, dict[str, Any]]] = []
        self.error: Exception | None = None

    def alert(self, **values: Any) -> None:
        if self.error:
            raise self.error
        self.alerts.append(values)

    def log_artifact(self, artifact: wandb.Artifact, aliases: list[str]) -> None:
        if self.error:
            raise self.error
        self.artifacts.append((artifact, aliases))

    def log(self, row: dict[str, Any], step: int | None = None, commit: bool | None = None) -> None:
        self.rows.append((step, commit, row))


def test_alerts_of_a_kind_are_limited_in_time():
    run, clock = Run(), SimpleNamespace(now=100.0)
    alerts = Alerts(run, 60.0, lambda: clock.now)
    for now, kind in ((100, "Loss spike"), (101, "Step skipped"), (159, "Loss spike"), (161, "Loss spike")):
        clock.now = now
        alerts.send(kind, f"at {now}")
    assert [(alert["title"], alert["text"]) for alert in run.alerts] == [
        ("Loss spike", "at 100"),
        ("Step skipped", "at 101"),
        ("Loss spike", "at 161"),
    ]
    assert [alert["level"] for alert in run.alerts] == ["WARN", "ERROR", "WARN"]
    assert {alert["wait_duration"] for alert in run.alerts} == {60.0}


def test_an_alert_that_cannot_be_sent_only_ends_the_record(tmp_path, caplog):
    run = Run()
    run.error = ConnectionResetError("gone")
    record = RunWandbLogger(run, tmp_path, first_step=0)
    record.alert("Loss spike", "not sent")  # alerts are disabled
    record.alerts = Alerts(run, 60.0)
    record.alert("Loss spike", "fails")
    assert caplog.messages == ["W&B has failed, and no more rows are sent: gone. metrics.csv has all rows."]


def checkpoint(tmp_path, step: int) -> Any:
    checkpoint_dir = tmp_path / "checkpoints" / f"step_{step:06d}"
    checkpoint_dir.mkdir(parents=True, exist_ok=True)
    (checkpoint_dir / "state.pt").write_bytes(f"weights {step}".encode())
    (checkpoint_dir / "record.json").write_text("{}")
    return checkpoint_dir


def taken(tmp_path, which: Any, losses: list[float | None], best: float = math.inf) -> Run:
    run = Run()
    uploader = BackgroundUploader()
    artifacts = CheckpointArtifacts(run, tmp_path, uploader, which, best)
    for step, loss in enumerate(losses, 1):
        artifacts.upload(checkpoint(tmp_path, step), CheckpointMetadata(step=step, val_loss=loss, evaluation_due=False))
    uploader.close(60)
    return run


@pytest.mark.parametrize(
    ("which", "best", "expected"),
    [
        ("all", math.inf, ["best 1", "2", "best 3", "4"]),
        ("best", math.inf, ["best 1", "best 3"]),
        ("best", 2.5, ["best 3"]),  # a resumed run knows the earlier best
        ("all", 1.0, ["1", "2", "3", "4"]),
    ],
)
def test_checkpoints_become_artifacts_with_their_aliases(tmp_path, which, best, expected):
    run = taken(tmp_path, which, [3.0, None, 2.0, 2.2], best)
    found = []
    for artifact, aliases in run.artifacts:
        assert (artifact.name, artifact.type) == ("model-abc", "model")
        latest, step, *rest = aliases
        assert latest == "latest"
        assert step == f"step-{artifact.metadata['step']}"
        found.append(" ".join([*rest, str(artifact.metadata["step"])]))
    assert found == expected


def test_an_artifact_keeps_its_files_when_the_checkpoint_is_deleted(tmp_path):
    run = taken(tmp_path, "all", [3.0])
    (artifact, _), checkpoint_dir = run.artifacts[0], tmp_path / "checkpoints" / "step_000001"
    entries = artifact.manifest.entries
    assert set(entries) == {"state.pt", "record.json"}
    kept = Path(entries["state.pt"].local_path)
    assert kept.samefile(checkpoint_dir / "state.pt")  # no copy
    for path in checkpoint_dir.iterdir():
        path.unlink()
    assert kept.read_bytes() == b"weights 1"


def test_a_checkpoint_that_is_saved_again_is_linked_separately(tmp_path):
    run = Run()
    uploader = BackgroundUploader()
    artifacts = CheckpointArtifacts(run, tmp_path, uploader, "all")
    for loss in (None, 2.0):  # saved before and after its evaluation
        artifacts.upload(
            checkpoint(tmp_path, 1), CheckpointMetadata(step=1, val_loss=loss, evaluation_due=loss is None)
        )
    uploader.close(60)
    paths = {artifact.manifest.entries["state.pt"].local_path for artifact, _ in run.artifacts}
    assert len(paths) == 2


def test_a_failed_upload_is_logged_and_the_next_one_is_sent(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "gptlab")
    run = Run()
    uploader = BackgroundUploader()
    artifacts = CheckpointArtifacts(run, tmp_path, uploader, "all")
    artifacts.upload(tmp_path / "nowhere", CheckpointMetadata(step=1, val_loss=None, evaluation_due=False))
    artifacts.upload(checkpoint(tmp_path, 2), CheckpointMetadata(step=2, val_loss=None, evaluation_due=False))
    uploader.close(60)
    assert [aliases for _, aliases in run.artifacts] == [["latest", "step-2"]]
    assert len(caplog.messages) == 1
    assert "checkpoint of step 1" in caplog.messages[0]


def test_parse_samples_returns_the_texts_that_were_written():
    texts = ["one\n\ntwo\n", "--- sample\n", ""]
    written = "\n\n".join(f"{HEADING.format(i)}{text}" for i, text in enumerate(texts, 1)) + "\n"
    assert parse_samples(written) == texts


def test_the_table_of_samples_has_all_samples_up_to_the_step(tmp_path):
    (tmp_path / "samples").mkdir()
    for step, texts in ((2, ["a", "b"]), (10, ["c", "d"]), (14, ["later", "of a run that was interrupted"])):
        text = "\n\n".join(f"--- sample {i} ---\n{text}" for i, text in enumerate(texts, 1))
        (tmp_path / "samples" / f"step_{step:06d}.txt").write_text(text + "\n")
    run = Run()
    record = RunWandbLogger(run, tmp_path, first_step=0)
    record.uploader = BackgroundUploader()
    record.log_samples(2, lambda step: 32 * step)  # before the first row: there is no row to add it to
    record.log_metrics({"val/loss": 1.0}, 10)
    record.log_samples(10, lambda step: 32 * step)
    record.uploader.close(60)
    _, (step, commit, row) = run.rows
    assert (step, commit) == (None, False)  # added to the current row
    assert row["samples"].columns == ["step", "tokens", "text"]
    assert row["samples"].data == [[2, 64, "a"], [2, 64, "b"], [10, 320, "c"], [10, 320, "d"]]


@pytest.mark.parametrize(("before", "expected"), [(1.5, 1.5), (3.0, 2.0), (math.inf, 2.0)])
def test_the_summary_keeps_the_lowest_loss_from_before_a_resume(tmp_path, before, expected):
    run = wandb.init(dir=tmp_path, mode="offline", settings=wandb.Settings(silent=True, console="off"))
    run.define_metric("val/loss", summary="min")
    record = RunWandbLogger(run, tmp_path, first_step=0, best=before)
    for step, loss in enumerate((2.5, 2.0, 4.0), 1):
        record.log_metrics({"val/loss": loss}, step)
    record.finalize("success")
    (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
    read = subprocess.run((WANDB, "leet", "inspect", "--summary", "--json", path), capture_output=True, check=True)
    summary = json.loads(read.stdout)
    assert summary["summary"]["val/loss"] == {"min": expected}
    assert (summary["step"], summary["state"]) == (3, "finished")


@pytest.mark.parametrize(
    ("error", "exit_code"),
    [(None, 1), (KeyboardInterrupt(), 130), (Diverged("nan"), 3), (Preempted(), 75), (ValueError("x"), 1)],
)
def test_wandb_gets_the_exit_code_of_the_process(tmp_path, error, exit_code):
    ended: list[Any] = []
    preempting = partial(ended.append, "preempting")
    run = SimpleNamespace(offline=True, finish=lambda exit_code: ended.append(exit_code), mark_preempting=preempting)
    record = RunWandbLogger(run, tmp_path, first_step=0)
    with contextlib.suppress(BaseException):
        try:
            if error is not None:
                raise error
        finally:
            record.finalize("failed")
    assert ended == (["preempting"] if exit_code == 75 else []) + [exit_code]
