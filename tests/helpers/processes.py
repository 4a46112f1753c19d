"""Running processes, and runs that do not end on their own."""

import os
from pathlib import Path

from conftest import RunningCommand

TWO = ("trainer=ddp", "trainer.devices=2")
SMALL = ("data=text", "data.source=text.txt", "model=tiny", "train.eval_every=5", "train.eval_windows=4")


def is_alive(process: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        os.kill(process, 0)
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (ProcessLookupError, FileNotFoundError):
        return False


def training(user, *arguments: str) -> RunningCommand:
    """Starts a run that does not end on its own, and waits for its first checkpoint."""
    run = user.begin("gptlab.train", *SMALL, "train.max_steps=1000000", "callbacks=checkpoint", *arguments)
    run.until(lambda: list(user.folder.glob("outputs/*/*/checkpoints/step_*")))
    return run


def processes_of(folder: Path) -> list[str]:
    """Returns the command lines of the processes whose working directory is ``folder``."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if (process / "cwd").readlink() == folder:
                found.append((process / "cmdline").read_text())
        except OSError:  # it has ended in the meantime
            continue
    return found
