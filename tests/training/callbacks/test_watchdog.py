"""A process that makes no progress writes its stacks and ends; one that does is left alone."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

from gptlab.training.callbacks.watchdog import HUNG_STATUS

PROGRAM = """
import ctypes, sys, time
from pathlib import Path
from types import SimpleNamespace
from gptlab.training.callbacks.watchdog import Watchdog
trainer = SimpleNamespace(callbacks=[], global_rank=3)
with Watchdog(trainer, 2.0, Path(sys.argv[1])) as watchdog:
    assert trainer.callbacks == [watchdog]
    watchdog.listeners += [lambda sentence: time.sleep(60), lambda sentence: print("heard:", sentence, flush=True)]
    print("begun", flush=True)
    {what}
"""
HANGS = {
    "asleep": ("def waits(): time.sleep(60)\n    waits()", HUNG_STATUS, "in waits"),
    "with Python's lock held": ("ctypes.PyDLL(None).sleep(60)", 1, ""),  # no Python thread runs then
}


def watched(folder: Path, what: str) -> tuple[subprocess.CompletedProcess[str], float]:
    command = (sys.executable, "-c", PROGRAM.format(what=what), str(folder))
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    process.stdout.readline()  # Lightning is imported
    begun = time.monotonic()
    output, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(command, process.returncode, output, errors), time.monotonic() - begun


@pytest.mark.parametrize(("what", "status", "frame"), HANGS.values(), ids=HANGS)
def test_a_process_that_hangs_says_where_and_ends(tmp_path: Path, what: str, status: int, frame: str) -> None:
    done, seconds = watched(tmp_path / "stacks", what)
    assert done.returncode == status, done.stderr
    assert 1.9 < seconds < 10
    assert "most recent call first" in done.stderr
    if status == HUNG_STATUS:
        stacks = tmp_path / "stacks" / "rank_3.txt"
        assert frame in stacks.read_text()
        assert frame in done.stderr
        assert "rank 3 made no progress for 2 seconds (trainer.hang_timeout), and ends. " in done.stderr
        assert str(stacks) in done.stderr
        (heard,) = [line for line in done.stdout.splitlines() if line.startswith("heard: ")]
        assert heard.removeprefix("heard: ") in done.stderr


@pytest.mark.slow
def test_a_process_that_goes_on_is_left_alone(tmp_path: Path) -> None:
    done, seconds = watched(tmp_path / "stacks", "[(time.sleep(0.5), watchdog.on_train_batch_end()) for _ in range(6)]")
    assert (done.returncode, done.stderr) == (0, "")
    assert seconds > 2.9
    assert not (tmp_path / "stacks").exists()
