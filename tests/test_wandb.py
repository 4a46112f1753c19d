"""Runs with W&B: whether the server responds, dies or hangs, the run continues and the record is complete.

Records are read by W&B's own reader and sent by `wandb sync` to a test server.
"""

import os
import shlex
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import assert_success
from gptlab.exit_codes import CONFIG_ERROR, INTERRUPTED
from test_evaluate import check_record_at_wandb
from wandb_records import (
    SCRIPTS,
    Table,
    begin,
    exit_code,
    has_secret,
    interrupted,
    metrics_file,
    records,
    resumed,
    rows,
)
from wandb_server import KEY, Server


def table(rows: list[dict[str, Any]]) -> Table:
    """Returns W&B's rows by step; each step must occur once."""
    steps = [row["_step"] for row in rows]
    assert len(set(steps)) == len(steps)
    return {row["_step"]: {name: row[name] for name in row if not name.startswith(("_", "samples"))} for row in rows}


def send(user, output: str) -> None:
    """Runs the upload command that a run printed last."""
    command = next(
        line.split("To upload it: ")[1] for line in reversed(output.splitlines()) if "To upload it: " in line
    )
    program, *arguments = shlex.split(command)
    assert_success(user.run(str(SCRIPTS / program), *arguments))


@pytest.fixture
def server(user, tmp_path) -> Iterator[Server]:
    server = Server()
    user.environment |= server.environment | {"WANDB_X_FILE_STREAM_TRANSMIT_INTERVAL": "0.3", "HOME": str(tmp_path)}
    yield server
    server.hangs = False
    server.die()


@pytest.fixture
def silence() -> Iterator[int]:
    """Port that accepts connections and never responds."""
    with socket.create_server(("127.0.0.1", 0), backlog=64) as listening:
        yield listening.getsockname()[1]


def unreachable(user, port: int) -> tuple[str, str]:
    user.environment |= {"WANDB_BASE_URL": f"http://127.0.0.1:{port}", "WANDB_API_KEY": KEY}
    return "logger=wandb", "logger.wandb.init_timeout=1"


def check_kept(user, done) -> None:
    """Checks that the run succeeded without W&B, kept a complete record, and printed why and where."""
    assert_success(done)
    directory = user.only_run()
    (record,) = records(directory)
    assert table(rows(record)) == metrics_file(directory)
    assert list(metrics_file(directory)) == [1, 2, 3, 4, 5, 6]
    assert exit_code(record) == 0
    assert done.stdout.count("W&B cannot be used") == 1
    assert "W&B" not in done.stderr
    assert "wandb:" not in done.stdout + done.stderr  # the prefix of W&B's own output
    (config,) = (line["run"]["config"]["update"] for line in record if line["type"] == "run")
    written = yaml.safe_load((directory / "config.yaml").read_text())
    assert {name: config[name] for name in written} == written
    assert has_secret(user.folder) == []
    assert KEY not in done.stdout + done.stderr


@pytest.mark.slow
def test_the_record_is_kept_locally_if_the_server_refuses(user):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    done = user.train(*unreachable(user, port))
    check_kept(user, done)
    assert "connection refused" in done.stdout


@pytest.mark.slow
def test_the_record_is_kept_locally_if_the_server_never_answers(user, silence):
    began = time.monotonic()
    done = user.train(*unreachable(user, silence))
    check_kept(user, done)
    assert time.monotonic() - began < 60


@pytest.mark.slow
def test_the_record_is_kept_locally_without_a_login(user, tmp_path):
    user.environment["HOME"] = str(tmp_path)
    check_kept(user, user.train("logger=wandb"))


@pytest.mark.slow
@pytest.mark.parametrize("login", [True, False])
def test_mode_online_is_an_error_without_server_or_login(user, tmp_path, silence, login):
    user.environment["HOME"] = str(tmp_path)
    timeout = "logger.wandb.init_timeout=1"
    done = user.train(*(unreachable(user, silence) if login else ("logger=wandb", timeout)), "logger.wandb.mode=online")
    assert done.returncode == CONFIG_ERROR
    assert "logger=wandb cannot start" in done.stderr
    assert ("No API key" in done.stderr) is not login
    assert not (user.only_run() / "metrics.csv").exists()
    assert records(user.only_run()) == []


@pytest.mark.slow
def test_the_server_receives_every_row(user, server):
    done = user.train("logger=wandb", "logger.wandb.mode=online", "logger.wandb.checkpoints=best")
    assert_success(done)
    directory = user.only_run()
    ((name, run),) = server.runs.items()
    assert (directory / "wandb_id").read_text() == name
    assert table(run.history) == metrics_file(directory)
    assert run.exit_code == 0
    assert run.config["optimizer"]["value"]["lr"] == 3e-3
    models = [aliases for artifact, aliases in server.artifacts if artifact == f"model-{name}"]
    assert models == [{"latest", f"step-{step}", "best"} for step in (3, 6)]
    assert not (directory / "wandb" / "checkpoints").exists()  # the server has them
    assert done.stdout.count(f"/runs/{name}") == 1
    assert "wandb:" not in done.stdout + done.stderr
    assert has_secret(user.folder) == []
    check_record_at_wandb(user, server, directory, run)


@pytest.mark.slow
@pytest.mark.parametrize("end", ["dies", "hangs"])
def test_a_server_that_disappears_during_a_run_does_not_stop_it(user, server, end):
    run = begin(user, "train.max_steps=5000", "logger.wandb.finish_timeout=2")
    run.until(lambda: any(run.history for run in server.runs.values()))
    if end == "dies":
        server.die()
    else:
        server.hangs = True
    done = run.ended(seconds=600)
    output = done.stdout + done.stderr
    directory = user.only_run()
    after_training = time.time() - (directory / "metrics.csv").stat().st_mtime
    assert after_training < 30  # finish_timeout, and some time to exit
    (record,) = records(directory)
    assert list(metrics_file(directory)) == list(range(1, 5001))
    assert table(rows(record)) == metrics_file(directory)
    assert exit_code(record) == 0
    (sent,) = server.runs.values()
    assert len(sent.history) < 5000
    assert output.count("W&B has not received the whole record in time") == 1
    assert "wandb:" not in output
    assert has_secret(user.folder) == []

    again = Server(server.runs, server.server_port) if end == "dies" else server
    server.hangs = False
    send(user, output)
    by_step = {row["_step"]: row for row in sent.history}  # a row that is sent again has the same step
    assert table(list(by_step.values())) == metrics_file(directory)
    assert sent.exit_code == 0
    again.die()


@pytest.mark.slow
def test_a_run_survives_the_death_of_wandbs_process(user, server):
    run = begin(user, "train.max_steps=3000")
    run.until(lambda: any(run.history for run in server.runs.values()))
    (core,) = (pid for pid in run.children() if "wandb-core" in Path(f"/proc/{pid}/cmdline").read_text())
    os.kill(core, signal.SIGKILL)
    done = run.ended(seconds=600)
    output = done.stdout + done.stderr
    assert output.count("W&B has failed, and no more rows are sent") == 1
    assert list(metrics_file(user.only_run())) == list(range(1, 3001))
    assert "Next: python -m gptlab.sample" in output


@pytest.mark.slow
@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL])
def test_the_records_of_a_resumed_run_sync_to_one_run(user, server, by):
    directory = interrupted(user, "logger.wandb.mode=offline", by=by)
    output, before, after = resumed(user, directory)
    first, second = records(directory)
    assert before % 40  # so that some steps are trained twice
    if by == signal.SIGINT:
        assert exit_code(first) == INTERRUPTED
        assert max(table(rows(first))) == before
    assert table(rows(first, second)).keys() == set(range(1, after + 1))
    assert exit_code(second) == 0
    ids = {line["run"]["run_id"] for line in first + second if line["type"] == "run"}
    assert ids == {(directory / "wandb_id").read_text()}
    send(user, output)
    check_sent(server, directory, after)


def check_sent(server: Server, directory: Path, after: int) -> None:
    """Checks that the server has the complete run, each step once, with the values of metrics.csv."""
    ((name, sent),) = server.runs.items()
    assert name == (directory / "wandb_id").read_text()
    found, written = table(sent.history), metrics_file(directory)
    assert list(found) == list(range(1, after + 1))
    of_the_process = dict.fromkeys(("tokens_per_second", "data_wait", "peak_memory_gb"), 0)
    for step in written:  # a step that was trained twice has another duration
        assert found[step] | of_the_process == written[step] | of_the_process
    assert sent.exit_code == 0


@pytest.mark.slow
def test_a_run_resumed_online_is_one_wandb_run(user, server):
    directory = interrupted(user, "logger.wandb.mode=online")
    assert next(iter(server.runs.values())).exit_code == INTERRUPTED
    _, _, after = resumed(user, directory)
    check_sent(server, directory, after)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["offline", "online"])
def test_a_resumed_run_sends_the_rows_that_wandb_missed(user, server, mode):
    directory = interrupted(user, f"logger.wandb.mode={mode}", silent=server if mode == "online" else None)
    server.hangs = False
    assert sum(len(run.history) for run in server.runs.values()) < max(metrics_file(directory))
    _, _, after = resumed(user, directory, "logger=wandb", "logger.wandb.mode=auto")
    check_sent(server, directory, after)
    assert all(Path(f"{path}.synced").exists() for path in directory.glob("wandb/*run-2*/*.wandb"))
