"""What tests share: a small model's configuration, and commands run as a user runs them."""

import contextlib
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from filelock import FileLock
from xdist.scheduler import LoadScopeScheduling

from forkserver import WITH_TORCH, WITHOUT_TORCH, ForkServer
from gptlab.config.command import configuration_folder
from gptlab.exit_codes import DONE
from gptlab.model.config import OPTIONS, GPTConfig

TINY: dict[str, Any] = {  # GPT-2's options
    **{name: option.gpt2 for name, option in OPTIONS.items()},
    **{"block_size": 16, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 32, "global_every": 4},
}


# Slow tests with limits of a few seconds, or that have to be faster than what they stop: no other runs beside them.
ALONE = {"test_supervisor", "test_tasks", "test_watchdog"}
# Modules of tests that wait more than they compute, or share a fixture that takes long: one worker runs them in turn.
GROUPS = {"test_slurm": "slurm", "test_wandb": "wandb", "test_wandb_record": "wandb"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in ALONE:
            item.add_marker(pytest.mark.alone)


class Scheduling(LoadScopeScheduling):
    """Gives tests to workers one by one, and ``GROUPS`` as a whole and first."""

    def _split_scope(self, nodeid: str) -> str:
        return GROUPS.get(Path(nodeid.partition("::")[0]).stem, nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


FORKS = ForkServer(WITH_TORCH)
LIGHT_FORKS = ForkServer(WITHOUT_TORCH)  # for users whose torch cannot be imported


def pytest_collection_finish(session: pytest.Session) -> None:
    """Begin to import what commands need, if there will be commands and this is the process that runs them."""
    options = session.config.option
    controls_workers = options.numprocesses and not hasattr(session.config, "workerinput")
    if controls_workers or options.collectonly:
        return
    if any({"user", "runs"} & {*item.fixturenames} for item in session.items):
        FORKS.start()


def tiny_config(**changes: Any) -> GPTConfig:
    return GPTConfig(**TINY | changes)


def defaults(file: str) -> dict[str, Any]:
    """What a file of conf/ says."""
    return yaml.safe_load((configuration_folder() / file).read_text())


# A tiny model on the text of a ``User``, quickly.
SMALL = (
    *("data=text", "data.source=text.txt", "model=tiny", "model.block_size=32", "train.max_steps=6"),
    *("train.eval_every=3", "train.eval_windows=10", "train.log_every=1"),
)


class Begun(subprocess.Popen[str]):
    """A command under way, which leads a group of processes."""

    def until(self, happened: Callable[[], object]) -> None:
        """Wait for what has to happen while the command runs."""
        limit = time.monotonic() + 300  # far more than it takes: other processes may fill the machine
        while not happened():
            assert self.poll() is None, "".join(self.communicate())
            assert time.monotonic() < limit
            time.sleep(0.01)

    def children(self) -> list[int]:
        """The processes that it has started."""
        return [int(pid) for pid in subprocess.check_output(("pgrep", "-P", str(self.pid))).split()]

    def workers(self) -> dict[int, int]:
        """The processes that train, by their ranks."""
        variables = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in self.children()}
        return {int(value[5:]): pid for pid in variables for value in variables[pid] if value.startswith(b"RANK=")}

    def ended(self, status: int = DONE, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """What it has said, once it and all that it has started are at their end, with this status."""
        output, errors = self.communicate(timeout=seconds)
        assert self.returncode == status, output + errors
        return subprocess.CompletedProcess(self.args, self.returncode, output, errors)


class User:
    """Types commands in an empty folder, with a small text at hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.begun: list[Begun] = []
        self.environment = os.environ | {"GPTLAB_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        for name in ("WANDB_MODE", "WANDB_DISABLED"):  # which would turn off what is tested
            self.environment.pop(name, None)
        # varied enough that a model learns something, and as much of it as the tests need
        lines = (f"line {i}: the {['cat', 'dog', 'cow'][i % 3]} has {i * i % 97} of {i % 7}\n" for i in range(2000))
        (folder / "text.txt").write_text("".join(lines))

    def run(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run a command to its end, in a new process."""
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def python(self, module: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Run ``python -m module`` to its end: in a fork of a process that has imported torch if that can be."""
        command = (sys.executable, "-m", module, *arguments)
        for server in (FORKS, LIGHT_FORKS):
            if done := server.run(command, self.folder, self.environment, timeout):
                return done
        return self.run(*command, timeout=timeout)

    def begin(self, module: str, *arguments: str) -> Begun:
        """Start a command that ends with the test, if not before."""
        run = Begun(
            (sys.executable, "-m", module, *arguments),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # tests that run in the background inherit an ignored SIGINT, which no terminal would hand on
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.begun.append(run)
        return run

    def train(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Train with ``SMALL``; ``arguments`` come after it."""
        return self.python("gptlab.train", *SMALL, *arguments, **options)

    def only_run(self, name: str = "quickstart") -> Path:
        """The one run directory there is under a name."""
        (directory,) = (self.folder / "outputs" / name).iterdir()
        return directory


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    user = User(tmp_path)
    yield user
    for run in user.begun:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


class Runs:
    """Runs that several tests begin with: each is made once, and copied into a user's folder.

    Args:
        folder: Where they are made; shared by the processes that run tests.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def give(self, user: User, name: str, *arguments: str) -> Path:
        """The run of the tiny model with this name and these arguments."""
        place = self.folder / hashlib.sha256(json.dumps((name, *arguments)).encode()).hexdigest()[:16]
        made = place / "outputs" / name
        with FileLock(f"{place}.lock"):
            if not place.exists():
                place.mkdir()
                done = User(place).train(f"name={name}", *arguments, timeout=600)
                assert done.returncode == 0, done.stdout + done.stderr
        shutil.copytree(made, user.folder / "outputs" / name)
        return user.only_run(name)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"
    folder.mkdir(exist_ok=True)
    return Runs(folder)


@pytest.fixture
def halted(user: User, runs: Runs) -> Path:
    """A run of six steps, and beside it, as "whole", the same run of nine that was never interrupted."""
    for name, steps in (("whole", 9), ("halted", 6)):
        directory = runs.give(user, name, f"train.max_steps={steps}", "schedule.decay_steps=9", "callbacks=checkpoint")
    return directory


@pytest.fixture
def without_torch(user):
    """A user whose torch cannot be imported: what is wrong must be found before it is needed."""
    package = user.folder / "elsewhere" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('torch was imported')")
    beside = os.environ.get("PYTHONPATH")  # where the tests look at another checkout than is installed
    user.environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(package.parent), beside)))
    return user
