"""state.json of a run directory: the state of a run, for other processes. Imports no torch."""

import json
import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, ValidationError

from gptlab.errors import Diverged, UserError
from gptlab.exit_codes import CONFIG_ERROR, DIVERGED, DONE, FAILED, INTERRUPTED, PREEMPTED, PRUNED

STATE = "state.json"
SILENT_SECONDS = 900.0  # seconds without news after which a run on another machine is taken for lost

EARLIER_NAMES = {"mistaken": "config_error"}  # in files that earlier versions wrote


def _current_name(name: Any) -> Any:
    return EARLIER_NAMES.get(name, name) if isinstance(name, str) else name


StateName = Annotated[
    Literal["running", "done", "pruned", "stopped", "interrupted", "diverged", "config_error", "failed", "lost"],
    BeforeValidator(_current_name),
]
END_STATES: dict[int, StateName] = {
    DONE: "done",
    PRUNED: "pruned",
    PREEMPTED: "stopped",
    INTERRUPTED: "interrupted",
    DIVERGED: "diverged",
    CONFIG_ERROR: "config_error",
}


class RunState(BaseModel):
    """State of a run.

    Attributes:
        state: "running"; or how it ended: "done", "pruned" (its sweep saw no future in it), "stopped" (by a signal; the
            same command resumes it), "interrupted" (by the user), "diverged", "config_error" (the configuration or
            its input is wrong), "failed" (an error), "lost" (its process is no longer there and has not said why).
        status: Exit status; None while it runs.
        message: What went wrong, in a sentence.
        step: Optimizer steps done.
        max_steps: Length of the run.
        tokens: Seen so far.
        loss: Latest train loss, nats per token.
        val_loss: Latest val loss, nats per token.
        best_val_loss: Lowest val loss, nats per token.
        tokens_per_second: At the latest row.
        seconds: Of work on the run so far, over all its starts.
        seconds_left: Estimated.
        began: When this start of the run began, seconds since the epoch.
        updated: When this was written, likewise.
        pid: Process that writes it.
        host: Machine that it runs on.
    """

    model_config = ConfigDict(extra="ignore")

    state: StateName = "running"
    status: int | None = None
    message: str | None = None
    step: int = 0
    max_steps: int = 0
    tokens: int = 0
    loss: float | None = None
    val_loss: float | None = None
    best_val_loss: float | None = None
    tokens_per_second: float | None = None
    seconds: float = 0.0
    seconds_left: float | None = None
    began: float = 0.0
    updated: float = 0.0
    pid: int = 0
    host: str = ""

    def save(self, directory: Path) -> None:
        """Writes state.json atomically; it is not synced, as losing an update does no harm."""
        unfinished = directory / f".{STATE}.{os.getpid()}"
        unfinished.write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")
        unfinished.replace(directory / STATE)


def new_state(max_steps: int) -> RunState:
    """Returns the state of a run that starts in this process."""
    now = time.time()
    return RunState(max_steps=max_steps, began=now, updated=now, pid=os.getpid(), host=platform.node())


def load_state(directory: Path) -> RunState | None:
    """Reads state.json; returns None if there is none. A running state whose process is gone becomes "lost"."""
    try:
        state = RunState.model_validate(json.loads((directory / STATE).read_text(encoding="utf-8")))
    except (OSError, ValueError, ValidationError):
        return None
    if state.state == "running" and not _is_alive(state):
        return state.model_copy(update={"state": "lost", "seconds_left": None})
    return state


def end_state(
    directory: Path, status: int, message: str | None = None, *, step: int | None = None, tokens: int | None = None
) -> None:
    """Records how a run ended, if it had started.

    Args:
        directory: The run directory.
        status: Exit status.
        message: Why the run ended, if it failed.
        step: Step that the run was saved at; None keeps the last one that was logged.
        tokens: Tokens seen until then.
    """
    state = load_state(directory)
    if state is not None:
        changes: dict[str, Any] = {"state": END_STATES.get(status, "failed"), "status": status, "message": message}
        if step is not None:
            changes |= {"step": step, "tokens": tokens}
        state.model_copy(update={**changes, "seconds_left": None, "updated": time.time()}).save(directory)


def status_of(error: BaseException) -> int:
    """Returns the exit status of a run that ends with an error."""
    match error:
        case KeyboardInterrupt():
            return INTERRUPTED
        case Diverged():
            return DIVERGED
        case UserError():
            return CONFIG_ERROR
    return FAILED


def _is_alive(state: RunState) -> bool:
    """Whether the process is there, as far as one can see from here."""
    if state.host != platform.node():
        return time.time() - state.updated < SILENT_SECONDS
    with suppress(PermissionError):
        try:
            os.kill(state.pid, 0)
        except ProcessLookupError:
            return False
    return not _is_zombie(state.pid)


def _is_zombie(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (OSError, IndexError):
        return False
