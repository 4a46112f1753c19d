"""RunWandbLogger with a stand-in for W&B's run that can fail."""

import logging
from pathlib import Path

import pytest

from gptlab.tracking.wandb.logger import RunWandbLogger


class Run:
    """Stand-in for W&B's run; raises ``error`` if it is set."""

    offline, id, sync_dir = False, "abc", ""

    def __init__(self, folder: Path) -> None:
        self.rows: list[tuple[int | None, dict[str, float]]] = []
        self.exit_code: int | None = None
        self.error: Exception | None = None
        self.sync_dir = str(folder)

    def log(self, row: dict[str, float], step: int | None) -> None:
        if self.error:
            raise self.error
        self.rows.append((step, row))

    def finish(self, exit_code: int) -> None:
        self.exit_code = exit_code
        if self.error:
            raise self.error


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "wandb" / "run-20260101_000000-abc"
    folder.mkdir(parents=True)
    (folder / "run-abc.wandb").touch()
    return Run(folder)


@pytest.fixture
def messages(caplog):
    caplog.set_level(logging.INFO, "gptlab")
    return lambda: [record.message for record in caplog.records]


def test_rows_before_the_first_step_are_not_logged_again(run, tmp_path):
    logger = RunWandbLogger(run, tmp_path, first_step=5)
    for step in range(3, 8):
        logger.log_metrics({"loss": step}, step)
    assert run.rows == [(step, {"loss": step}) for step in (5, 6, 7)]


def test_an_error_gives_one_warning_and_ends_the_record(run, tmp_path, messages):
    logger = RunWandbLogger(run, tmp_path, first_step=0)
    logger.log_metrics({"loss": 1.0}, 1)
    run.error = ConnectionResetError("Connection lost")
    for step in range(2, 9):
        logger.log_metrics({"loss": 1.0}, step)
    logger.finalize("success")
    assert run.rows == [(1, {"loss": 1.0})]
    assert messages() == ["W&B has failed, and no more rows are sent: Connection lost. metrics.csv has all rows."]


@pytest.mark.parametrize(("status", "exit_code"), [("success", 0), ("failed", 1)])
def test_a_completely_sent_record_is_marked_as_synced(run, tmp_path, messages, status, exit_code):
    logger = RunWandbLogger(run, tmp_path, first_step=0)
    logger.finalize(status)
    assert run.exit_code == exit_code
    assert (Path(run.sync_dir) / "run-abc.wandb.synced").exists()  # the file name that W&B checks
    assert messages() == []


def test_a_record_that_was_not_sent_in_time_is_named(run, tmp_path, messages, monkeypatch):
    monkeypatch.chdir(tmp_path)
    run.error = TimeoutError("Timed out finishing run.")
    RunWandbLogger(run, tmp_path, first_step=0).finalize("success")
    assert not (Path(run.sync_dir) / "run-abc.wandb.synced").exists()
    (message,) = messages()
    assert message.endswith("To upload it: wandb sync --include-online wandb/run-20260101_000000-abc")
