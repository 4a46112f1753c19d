"""Runs one command many times: its configuration is composed once, and a fork for each call does the rest.

Composing takes longer than most commands. The forks share the composed configuration and the imported modules, and
nothing else: exit code, output, working directory and files are those of the command.
"""

import atexit
import contextlib
import gc
import importlib
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

from permissions import drop_overrides

OUTPUTS = ("stdout.txt", "stderr.txt")


class Call(NamedTuple):
    """Result of a call: its exit code, its output, and the paths of the files that it opened."""

    returncode: int
    stdout: str
    stderr: str
    opened: frozenset[str]


class RepeatedCommand:
    """A command that can be called many times. File permissions apply, also for root.

    Args:
        command: Module and arguments.
        folder: Working directory. The files that the command reads while it composes its configuration are read when
            it is started, and not again.
        environment: Environment variables.
    """

    def __init__(self, command: tuple[str, ...], folder: Path, environment: Mapping[str, str]) -> None:
        self._calls = folder.parent / f"{folder.name}-calls"
        self._calls.mkdir()
        path = os.pathsep.join(filter(None, (str(Path(__file__).parent), environment.get("PYTHONPATH"))))
        self._process = subprocess.Popen(
            (sys.executable, __file__, *command),
            cwd=folder,
            env={**environment, "PYTHONPATH": path},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self._calls / "start.txt").open("w"),
            text=True,
        )

    def call(self) -> Call:
        """Runs the command and waits for it."""
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write(f"{self._calls}\n")
        self._process.stdin.flush()
        status = self._process.stdout.readline()
        assert status, (self._calls / "start.txt").read_text()
        stdout, stderr = ((self._calls / name).read_text() for name in OUTPUTS)
        return Call(int(status), stdout, stderr, frozenset(json.loads((self._calls / "opened.json").read_text())))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()


def _serve(calls: Any, results: Any) -> None:
    """Forks for every line of ``calls``, a directory for output; returns only in the forks."""
    for line in calls:
        folder = Path(line.strip())
        gc.freeze()  # forks would copy the memory of all imported objects when they collect garbage
        if (pid := os.fork()) == 0:
            _become_call(folder)
            return
        _, status = os.waitpid(pid, 0)
        print(os.waitstatus_to_exitcode(status), file=results, flush=True)
        for name in json.loads((folder / "modules.json").read_text()):
            with contextlib.suppress(Exception):  # a module that is loaded in another way
                importlib.import_module(name)
    os._exit(0)


def _become_call(folder: Path) -> None:
    """Sends the output of this fork to files, and makes it record what it opens and imports when it exits."""
    for number, name in enumerate(OUTPUTS, 1):
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    opened: set[str] = set()
    sys.addaudithook(lambda event, given: opened.add(str(given[0])) if event == "open" else None)
    known = {*sys.modules}
    drop_overrides()

    def record() -> None:
        (folder / "opened.json").write_text(json.dumps(sorted(opened)))
        (folder / "modules.json").write_text(json.dumps([name for name in sys.modules if name not in known]))

    atexit.register(record)


def main() -> None:
    """Starts the command up to its composed configuration, and continues it once per call."""
    from forkserver import WITH_TORCH, WITHOUT_TORCH, _exit, _run

    for module in WITHOUT_TORCH if sys.argv[1] in ("gptlab.report", "gptlab.runs") else WITH_TORCH:
        importlib.import_module(module)
    import gptlab.config.command as command

    calls, results = sys.stdin, os.fdopen(os.dup(1), "w")
    begin_task = command.log_to_console

    def begin() -> None:  # called at the beginning of a command and, after its configuration is composed, of its task
        command.log_to_console = begin_here

    def begin_here() -> None:
        command.log_to_console = begin_task
        _serve(calls, results)
        begin_task()

    command.log_to_console = begin
    module = sys.argv[1]
    sys.argv[:2] = [module]
    _exit(_run(module))


if __name__ == "__main__":
    main()
