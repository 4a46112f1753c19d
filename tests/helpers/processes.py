"""Processes of the machine, and runs that do not end by themselves."""

import os
from pathlib import Path

from conftest import Begun

TWO = ("trainer=ddp", "trainer.devices=2")
SMALL = ("data=text", "data.source=text.txt", "model=tiny", "train.eval_every=5", "train.eval_windows=4")


def is_alive(process: int) -> bool:
    """Whether a process runs; one that has ended may wait to be reaped."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def training(user, *arguments: str) -> Begun:
    """A run that does not end by itself, and has saved its first checkpoint."""
    run = user.begin("gptlab.train", *SMALL, "train.max_steps=1000000", "callbacks=checkpoint", *arguments)
    run.until(lambda: list(user.folder.glob("outputs/*/*/checkpoints/step_*")))
    return run


def processes_of(folder: Path) -> list[str]:
    """Command lines of the processes that work in a folder."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append((process / "cmdline").read_text())
        except OSError:  # ended meanwhile
            continue
    return found
