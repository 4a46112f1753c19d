"""Watchdog: a process without progress writes its stack traces and ends; one with progress does not."""

import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptlab.training.callbacks.watchdog import HUNG_STATUS, Watchdog

PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from types import SimpleNamespace
from gptlab.training.callbacks.watchdog import Watchdog
trainer = SimpleNamespace(callbacks=[], global_rank=3)
with Watchdog(trainer, 2.0, Path(sys.argv[1])) as watchdog:
    assert trainer.callbacks == [watchdog]
    watchdog.listeners += [lambda message: time.sleep(60), lambda message: print("received:", message, flush=True)]
    print("started", flush=True)
    {code}
"""
TWO_STEPS = (True, True, False, False)
HANGS = {
    "sleeping": ("def waits(): time.sleep(60)\n    waits()", HUNG_STATUS, "in waits"),
    "holding the GIL": ("ctypes.PyDLL(None).sleep(60)", 1, ""),  # no Python thread runs
}


def run_watched(folder: Path, code: str) -> tuple[subprocess.CompletedProcess[str], float]:
    command = (sys.executable, "-c", PROGRAM.format(code=code), str(folder))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # Lightning is imported
    started = time.monotonic()
    output, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, output, errors), time.monotonic() - started


@pytest.mark.slow
@pytest.mark.parametrize(("code", "exit_code", "frame"), HANGS.values(), ids=HANGS)
def test_a_hung_process_writes_its_stack_traces_and_ends(tmp_path: Path, code: str, exit_code: int, frame: str) -> None:
    done, seconds = run_watched(tmp_path / "stacks", code)
    assert done.returncode == exit_code, done.stderr
    assert 1.9 < seconds < 10
    assert "most recent call first" in done.stderr
    if exit_code == HUNG_STATUS:
        stacks = tmp_path / "stacks" / "rank_3.txt"
        assert frame in stacks.read_text()
        assert frame in done.stderr
        assert "rank 3 made no progress for 2 seconds (trainer.hang_timeout)" in done.stderr
        assert str(stacks) in done.stderr
        (received,) = [line for line in done.stdout.splitlines() if line.startswith("received: ")]
        assert received.removeprefix("received: ") in done.stderr


@pytest.mark.slow
def test_a_process_that_makes_progress_is_not_ended(tmp_path: Path) -> None:
    progress = "[(time.sleep(0.5), watchdog.on_validation_end()) for _ in range(6)]"
    done, seconds = run_watched(tmp_path / "stacks", progress)
    assert (done.returncode, done.stderr) == (0, "")
    assert seconds > 2.9
    assert not (tmp_path / "stacks").exists()


@pytest.mark.parametrize(("device", "compiled"), [("cpu", False), ("cpu", "whole"), ("meta", False), ("cuda", False)])
def test_the_first_batches_of_a_shape_have_time_to_be_compiled(tmp_path: Path, device: str, compiled: Any) -> None:
    trainer: Any = SimpleNamespace(callbacks=[], accumulate_grad_batches=2)
    module: Any = SimpleNamespace(device=torch.device(device), compile_target=compiled)
    watchdog, longer = Watchdog(trainer, 2.0, tmp_path), bool(compiled) or device == "cuda"
    limits = []

    def run(stage: str, size: int, index: int) -> None:
        batch: Any = SimpleNamespace(idx=torch.zeros(size, 8))
        getattr(watchdog, f"on_{stage}_batch_start")(trainer, module, batch, index)
        limits.append(watchdog._limit > 2.0)
        getattr(watchdog, f"on_{stage}_batch_end")(trainer, module, None, batch, index)
        assert watchdog._limit == 2.0

    for index in range(4):  # two micro-batches per step
        run("train", 4, index)
    for index in range(2):
        run("validation", 4, index)
    for index in range(4, 8):  # a stage of train.batch_schedule
        run("train", 6, index)
    assert limits == [expected and longer for expected in (*TWO_STEPS, True, False, *TWO_STEPS)]
