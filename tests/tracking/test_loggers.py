"""metrics.csv and state.json: whole rows, in spite of full disks and kills."""

import csv
import errno
import os

import pytest

from gptlab.errors import UserError
from gptlab.tracking import loggers
from gptlab.tracking.loggers import MetricsCSVLogger, RunStateLogger, build_loggers, check_metrics
from gptlab.tracking.run_directory import check_writable, load_config
from gptlab.tracking.run_store.runs import METRICS
from gptlab.tracking.run_store.state import STATE, new_state, read_state
from permissions import file_permissions
from run_directories import rows_of, write_run


def rows(directory) -> list[dict[str, str]]:
    with (directory / METRICS).open(newline="") as file:
        return list(csv.DictReader(file))


def test_columns_are_sorted_and_new_ones_are_added(tmp_path):
    logger = MetricsCSVLogger(tmp_path, None)
    logger.log_metrics({"b": 0.1}, step=1)
    logger.log_metrics({"a": 1e-30, "b": float("nan")}, step=2)
    logger.log_metrics({"c": 3.0})  # at the latest step
    assert (tmp_path / METRICS).read_bytes() == b"a,b,c,step\r\n,0.1,,1\r\n1e-30,nan,3.0,2\r\n"


def test_metrics_of_one_step_share_a_row_unless_they_differ(tmp_path):
    logger = MetricsCSVLogger(tmp_path, None)
    for step, metrics in ((1, {"x": 1.0, "t": 5}), (2, {"x": 2.0, "t": 6}), (2, {"y": 3.0, "t": 6}), (2, {"y": 4.0})):
        logger.log_metrics(metrics, step=step)
    assert (tmp_path / METRICS).read_bytes() == b"step,t,x,y\r\n1,5,1.0,\r\n2,6,2.0,3.0\r\n2,,,4.0\r\n"
    resumed = MetricsCSVLogger(tmp_path, 1)  # the last row that it keeps is added to
    resumed.log_metrics({"y": 2.5}, step=1)
    resumed.log_metrics({"x": 2.0}, step=2)
    assert (tmp_path / METRICS).read_bytes() == b"step,t,x,y\r\n1,5,1.0,2.5\r\n2,,2.0,\r\n"


@pytest.mark.parametrize("end", ["", "4,0.123"])
def test_a_resumed_run_keeps_the_rows_up_to_its_checkpoint(tmp_path, end, caplog):
    (tmp_path / METRICS).write_text(f"step,x\n1,1.50\n2,2\n3,3\n{end}")
    logger = MetricsCSVLogger(tmp_path, 2)
    logger.log_metrics({"x": 3.5}, step=3)
    assert [(row["step"], row["x"]) for row in rows(tmp_path)] == [("1", "1.50"), ("2", "2"), ("3", "3.5")]
    assert ("unfinished" in caplog.text) == bool(end)


def test_rows_that_do_not_fit_on_the_disk_are_written_later(tmp_path, monkeypatch, caplog):
    logger = MetricsCSVLogger(tmp_path, None)
    logger.log_metrics({"x": 0.5, "y": 0.5}, step=0)
    logger.log_metrics({"x": 1.0}, step=1)
    before, write = (tmp_path / METRICS).read_bytes(), os.pwrite

    def write_a_part(descriptor, data, position):
        if len(data) > 7 and before.endswith(data):  # the part that is restored
            return write(descriptor, data, position)
        if len(data) > 6:
            return write(descriptor, data[:3], position)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as full:
        full.setattr(os, "pwrite", write_a_part)
        logger.log_metrics({"y": 1.5}, step=1)  # in the row that was written
        assert (tmp_path / METRICS).read_bytes() == before
        logger.log_metrics({"x": 2.0}, step=2)
        logger.log_metrics({"x": 3.0}, step=3)
        assert (tmp_path / METRICS).read_bytes() == before
        full.setattr(loggers, "write_file", lambda path, content: write_a_part(0, b"", 0))
        logger.log_metrics({"v": 3.0}, step=3)
        assert (tmp_path / METRICS).read_bytes() == before
    assert caplog.text.count("The disk is full") == 1
    logger.log_metrics({"x": 4.0}, step=4)
    assert [row["step"] for row in rows(tmp_path)] == ["0", "1", "2", "3", "4"]
    assert [row["x"] for row in rows(tmp_path)] == ["0.5", "1.0", "2.0", "3.0", "4.0"]
    assert [rows(tmp_path)[1]["y"], rows(tmp_path)[3]["v"]] == ["1.5", "3.0"]


def test_a_state_that_does_not_fit_on_the_disk_ends_no_run(tmp_path, monkeypatch):
    logger = RunStateLogger(tmp_path, new_state(2))
    before = (tmp_path / STATE).read_bytes()

    def fails(state, directory):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr("gptlab.tracking.run_store.state.RunState.save", fails)
    logger.log_metrics({"train/loss": 1.0}, step=2)
    assert (tmp_path / STATE).read_bytes() == before


@pytest.mark.parametrize("content", [None, '{"step": '], ids=["missing", "truncated"])
def test_a_resumed_run_begins_with_the_state_at_its_checkpoint_also_without_state_json(tmp_path, content, caplog):
    batch = ("train.global_batch_size=12", "model.block_size=64")
    run = write_run(tmp_path / "run", *batch, rows=rows_of(20))
    (run / STATE).write_text(content) if content else (run / STATE).unlink()
    build_loggers(load_config(run).model_copy(update={"resume": str(run)}), run, 15)
    state, kept = read_state(run), [row for row in rows_of(20) if row["step"] <= 15]
    assert (state.step, state.tokens, state.seconds) == (15, 15 * 12 * 64, 0)
    assert state.loss == [row["train/loss"] for row in kept if "train/loss" in row][-1]
    assert state.best_val_loss == min(row["val/loss"] for row in kept if "val/loss" in row)
    assert ("state.json cannot be read" in caplog.text) == bool(content)


def test_a_resume_reports_that_the_earlier_rows_are_missing(tmp_path, caplog):
    run = write_run(tmp_path / "run", rows=[])
    build_loggers(load_config(run).model_copy(update={"resume": str(run)}), run, 15)
    assert "metrics.csv is missing or empty. Its rows start after step 15." in caplog.text


def test_files_that_a_resumed_run_cannot_write_are_named_before_it_writes_any(tmp_path):
    run = write_run(tmp_path / "run")
    check_writable(run)
    check_metrics(run)
    (run / "train.log").touch()
    (run / "train.log").chmod(0)
    with file_permissions(), pytest.raises(UserError, match=r"train\.log cannot be written: permission denied"):
        check_writable(run)
    (run / "train.log").unlink()
    (run / STATE).unlink()
    (run / STATE).mkdir()
    with pytest.raises(UserError, match=r"state\.json cannot be written: is a directory"):
        check_writable(run)
    (run / METRICS).write_text("step,x\na,1\n")
    with pytest.raises(UserError, match=r"metrics\.csv cannot be read"):
        check_metrics(run)
