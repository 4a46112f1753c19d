"""W&B records of runs, read by W&B's own reader, and interrupted runs."""

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

from commands import assert_success
from conftest import RunningCommand
from gptlab.exit_codes import INTERRUPTED, PREEMPTED
from wandb_server import KEY, Server

Table = dict[int, dict[str, float]]
SCRIPTS = Path(sys.executable).parent


def metrics_file(directory: Path) -> Table:
    """Returns the values in metrics.csv by step."""
    table: Table = {}
    with (directory / "metrics.csv").open(newline="") as file:
        for row in csv.DictReader(file):
            values = {name: float(value) for name, value in row.items() if value and name != "step"}
            table.setdefault(int(row["step"]), {}).update(values)
    return table


def records(directory: Path, kind: str = "*run-2*") -> list[list[dict[str, Any]]]:
    """Returns what W&B's reader prints for each record of a run, in order of their start."""
    found = []
    for path in sorted(directory.glob(f"wandb/{kind}/*.wandb"), key=lambda path: path.parent.name.split("run-")[1]):
        command = (SCRIPTS / "wandb", "leet", "inspect", "--json", path)
        found.append([json.loads(line) for line in subprocess.run(command, capture_output=True).stdout.splitlines()])
    return found


def rows(*found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [record["history"]["item"] for records in found for record in records if record["type"] == "history"]


def exit_code(record: list[dict[str, Any]]) -> int:
    (code,) = (line["exit"]["exit_code"] for line in record if line["type"] == "exit")
    return code


def has_secret(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


def begin(user, *arguments: str, callbacks: str = "checkpoint") -> RunningCommand:
    """Starts a run with W&B."""
    small = ("data=text", "data.source=text.txt", "model=tiny", "model.block_size=32", f"callbacks={callbacks}")
    options = ("train.eval_every=40", "train.eval_windows=10", "train.log_every=1", "logger=wandb")
    return user.begin("gptlab.train", *small, *options, *arguments)


def interrupted(
    user, *arguments: str, by: int = signal.SIGINT, silent: Server | None = None, callbacks: str = "checkpoint"
) -> Path:
    """Interrupts a run some steps after a checkpoint; ``silent`` is a server that hangs before."""
    length = ("train.max_steps=1000000", "schedule.decay_steps=1000")
    run = begin(user, *length, f"logger.wandb.finish_timeout={3 if silent else 60}", *arguments, callbacks=callbacks)
    if silent:
        run.until(lambda: any(run.history for run in silent.runs.values()))
        silent.hangs = True

    def further_than_a_checkpoint() -> bool:
        saved = list(user.folder.glob("outputs/*/*/checkpoints/step_*"))
        return bool(saved) and max(metrics_file(saved[0].parents[1]), default=0) % 40 in range(11, 25)

    run.until(further_than_a_checkpoint)
    os.killpg(run.pid, by)
    statuses = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED}
    run.ended(statuses.get(by, -by), seconds=180)
    return user.only_run()


def resumed(user, directory: Path, *arguments: str) -> tuple[str, int, int]:
    """Resumes a run for some steps; returns its output, the steps of the interrupted run, and those in total."""
    before = max(metrics_file(directory))
    after = before // 40 * 40 + 80
    done = user.python("gptlab.train", f"resume={directory}", f"train.max_steps={after}", *arguments, timeout=600)
    assert_success(done)
    return done.stdout, before, after
