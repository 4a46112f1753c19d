"""Links in a run directory from somebody else: nothing is written, deleted or read through them."""

import json
import os
import shutil
import socket
from pathlib import Path

import pytest

from commands import assert_config_error, assert_success
from gptlab.errors import UserError
from gptlab.evaluators.results import results_folder
from gptlab.files import check_no_links, open_append, write_file
from gptlab.model.config import GPTConfig
from gptlab.pretrained.source import ModelSource
from gptlab.tracking.environment import record_environment
from gptlab.tracking.logs import close_log, log_to_file
from gptlab.tracking.run_lock import RunLock
from gptlab.tracking.run_store.state import new_state
from gptlab.training.checkpoints.records import prune_checkpoints

KEPT = "the user's own file\n"


@pytest.fixture
def own(tmp_path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text(KEPT)
    return path


@pytest.fixture
def own_folder(tmp_path) -> Path:
    folder = tmp_path / "own" / "step_000001"
    folder.mkdir(parents=True)
    (folder / "state.pt").write_text(KEPT)
    return folder.parent


# Entries that a resumed run writes, appends to, renames or deletes
FILES = (
    *("train.log", "environment.json", "uncommitted.diff", "config.yaml", "metrics.csv", "state.json", "manifest.json"),
    *("trace.jsonl", "forecast.json", ".run.lock", "wandb_id", "mlflow_id", "job.json", "output.log", "prune.json"),
    *("samples/step_000009.txt", "stacks/rank_0.txt", "tensorboard/events", "checkpoints/step_000001/state.pt"),
    *("wandb/run-1-x/run-x.wandb", "profile/times", "evaluations/loss.json"),
)
FOLDERS = ("checkpoints", "samples", "stacks", "tensorboard", "wandb", "wandb/checkpoints", "evaluations", "profile")


@pytest.mark.parametrize("name", FILES)
def test_a_run_in_which_a_file_is_a_link_is_not_locked_and_not_changed(tmp_path, own, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(own)
    with RunLock() as lock, pytest.raises(UserError, match=rf"{name} is a link"):
        lock.acquire(tmp_path / "run")
    assert own.read_text() == KEPT
    assert [path for path in (tmp_path / "run").rglob("*") if not path.is_dir()] == [path]


@pytest.mark.parametrize("name", FOLDERS)
def test_a_run_in_which_a_directory_is_a_link_is_not_locked(tmp_path, own_folder, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(own_folder)
    with RunLock() as lock, pytest.raises(UserError, match=rf"{name} is a link"):
        lock.acquire(tmp_path / "run")


def test_fifos_and_sockets_in_a_run_directory_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("run").mkdir()
    os.mkfifo("run/train.log")
    with pytest.raises(UserError, match=r"train\.log is neither a file nor a directory"):
        check_no_links(Path("run"))
    Path("run/train.log").unlink()
    with socket.socket(socket.AF_UNIX) as server:
        server.bind("run/socket")
        with pytest.raises(UserError, match="socket is neither a file nor a directory"):
            check_no_links(Path("run"))


def test_run_directories_behind_links_and_links_of_libraries_are_accepted(tmp_path):
    disk = tmp_path / "big disk" / "run"
    for name in ("files", "logs"):
        (disk / "wandb" / "run-1-x" / name).mkdir(parents=True)
    (tmp_path / "outputs").symlink_to(tmp_path / "big disk")
    (tmp_path / "latest").symlink_to(tmp_path / "outputs" / "run")
    for name in (
        "latest-run",
        "debug.log",
        "debug-internal.log",
        "run-1-x/files/notes.txt",
        "run-1-x/logs/debug-core.log",
    ):
        (disk / "wandb" / name).symlink_to(tmp_path)
    (disk / ".submission_file_0.sh").symlink_to(tmp_path)
    with RunLock() as lock:
        lock.acquire(tmp_path / "latest")
        assert (disk / ".run.lock").is_file()


def test_writing_replaces_a_link_that_appears_during_a_run(tmp_path, own):
    for name in ("environment.json", "uncommitted.diff", "state.json", "x.txt"):
        (tmp_path / name).symlink_to(own)
    record_environment(tmp_path)
    new_state(9).save(tmp_path)
    write_file(tmp_path / "x.txt", "text")
    assert own.read_text() == KEPT
    assert json.loads((tmp_path / "environment.json").read_text())["folder"]
    assert (tmp_path / "x.txt").read_text() == "text"
    assert not [path.name for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_appending_refuses_links_and_fifos(tmp_path, own):
    (tmp_path / "link").symlink_to(own)
    (tmp_path / "new").symlink_to(tmp_path / "created")
    os.mkfifo(tmp_path / "fifo")
    for name in ("link", "new"):
        with pytest.raises(OSError, match="it is a link"):
            log_to_file(tmp_path / name)
    with pytest.raises(OSError, match=r"not a regular file|No such device"):
        open_append(tmp_path / "fifo")
    assert own.read_text() == KEPT
    assert not (tmp_path / "created").exists()


def test_the_log_is_appended_and_closed(tmp_path):
    (tmp_path / "train.log").write_text("before\n")
    handler = log_to_file(tmp_path / "train.log")
    handler.stream.write("after\n")
    close_log(handler)
    assert handler.stream.closed
    assert (tmp_path / "train.log").read_text() == "before\nafter\n"


def test_results_are_not_written_through_a_link_of_the_run(tmp_path, own_folder):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.yaml").write_text("")
    (tmp_path / "run" / "evaluations").symlink_to(own_folder)
    source = ModelSource("run", tmp_path / "run", GPTConfig.model_construct(), None, None)
    with pytest.raises(UserError, match="evaluations is a link"):
        results_folder(None, source)
    assert results_folder(str(tmp_path / "run" / "evaluations"), source).samefile(own_folder)  # as the user typed it


def test_the_payloads_work_with_plain_calls(tmp_path, own, own_folder):
    (tmp_path / "checkpoints").symlink_to(own_folder)
    (own_folder / "step_000002").mkdir()
    prune_checkpoints(tmp_path / "checkpoints", 2, keep_last=1, keep_best=False)
    assert not (own_folder / "step_000001").exists()
    (tmp_path / "train.log").symlink_to(own)
    (tmp_path / "train.log").write_text("overwritten")
    assert own.read_text() == "overwritten"


def test_a_resumed_run_changes_nothing_outside_of_its_directory(user, halted, own, own_folder):
    for name in ("train.log", "environment.json", "samples/step_000009.txt"):
        path = halted / name
        path.parent.mkdir(exist_ok=True)
        path.unlink(missing_ok=True)
        path.symlink_to(own)
    resume = ("gptlab.train", f"resume={halted}", "train.max_steps=9")
    before = (halted / "metrics.csv").read_bytes()
    for name in ("environment.json", "train.log"):
        assert_config_error(user.python(*resume), f"{halted / name} is a link")
        (halted / name).unlink()
    assert_config_error(user.python(*resume), f"{halted / 'samples/step_000009.txt'} is a link")
    shutil.rmtree(halted / "samples")
    checkpoints = halted.parent / "moved"
    (halted / "checkpoints").rename(checkpoints)
    (halted / "checkpoints").symlink_to(checkpoints)
    assert_config_error(user.python(*resume), f"{halted / 'checkpoints'} is a link")
    assert (halted / "metrics.csv").read_bytes() == before
    assert own.read_text() == KEPT
    (halted / "checkpoints").unlink()
    checkpoints.rename(halted / "checkpoints")
    outputs = user.folder / "outputs"
    outputs.rename(user.folder / "big disk")
    outputs.symlink_to(user.folder / "big disk")  # the user's own link
    assert_success(user.python(*resume))
