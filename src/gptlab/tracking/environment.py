"""Records the environment of a run: code version, packages, machine and command line."""

import json
import os
import platform
import shlex
import subprocess
import sys
import time
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from gptlab.errors import hide_passwords
from gptlab.files import read_regular, write_file
from gptlab.parsing import parse_json
from gptlab.training.distributed.processes import torchrun_job

ENVIRONMENT, DIFF = "environment.json", "uncommitted.diff"
COMMAND = "GPTLAB_COMMAND"  # environment variable with the user's command line, for workers
# The config of a repository can name programs: the working directory may be somebody else's repository.
GIT_CONFIG = {
    "core.fsmonitor": "false",
    "core.hooksPath": os.devnull,
    "core.sshCommand": "false",
    "credential.helper": "",  # an empty value removes the helpers
    "fetch.bundleURI": "",  # a partial clone would fetch it
}
NAMES_PROGRAMS = (b"filter.", b"hook.")  # sections of which every key is cleared
# Git runs commands in a submodule if it shows its diff or looks for its uncommitted changes.
GIT_DIFF = ("diff", "--no-color", "--no-ext-diff", "--no-textconv", "--submodule=short", "--ignore-submodules=dirty")
GIT_STATUS = ("status", "--porcelain", "--ignore-submodules=dirty")


def record_environment(directory: Path, components: Mapping[str, Any] | None = None) -> None:
    """Writes environment.json and, if the checkout has uncommitted changes, uncommitted.diff.

    Environment variables are not recorded, since they may contain secrets. Passwords in URLs are hidden.

    Args:
        directory: Run directory.
        components: Code version of each component, by config key; see ``gptlab.config.components.component_record``.
    """
    commit, diff, status = _git(("rev-parse", "HEAD"), (*GIT_DIFF, "HEAD"), GIT_STATUS)
    record: dict[str, Any] = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "command": hide_passwords(os.environ.get(COMMAND) or shlex.join(sys.orig_argv)),
        "folder": str(Path.cwd()),
        "git": {"commit": (commit or b"").decode().strip() or None, "uncommitted": _lines_of(status or b"")},
        "machine": {
            "host": platform.node(),
            "system": platform.platform(),
            "processor": _processor(),
            "cores": os.cpu_count(),
            "threads": _threads(),
            "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
            "gpus": _lines("nvidia-smi", "--query-gpu=name,driver_version", "--format=csv,noheader"),
        },
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
        "torchrun_job": torchrun_job(),
        "python": sys.version,
        "components": dict(components or {}),
        # each access of metadata parses the file
        "packages": dict(sorted((m["Name"], m["Version"]) for m in (d.metadata for d in metadata.distributions()))),
    }
    write_file(directory / ENVIRONMENT, json.dumps(record, indent=2) + "\n")
    if diff:
        write_file(directory / DIFF, diff)


def read_threads(directory: Path) -> int | None:
    """Returns the number of threads with which a run computes on the CPU; None if it is not recorded."""
    values = _read(directory).get("machine")
    threads = values.get("threads") if isinstance(values, dict) else None
    return threads if isinstance(threads, int) else None


def read_components(directory: Path) -> dict[str, Any]:
    """Returns the code versions of the components of a run; empty if none are recorded."""
    found = _read(directory).get("components")
    return found if isinstance(found, dict) else {}


def _read(directory: Path) -> dict[str, Any]:
    """Returns the record of a run; empty if there is none that can be read."""
    try:
        values = parse_json(read_regular(directory / ENVIRONMENT))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def _threads() -> int | None:
    """Returns the number of threads of an operation on the CPU; None in a process that does not use torch."""
    torch = sys.modules.get("torch")
    return torch.get_num_threads() if torch else None


def _lines_of(output: bytes) -> list[str]:
    return output.decode(errors="replace").splitlines()


def _git(*commands: tuple[str, ...]) -> list[bytes | None]:
    """Runs git commands in the working directory, without programs that the repository's config names.

    Returns the output of each; None if the directory is not a checkout, or if git is not installed or older than 2.31.
    """
    listed = _run_git(GIT_CONFIG, "config", "--includes", "--name-only", "-z", "--list")
    if listed is None:
        return [None] * len(commands)
    named = (os.fsdecode(key) for key in listed.split(b"\0") if key.startswith(NAMES_PROGRAMS))
    config = {**GIT_CONFIG, **dict.fromkeys(named, "")}
    return [_run_git(config, *command) for command in commands]


def _run_git(config: Mapping[str, str], *arguments: str) -> bytes | None:
    # not -c <key>=<value>, which git splits at the first "=", also if that is part of the key
    values = {value: f"GPTLAB_GIT_{number}" for number, value in enumerate(dict.fromkeys(config.values()))}
    options = (f"--config-env={key}={values[value]}" for key, value in config.items())
    environment = {
        "GIT_WORK_TREE": str(_checkout()),  # core.worktree could be any directory
        **os.environ,
        **{name: value for value, name in values.items()},
        "GIT_OPTIONAL_LOCKS": "0",
        "GIT_ALLOW_PROTOCOL": "none",
        "GIT_NO_LAZY_FETCH": "1",
    }
    try:
        return subprocess.run(
            ("git", *options, *arguments),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            check=True,
            timeout=30,
            env=environment,
        ).stdout
    except (OSError, subprocess.SubprocessError):
        return None


def _checkout() -> Path:
    """Returns the nearest directory with a .git, or the working directory if there is none."""
    directory = Path.cwd()
    return next((path for path in (directory, *directory.parents) if (path / ".git").exists()), directory)


def _lines(*command: str) -> list[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.splitlines()
    except (OSError, subprocess.SubprocessError):
        return []


def _processor() -> str:
    """Returns the model name of the processor."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())
