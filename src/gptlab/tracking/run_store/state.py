"""State of a run in state.json, for other processes such as gptlab.runs. Imports no torch."""

import os
import platform
import time
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict

from gptlab.errors import Diverged, UserError
from gptlab.exit_codes import CONFIG_ERROR, DIVERGED, DONE, FAILED, INTERRUPTED, PREEMPTED, PRUNED
from gptlab.files import read_regular, skip_if_disk_full, write_file
from gptlab.parsing import parse_json

STATE = "state.json"
SILENT_SECONDS = 900.0  # seconds without an update after which a run on another host counts as lost

EARLIER_NAMES = {"mistaken": "config_error"}  # names written by earlier versions


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
        state: "running", or how the run ended: "done", "pruned" (by its sweep), "stopped" (preempted by a signal; can
            be resumed), "interrupted" (by the user), "diverged", "config_error" (invalid configuration or input),
            "failed" (an error), "lost" (its process ended without recording a state).
        status: Exit code; None while the run is in progress.
        message: Error message, one sentence.
        blew_up: Message that the loss of a run that is done blew up (see ``describe_blow_up``); None if it did not.
        step: Optimizer steps completed.
        max_steps: Length of the run in optimizer steps.
        tokens: Tokens seen.
        loss: Latest train loss, nats per token.
        val_loss: Latest val loss, nats per token.
        best_val_loss: Lowest val loss, nats per token.
        tokens_per_second: Throughput in the latest row of metrics.csv.
        seconds: Wall time of the run in seconds, summed over its starts.
        seconds_left: Estimated remaining wall time in seconds.
        began: Time of the latest start, seconds since the epoch.
        updated: Time of the latest update, seconds since the epoch.
        pid: ID of the process that writes the file.
        host: Host name of the machine.
    """

    model_config = ConfigDict(extra="ignore")

    state: StateName = "running"
    status: int | None = None
    message: str | None = None
    blew_up: str | None = None
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
        """Writes state.json atomically; it is not synced to disk, since a lost update does no harm."""
        write_file(directory / STATE, self.model_dump_json(indent=1) + "\n")


def new_state(max_steps: int) -> RunState:
    """Returns the initial state of a run of ``max_steps`` optimizer steps in this process."""
    now = time.time()
    return RunState(max_steps=max_steps, began=now, updated=now, pid=os.getpid(), host=platform.node())


def read_state(directory: Path) -> RunState:
    """Reads state.json; raises OSError or ValueError if it is missing or damaged."""
    return RunState.model_validate(parse_json(read_regular(directory / STATE)))


def load_state(directory: Path) -> RunState | None:
    """Reads state.json; None if it is missing or damaged. A "running" state becomes "lost" if its process is gone."""
    try:
        state = read_state(directory)
    except (OSError, ValueError):
        return None
    if state.state == "running" and not _is_alive(state):
        return state.model_copy(update={"state": "lost", "seconds_left": None})
    return state


def end_state(
    directory: Path,
    status: int,
    message: str | None = None,
    *,
    step: int | None = None,
    tokens: int | None = None,
    blew_up: str | None = None,
) -> None:
    """Records how a run ended, if it had started.

    Args:
        directory: The run directory.
        status: Exit code.
        message: Error message, if the run failed.
        step: Step of the final checkpoint; None keeps the last step that was logged.
        tokens: Tokens seen up to ``step``; ignored if that is None.
        blew_up: Message that its loss blew up, if it did.
    """
    state = load_state(directory)
    if state is not None:
        changes: dict[str, Any] = {"state": END_STATES.get(status, "failed"), "status": status, "message": message}
        changes["blew_up"] = blew_up
        if step is not None:
            changes |= {"step": step, "tokens": tokens}
        with skip_if_disk_full(directory / STATE):
            state.model_copy(update={**changes, "seconds_left": None, "updated": time.time()}).save(directory)


def status_of(error: BaseException) -> int:
    """Returns the exit code of a run that ends with an error."""
    match error:
        case KeyboardInterrupt():
            return INTERRUPTED
        case Diverged():
            return DIVERGED
        case UserError():
            return CONFIG_ERROR
    return FAILED


def _is_alive(state: RunState) -> bool:
    """Whether the process exists; on another host, whether it has updated its state recently."""
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
