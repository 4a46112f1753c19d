"""Runs the tests' commands in forks of one process that has imported torch, Lightning and gptlab already.

Importing takes most of the time of a tiny training run. A fork is still a separate process: its environment, working
directory, arguments, signals, exit code and interpreter shutdown are those of ``python -m``. The processes that it
starts in the same way (the workers of a run, the trials of a sweep) are its children, and forks as well.

A command that needs a new interpreter is refused, and the caller starts one: see ``_needs_interpreter``.
"""

import atexit
import ctypes
import functools
import gc
import importlib.util
import inspect
import json
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

WITHOUT_TORCH = ("hydra", "gptlab.config.command", "gptlab.launch.launcher")
WITH_TORCH = ("numpy", "torch", "lightning.pytorch", *WITHOUT_TORCH, "gptlab.launch.train_run")
# prefixes of the variables that the interpreter and the preloaded modules read at startup
READ_AT_START = (
    *("PYTHON", "OMP_", "MKL_", "KMP_", "OPENBLAS_", "TORCH", "PYTORCH", "HF_", "HUGGINGFACE_", "TRANSFORMERS_"),
    *("LC_", "LANG", "LD_"),
)
PATH = "PYTHONPATH"
SET_CHILD_SUBREAPER = 36  # option of prctl, from linux/prctl.h
AT_START = {**os.environ}  # environment of the server
MAX_BYTES = 2**20  # size of a request
IGNORED_BY_PYTHON = {signal.SIGPIPE, signal.SIGXFSZ}


class Request(NamedTuple):
    """A command to fork."""

    command: list[str]
    folder: str
    environment: dict[str, str]
    blocked: list[int]  # signals
    ignored: list[int]
    new_session: bool
    parent: int | None  # the requesting process, if the new one must be its child
    stdio: list[int]  # descriptors 0 to 2


class ForkServer:
    """Runs commands in forks of a server process, one at a time.

    The server starts at the first call of ``start`` or ``run``, and ends with this process.

    Args:
        modules: What the server imports.
    """

    def __init__(self, modules: tuple[str, ...]) -> None:
        self._modules = modules
        self._connection: socket.socket | None = None
        self._server: subprocess.Popen[bytes] | None = None

    def start(self) -> socket.socket:
        """Starts the server, without waiting for its imports."""
        if self._connection is None:
            self._connection, other = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
            with other:
                self._server = subprocess.Popen(
                    (sys.executable, __file__, str(other.fileno()), *self._modules),
                    env=os.environ | {"OMP_NUM_THREADS": "1"},
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    pass_fds=(other.fileno(),),
                    start_new_session=True,
                )
        return self._connection

    def run(
        self, command: Sequence[str], folder: Path, environment: Mapping[str, str], timeout: float
    ) -> subprocess.CompletedProcess[str] | None:
        """Runs a command to its end as ``subprocess.run`` does; returns None if it needs a new interpreter."""
        if not _is_gptlab_command(command):
            return None
        connection = self.start()
        with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors, Path(os.devnull).open() as nothing:
            stdio = [file.fileno() for file in (nothing, output, errors)]
            connection.settimeout(300)  # for the imports
            pid = _ask(connection, Request([*command], str(folder), {**environment}, [], [], True, None, stdio))
            if pid is None:
                return None
            connection.settimeout(timeout)
            try:
                status = int(connection.recv(MAX_BYTES))
            except TimeoutError:
                os.killpg(pid, signal.SIGKILL)
                connection.settimeout(120)
                connection.recv(MAX_BYTES)
                raise subprocess.TimeoutExpired([*command], timeout, _text(output), _text(errors)) from None
            return subprocess.CompletedProcess([*command], status, _text(output), _text(errors))


def _text(file: Any) -> str:
    file.seek(0)
    return file.read().decode().replace("\r\n", "\n")


def _is_gptlab_command(command: Any) -> bool:
    return (
        isinstance(command, tuple | list)
        and [*command[:2]] == [sys.executable, "-m"]
        and str(command[2]).startswith("gptlab.")
        and sys.platform == "linux"
        and not Path("/dev/nvidiactl").exists()  # CUDA cannot be used in forks
    )


def _ask(connection: socket.socket, request: Request) -> int | None:
    """Sends a request; returns the ID of the process, or None if the server refuses."""
    asked = json.dumps(request._replace(stdio=[])._asdict()).encode()
    socket.send_fds(connection, [asked], request.stdio)
    return json.loads(connection.recv(MAX_BYTES))


def _reply(connection: socket.socket, answer: int | None) -> None:
    try:
        connection.send(json.dumps(answer).encode())
    except BrokenPipeError:  # the requesting process is gone
        os._exit(0)


def _serve(connection: socket.socket) -> Request:
    """Forks for every request; returns only in the forks, the request to run."""
    while True:
        asked, stdio, _, _ = socket.recv_fds(connection, MAX_BYTES, 3)
        if not asked:  # the other end is closed
            os._exit(0)
        request = Request(**json.loads(asked))._replace(stdio=list(stdio))
        if _needs_interpreter(request):
            _reply(connection, None)
        elif request.parent is None:
            if (pid := os.fork()) == 0:
                connection.close()
                _become(request)
                return request
            _reply(connection, pid)
            _, status = os.waitpid(pid, 0)
            _reply(connection, os.waitstatus_to_exitcode(status))
        else:
            if (between := os.fork()) == 0:
                between = os.getpid()
                if os.fork():
                    os._exit(0)  # so that the requesting process, a subreaper, becomes the parent
                _become(request)
                while (parent := os.getppid()) != request.parent:
                    if parent != between:  # the requesting process is gone
                        os._exit(1)
                    time.sleep(0.001)
                _reply(connection, os.getpid())
                connection.close()
                return request
            os.waitpid(between, 0)
        for descriptor in stdio:
            os.close(descriptor)


def _needs_interpreter(request: Request) -> bool:
    """Whether a fork would differ from a new process, in variables read at startup or in modules to import."""
    asked, changes = request.environment, _set_by_imports()
    names = {name for name in asked.keys() | AT_START.keys() if name.startswith(READ_AT_START)} - {PATH}
    if any(asked.get(name) not in (AT_START.get(name), changes.get(name)) for name in names):
        return True
    added = _added_folders(asked)
    if added is None:
        return True
    found = {file.stem for folder in added for file in Path(request.folder, folder).glob("*")}
    return not found.isdisjoint(name.partition(".")[0] for name in sys.modules)


@functools.cache
def _set_by_imports() -> dict[str, str]:
    """Environment variables set by the preloaded modules; cached by the first call, which is the server's."""
    return {name: value for name, value in os.environ.items() if AT_START.get(name) != value}


def _added_folders(environment: Mapping[str, str]) -> list[str] | None:
    """Returns directories that PYTHONPATH has before those of the server, or None if it differs in another way."""
    asked, here = ([*filter(None, where.get(PATH, "").split(os.pathsep))] for where in (environment, AT_START))
    added = len(asked) - len(here)
    return asked[:added] if added >= 0 and asked[added:] == here else None


def _become(request: Request) -> None:
    """Gives this fork the state that a new process with this command would have."""
    if request.new_session:
        os.setsid()
    os.chdir(request.folder)
    for number, descriptor in enumerate(request.stdio):
        os.dup2(descriptor, number)
        os.close(descriptor)
    added = _added_folders(request.environment)
    environment = _set_by_imports() | request.environment
    os.environ.clear()
    os.environ.update(environment)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        ignored = number in request.ignored or number in IGNORED_BY_PYTHON
        signal.signal(number, signal.SIG_IGN if ignored else signal.SIG_DFL)
    if signal.SIGINT not in request.ignored:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, request.blocked)
    sys.path[:1] = [request.folder, *added]
    sys.argv, sys.orig_argv = ["-m", *request.command[3:]], request.command
    _reset_preloaded_modules()


def _reset_preloaded_modules() -> None:
    """Resets state that the preloaded modules took from the process that imported them."""
    import multiprocessing.process

    import numpy as np

    multiprocessing.process.ORIGINAL_DIR = str(Path.cwd())
    np.random.seed()  # Python's generator reseeds itself after a fork, and torch starts with a constant seed
    if rank_zero := sys.modules.get("lightning.fabric.utilities.rank_zero"):
        rank_zero.rank_zero_only.rank = rank_zero._get_rank() or 0


def _fork_children() -> Request | None:
    """Patches ``subprocess`` so that it forks gptlab's commands unless they need a new interpreter.

    They are forked from a server that is itself forked before this command runs, so they inherit none of its state.

    Returns:
        The request to run in such a fork; None in this process.
    """
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    if os.fork() == 0:
        ours.close()
        return _serve(theirs)
    theirs.close()
    ctypes.CDLL(None).prctl(SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    start_interpreter, lock = subprocess.Popen._execute_child, threading.Lock()
    parameters, us = inspect.signature(start_interpreter), os.getpid()

    def start(self: subprocess.Popen[Any], *arguments: Any, **named: Any) -> None:
        given = parameters.bind(self, *arguments, **named).arguments
        command, stdio = given["args"], [given["p2cread"], given["c2pwrite"], given["errwrite"]]
        pid = None
        if _is_gptlab_command(command) and os.getpid() == us:
            request = Request(
                command=[*map(str, command)],
                folder=os.path.abspath(given["cwd"] or "."),  # noqa: PTH100
                environment={**(os.environ if given["env"] is None else given["env"])},
                blocked=[*signal.pthread_sigmask(signal.SIG_BLOCK, ())],
                ignored=[number for number in signal.valid_signals() if signal.getsignal(number) is signal.SIG_IGN],
                new_session=bool(given["start_new_session"]),
                parent=us,
                stdio=[number if given == -1 else given for number, given in enumerate(stdio)],
            )
            with lock:
                pid = _ask(ours, request)
        if pid is None:
            start_interpreter(self, *arguments, **named)
            return
        self.pid, self._child_created = pid, True
        pipes = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        self._close_pipe_fds(*(given[name] for name in pipes))

    subprocess.Popen._execute_child = start
    return None


def main() -> None:
    """Serves requests; in a fork, runs the command and exits like an interpreter."""
    for module in sys.argv[2:]:
        importlib.import_module(module)
    gc.freeze()  # forks would copy the memory of all imported objects when they collect garbage
    with socket.socket(fileno=int(sys.argv[1])) as connection:
        request: Request | None = _serve(connection)
    while request is not None:
        command = request.command
        request = _fork_children()
    _exit(_run(command[2]))


def _run(module: str) -> int:
    """Runs a module as ``python -m`` does; returns the exit code, or -SIGINT after an unhandled Ctrl-C."""
    try:
        if importlib.util.find_spec("sitecustomize"):
            importlib.import_module("sitecustomize")
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as error:
        if error.code is None or isinstance(error.code, int):
            return (error.code or 0) & 0xFF
        print(error.code, file=sys.stderr)
        return 1
    except BaseException as error:
        sys.excepthook(type(error), error, error.__traceback__)
        return -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    return 0


def _exit(status: int) -> NoReturn:
    """Exits like an interpreter, except for the module teardown, which takes a second in a fork."""
    threading._shutdown()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    if status < 0:
        signal.signal(-status, signal.SIG_DFL)
        os.kill(os.getpid(), -status)
    os._exit(status)


if __name__ == "__main__":
    main()
