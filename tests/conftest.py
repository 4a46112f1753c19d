"""Shared by all tests: the configuration of a tiny model, and a user who runs commands."""

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
from gptlab.config.trust import TRUST
from gptlab.exit_codes import DONE
from gptlab.model.config import OPTIONS, GPTConfig
from own_package import add_to_path, write_groups, write_package

TINY: dict[str, Any] = {  # GPT-2's options
    **{name: option.gpt2 for name, option in OPTIONS.items()},
    **{"block_size": 16, "vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 32, "global_every": 4},
}


# Slow tests with time limits of a few seconds, or that must outrun a process: no other test runs at the same time.
ALONE = {"test_supervisor", "test_tasks", "test_watchdog"}
# Test modules that mostly wait, or that share a slow fixture: one worker runs each group, one test after the other.
GROUPS = {"test_harness": "harness", "test_slurm": "slurm", "test_wandb": "wandb", "test_wandb_record": "wandb"}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.stem in ALONE:
            item.add_marker(pytest.mark.alone)


class Scheduling(LoadScopeScheduling):
    """Sends tests to workers one by one; sends each group of ``GROUPS`` as a whole, before the other tests."""

    def _split_scope(self, nodeid: str) -> str:
        return GROUPS.get(Path(nodeid.partition("::")[0]).stem, nodeid)


def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Scheduling:
    return Scheduling(config, log)


FORKS = ForkServer(WITH_TORCH)
LIGHT_FORKS = ForkServer(WITHOUT_TORCH)  # for users whose torch cannot be imported


def pytest_collection_finish(session: pytest.Session) -> None:
    """Starts the fork server, if collected tests run commands and this is the process that runs the tests."""
    options = session.config.option
    controls_workers = options.numprocesses and not hasattr(session.config, "workerinput")
    if controls_workers or options.collectonly:
        return
    if any({"user", "runs"} & {*item.fixturenames} for item in session.items):
        FORKS.start()


def tiny_config(**changes: Any) -> GPTConfig:
    return GPTConfig(**TINY | changes)


def defaults(file: str) -> dict[str, Any]:
    """Returns the contents of a file in conf/."""
    return yaml.safe_load((configuration_folder() / file).read_text())


# A short run of a tiny model on the text of a ``User``.
SMALL = (
    *("data=text", "data.source=text.txt", "model=tiny", "model.block_size=32", "train.max_steps=6"),
    *("train.eval_every=3", "train.eval_windows=10", "train.log_every=1"),
)


class RunningCommand(subprocess.Popen[str]):
    """Running command that leads a process group."""

    def until(self, condition: Callable[[], object]) -> None:
        """Waits until a condition holds; fails if the command ends first."""
        limit = time.monotonic() + 300  # far more than it takes, since other processes may use all cores
        while not condition():
            assert self.poll() is None, "".join(self.communicate())
            assert time.monotonic() < limit
            time.sleep(0.01)

    def children(self) -> list[int]:
        """Returns the IDs of its child processes."""
        return [int(pid) for pid in subprocess.check_output(("pgrep", "-P", str(self.pid))).split()]

    def workers(self) -> dict[int, int]:
        """Returns the IDs of the training processes by rank."""
        variables = {pid: Path(f"/proc/{pid}/environ").read_bytes().split(b"\0") for pid in self.children()}
        return {int(value[5:]): pid for pid in variables for value in variables[pid] if value.startswith(b"RANK=")}

    def ended(self, status: int = DONE, seconds: float = 60) -> subprocess.CompletedProcess[str]:
        """Waits for the command and its child processes, checks its exit code, and returns it with its output."""
        output, errors = self.communicate(timeout=seconds)
        assert self.returncode == status, output + errors
        return subprocess.CompletedProcess(self.args, self.returncode, output, errors)


@pytest.fixture(autouse=True)
def restored_environment() -> Iterator[None]:
    """Undoes changes of environment variables: the trust in components, and what libraries set when they are imported.

    A command with a variable that such a library has set would not be run by a fork. Tests begin without trust.
    """
    before = dict(os.environ)
    os.environ[TRUST] = ""
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]
    os.environ.update(before)


class User:
    """Runs commands in a directory that contains only a small text."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.started: list[RunningCommand] = []
        self.environment = os.environ | {"GPTLAB_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        for name in ("WANDB_MODE", "WANDB_DISABLED"):  # they would turn W&B off
            self.environment.pop(name, None)
        # varied enough for a model to learn something, and no longer than the tests need
        lines = (f"line {i}: the {['cat', 'dog', 'cow'][i % 3]} has {i * i % 97} of {i % 7}\n" for i in range(2000))
        (folder / "text.txt").write_text("".join(lines))

    def run(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs a command in a new process and waits for it."""
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def python(self, module: str, *arguments: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        """Runs ``python -m module`` and waits for it; uses a fork of a process that has imported torch, if possible."""
        command = (sys.executable, "-m", module, *arguments)
        for server in (FORKS, LIGHT_FORKS):
            if done := server.run(command, self.folder, self.environment, timeout):
                return done
        return self.run(*command, timeout=timeout)

    def begin(self, module: str, *arguments: str) -> RunningCommand:
        """Starts a command, which is killed at the end of the test if it still runs."""
        run = RunningCommand(
            (sys.executable, "-m", module, *arguments),
            cwd=self.folder,
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            start_new_session=True,
            # tests that run in the background inherit an ignored SIGINT, unlike commands in a terminal
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
        self.started.append(run)
        return run

    def train(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Trains with the overrides ``SMALL``, followed by ``arguments``."""
        return self.python("gptlab.train", *SMALL, *arguments, **options)

    def only_run(self, name: str = "quickstart") -> Path:
        """Returns the only run directory of this name."""
        (directory,) = (self.folder / "outputs" / name).iterdir()
        return directory


@pytest.fixture
def user(tmp_path: Path) -> Iterator[User]:
    user = User(tmp_path)
    yield user
    for run in user.started:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(run.pid, signal.SIGKILL)
        run.wait()


class Runs:
    """Runs that several tests start from. Each is trained once and copied to a user's directory.

    Args:
        folder: Directory of the runs, shared by the processes that run tests.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def give(self, user: User, name: str, *arguments: str) -> Path:
        """Copies the run with this name and these overrides to the user's directory, and returns its run directory."""
        folder = self.folder / hashlib.sha256(json.dumps((name, *arguments)).encode()).hexdigest()[:16]
        with FileLock(f"{folder}.lock"):
            if not folder.exists():
                folder.mkdir()
                done = User(folder).train(f"name={name}", *arguments, timeout=600)
                assert done.returncode == 0, done.stdout + done.stderr
        shutil.copytree(folder / "outputs" / name, user.folder / "outputs" / name)
        return user.only_run(name)


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "runs"
    folder.mkdir(exist_ok=True)
    return Runs(folder)


@pytest.fixture
def halted(user: User, runs: Runs) -> Path:
    """Run of six steps. The run "whole" is the same run with nine steps, without an interruption."""
    for name, steps in (("whole", 9), ("halted", 6)):
        directory = runs.give(user, name, f"train.max_steps={steps}", "schedule.decay_steps=9", "callbacks=checkpoint")
    return directory


@pytest.fixture
def without_torch(user):
    """User whose torch cannot be imported, since invalid input must be found before torch is needed."""
    package = user.folder / "elsewhere" / "torch"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('torch was imported')")
    inherited = os.environ.get("PYTHONPATH")  # set if another checkout than the installed one is tested
    user.environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(package.parent), inherited)))
    return user


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory with the files of the wheel that is built from the checkout, for PYTHONPATH."""
    folder = tmp_path_factory.mktemp("wheel")
    root = str(Path(__file__).parents[1])
    build = (sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder), root)
    subprocess.run(build, check=True, capture_output=True)
    (file,) = folder.glob("*.whl")
    site = folder / "site"
    install = (sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(file))
    subprocess.run(install, check=True, capture_output=True)
    return site


@pytest.fixture
def installed_lab(lab: User, wheel: Path) -> User:
    """User as in ``lab``, with gptlab from the wheel."""
    lab.environment["PYTHONPATH"] = os.pathsep.join((str(lab.folder / "lab"), str(wheel)))
    return lab


@pytest.fixture
def lab(user: User) -> User:
    """User with the package ``mylab`` outside of the working directory, and its group files in the directory mine."""
    write_package(user.folder / "lab")
    write_groups(user.folder / "mine")
    add_to_path(user.environment, user.folder / "lab")
    return user
