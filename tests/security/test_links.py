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
from gptlab.pretrained.external import open_safetensors
from gptlab.pretrained.source import ModelSource
from gptlab.reporting.sweeps import _scaling
from gptlab.tracking.environment import record_environment
from gptlab.tracking.logs import close_log, log_to_file
from gptlab.tracking.run_directory import require_checkpoint
from gptlab.tracking.run_lock import RunLock
from gptlab.tracking.run_store.state import new_state
from gptlab.tracking.wandb.files import last_step, mark_synced, truncate_incomplete
from gptlab.training.checkpoints.records import list_checkpoints, prune_checkpoints

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
    *("wandb/run-1-x/run-x.wandb", "wandb/run-1-x/run-x.wandb.synced", "wandb/run-1-x/files/output.log"),
    *("wandb/debug-run-1/run-x.wandb", "wandb/debug.log/a", "wandb/files/run-x.wandb", ".submission_file_0.sh"),
    *("profile/times", "evaluations/loss.json"),
)
FOLDERS = ("checkpoints", "samples", "stacks", "tensorboard", "wandb", "wandb/checkpoints", "evaluations", "profile")


@pytest.mark.parametrize("name", [*FILES, *FOLDERS])
def test_a_run_in_which_an_entry_is_a_link_is_not_locked_and_not_changed(tmp_path, own, own_folder, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(own_folder if name in FOLDERS else own)
    with RunLock() as lock, pytest.raises(UserError, match=rf"{name} is a link"):
        lock.acquire(tmp_path / "run")
    assert own.read_text() == KEPT
    assert [path.name for path in own_folder.rglob("*")] == ["step_000001", "state.pt"]
    assert [path for path in (tmp_path / "run").rglob("*") if path.is_symlink() or not path.is_dir()] == [path]


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


def test_fifos_in_the_place_of_links_of_libraries_are_refused(tmp_path):
    for name in ("wandb/debug.log", "wandb/run-1-x/logs/debug-core.log", ".submitit/.submission_file_0.sh"):
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        os.mkfifo(path)
        with pytest.raises(UserError, match="is neither a file nor a directory"):
            check_no_links(tmp_path)
        path.unlink()


@pytest.mark.parametrize("name", ["run-x.wandb", "run-x.wandb.synced"])
def test_records_of_wandb_are_not_written_or_read_through_links(tmp_path, own, name):
    record = tmp_path / "run-x.wandb"
    for target in (own, tmp_path / "created"):
        (tmp_path / name).symlink_to(target)
        for use in (mark_synced,) if name.endswith("synced") else (truncate_incomplete, last_step):
            with pytest.raises(OSError, match="it is a link"):
                use(record)
        (tmp_path / name).unlink()
    assert own.read_text() == KEPT
    assert not (tmp_path / "created").exists()
    os.mkfifo(record)
    with pytest.raises(OSError, match="not a regular file"):
        truncate_incomplete(record)


@pytest.mark.parametrize("name", ["checkpoints", "checkpoints/step_000001"])
def test_checkpoints_behind_links_are_not_read(tmp_path, own_folder, name):
    path = tmp_path / "run" / name
    path.parent.mkdir(parents=True)
    path.symlink_to(own_folder if name == "checkpoints" else own_folder / "step_000001")
    assert list_checkpoints(tmp_path / "run" / "checkpoints") == []
    problem = "checkpoints is a link" if name == "checkpoints" else "has no checkpoint"
    with pytest.raises(UserError, match=problem):
        require_checkpoint(tmp_path / "run")


def test_a_model_that_is_a_fifo_is_refused(tmp_path):
    os.mkfifo(tmp_path / "model.safetensors")
    message = r"model\.safetensors is not a complete safetensors file: .*not a regular file"
    with pytest.raises(UserError, match=message), open_safetensors(tmp_path / "model.safetensors", "pt"):
        pass


def test_the_report_reads_no_scaling_law_through_a_link(tmp_path, own):
    problems = []
    (tmp_path / "scaling.json").symlink_to(own)
    assert _scaling(tmp_path / "scaling.json", problems) is None
    (tmp_path / "fifo").mkdir()
    os.mkfifo(tmp_path / "fifo" / "scaling.json")
    assert _scaling(tmp_path / "fifo" / "scaling.json", problems) is None
    assert ["it is a link" in problems[0], "it is not a regular file" in problems[1]] == [True, True]
    assert KEPT.strip() not in "".join(problems)


def test_run_directories_behind_links_and_links_of_libraries_are_accepted(tmp_path):
    disk = tmp_path / "big disk" / "run"
    (disk / "wandb" / "offline-run-1-x" / "logs").mkdir(parents=True)
    (disk / ".submitit").mkdir()
    (tmp_path / "outputs").symlink_to(tmp_path / "big disk")
    (tmp_path / "latest").symlink_to(tmp_path / "outputs" / "run")
    for name in ("latest-run", "debug.log", "debug-internal.log", "offline-run-1-x/logs/debug-core.log"):
        (disk / "wandb" / name).symlink_to(tmp_path)
    (disk / ".submitit" / ".submission_file_0.sh").symlink_to(tmp_path)
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
    assert (own_folder / "step_000001").exists()
    shutil.rmtree(next((tmp_path / "checkpoints").glob("step_000001")))
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
