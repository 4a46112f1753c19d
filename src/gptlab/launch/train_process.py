"""Trains a run for ``gptlab.train(...)`` in Python, in a process of its own. Imports no torch.

The process runs the command ``python -m gptlab.train``: a run does not depend on what the caller has set in torch or
Hydra, and leaves nothing behind in the caller. Its standard input is a pipe, which closes when the caller ends for any
reason. The process then exits.
"""

import contextlib
import os
import select
import signal
import subprocess
import sys
import sysconfig
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

from gptlab.config.override_values import format_value
from gptlab.errors import TrainingError
from gptlab.exit_codes import CONFIG_ERROR, DONE, ERROR, PREEMPTED, RESULT, RUN_DIR
from gptlab.launch.signals import StopSignals
from gptlab.terminal import print_data
from gptlab.tracking.run_store.runs import Run, flatten
from gptlab.training.distributed.processes import STOP_SIGNALS

COMMAND = "gptlab.train"  # by name, since it is in a layer above this package
POLL_SECONDS = 0.1


def train(overrides: Sequence[str] | Mapping[str, Any] = (), *, config_dir: str | Path | None = None) -> Run:
    """Trains a run, as the command ``python -m gptlab.train`` does with the same overrides.

    What the run prints is printed here. Ctrl-C, or interrupting the kernel of a notebook, saves and stops the run.

    Args:
        overrides: Overrides in Hydra's grammar, ``["model=nano", "optimizer.lr=1e-3"]``, or a mapping from keys or
            config groups to values, ``{"model": "nano", "optimizer": {"lr": 1e-3}}``.
        config_dir: Directory with your own config files, searched before ``./conf`` (``--config-dir``).

    Returns:
        The run, which has reached its end.

    Raises:
        TrainingError: The overrides are invalid, or the run failed, diverged or was stopped by a signal.
        KeyboardInterrupt: The run was interrupted. The message says how to resume it.
    """
    arguments = _to_arguments(overrides)
    if config_dir is not None:
        arguments += ["--config-dir", str(config_dir)]
    with tempfile.TemporaryDirectory(prefix="gptlab-") as name:
        results = Path(name)
        status, interrupted = _run(arguments, results)
        message, directory = _read(results / ERROR), _read(results / RUN_DIR)
    run = Run(Path(directory)) if directory else None
    if interrupted:
        raise KeyboardInterrupt(_stopped("Interrupted", run))
    if run is None or status != DONE:
        raise TrainingError(message or _reason(status, run), status, run.directory if run else None)
    return run


def _to_arguments(overrides: Sequence[str] | Mapping[str, Any]) -> list[str]:
    """Returns overrides as arguments of the command; raises TrainingError if they cannot be overrides."""
    if isinstance(overrides, Mapping):
        try:
            return [f"{key}={format_value(value)}" for key, value in flatten(_plain(overrides))]
        except TypeError as error:
            raise TrainingError(f"gptlab.train: {error}.", CONFIG_ERROR) from None
    if not isinstance(overrides, list | tuple) or not all(isinstance(override, str) for override in overrides):
        raise TrainingError(
            f'gptlab.train({overrides!r:.200}): overrides should be a list of strings, such as ["model=nano"], or a '
            "mapping.",
            CONFIG_ERROR,
        )
    for override in overrides:
        if override.startswith("-") or override.lstrip("+").startswith("hydra.mode="):
            raise TrainingError(
                f"{override}: gptlab.train trains one run and has no flags of the command. For a sweep, run "
                "python -m gptlab.train -m ... For your own config files, set config_dir.",
                CONFIG_ERROR,
            )
    return list(overrides)


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    return {str(key): _plain(value) if isinstance(value, Mapping) else value for key, value in values.items()}


def _run(arguments: list[str], results: Path) -> tuple[int, bool]:
    """Runs the command and prints its output; returns its exit code, and whether it was interrupted."""
    # a notebook, or a test, may not show what is written to the file descriptors of this process
    is_shown = sys.stdout.isatty()
    environment = os.environ | {RESULT: str(results), "PYTHONPATH": _search_path(), "PYTHONUNBUFFERED": "1"}
    if not is_shown:
        environment.pop("FORCE_COLOR", None)  # set by Jupyter, where rich's progress bar would print control sequences
    process = subprocess.Popen(
        (sys.executable, "-m", COMMAND, *arguments),
        stdin=subprocess.PIPE,
        stdout=None if is_shown else subprocess.PIPE,
        stderr=None if is_shown else subprocess.STDOUT,
        env=environment,
        start_new_session=True,
    )
    received: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        # SIGTERM saves a run that is training; another Ctrl-C ends it
        saves = number == signal.SIGINT and number not in received and (results / RUN_DIR).exists()
        received.append(number)
        process.send_signal(signal.SIGTERM if saves else number)

    is_main = threading.current_thread() is threading.main_thread()  # only this thread can handle signals
    signals = StopSignals(forward, (*STOP_SIGNALS, signal.SIGINT)) if is_main else contextlib.nullcontext()
    with process:
        try:
            with signals:
                for text in _output(process):
                    print_data(text, end="")
                status = process.wait()
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    return (status if status >= 0 else 128 - status), signal.SIGINT in received


def _output(process: subprocess.Popen[bytes]) -> Iterator[str]:
    """Yields the output of a process until it has ended, even if a child process of it keeps the output open."""
    if process.stdout is None:
        return
    unfinished, has_ended = b"", False
    while not has_ended:
        has_ended = process.poll() is not None
        while select.select((process.stdout,), (), (), 0 if has_ended else POLL_SECONDS)[0]:
            read = os.read(process.stdout.fileno(), 2**16)
            lines, newline, unfinished = (unfinished + read).rpartition(b"\n")
            yield (lines + newline).decode(errors="replace")
            if not read:  # the other end is closed
                has_ended = True
                break
    yield unfinished.decode(errors="replace")


def _search_path() -> str:
    """Returns the directories in which this process searches modules, without those of Python itself."""
    own = tuple(sysconfig.get_path(name) for name in ("stdlib", "platstdlib", "purelib", "platlib"))
    return os.pathsep.join(path for path in sys.path if path and not path.startswith(own) and Path(path).exists())


def _read(path: Path) -> str | None:
    return path.read_text(encoding="utf-8") if path.exists() else None


def _stopped(why: str, run: Run | None) -> str:
    if run is None or run.best_checkpoint is None:
        return f"{why} before the first checkpoint: there is nothing to resume."
    return f'{why}. To resume: gptlab.train(["resume={run.directory}"])'


def _reason(status: int, run: Run | None) -> str:
    """Returns why a run ended that has reported no error."""
    if status == PREEMPTED:
        return _stopped("A signal stopped the run", run)
    if status > 128:
        return f"The process of the run was killed by signal {status - 128} ({signal.strsignal(status - 128)})."
    message = run.state.message if run and run.state else None
    return f"The run failed{f': {message}' if message else ''}. Its output has the traceback."
