"""Recording the code version in somebody else's repository runs no program that its config names."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from gptlab.tracking.environment import record_environment


def git(*arguments: str) -> bytes:
    command = ("git", "-c", "user.name=a", "-c", "user.email=b", *arguments)
    return subprocess.run(command, check=True, capture_output=True, timeout=20).stdout


@pytest.fixture
def canary(tmp_path, monkeypatch) -> Path:
    """File that the payload creates; the working directory is a repository with an uncommitted change."""
    (tmp_path / "repository").mkdir()
    monkeypatch.chdir(tmp_path / "repository")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", "/dev/null")
    Path("code.py").write_text("a = 1\n")
    Path("other.py").write_text("a = 1\n")
    git("init", "-q")
    git("add", ".")
    git("commit", "-qm", "x")
    Path("code.py").write_text("a = 23\n")
    payload = tmp_path / "payload"
    payload.write_text(f"#!/bin/sh\ntouch {tmp_path / 'canary'}\n")
    payload.chmod(0o755)
    return tmp_path / "canary"


def set_hook(payload: Path) -> None:
    hooks = payload.parent / "hooks"
    hooks.mkdir()
    (hooks / "post-index-change").symlink_to(payload)
    git("config", "core.hooksPath", str(hooks))


def set_attribute(value: str, **config: str) -> None:
    Path(".git/info/attributes").write_text(f"*.py {value}\n")
    for key, text in config.items():
        git("config", key.replace("__", "."), text)


ATTACKS = {
    "fsmonitor": lambda payload: git("config", "core.fsmonitor", str(payload)),
    "external diff": lambda payload: git("config", "diff.external", str(payload)),
    "diff driver": lambda payload: set_attribute("diff=x", diff__x__command=str(payload)),
    "textconv": lambda payload: set_attribute("diff=x", diff__x__textconv=str(payload)),
    "filter": lambda payload: set_attribute("filter=x", filter__x__clean=str(payload)),
    "required filter": lambda payload: set_attribute(
        "filter=x", filter__x__clean=str(payload), filter__x__required="true"
    ),
    "filter process": lambda payload: set_attribute("filter=x", filter__x__process=str(payload)),
    "hook": set_hook,
}


@pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
def test_a_config_of_the_repository_runs_nothing_and_the_diff_is_recorded(tmp_path, canary, attack):
    attack(tmp_path / "payload")
    os.utime("other.py", (1, 1))  # makes git write its index
    for command in (("status", "--porcelain"), ("diff", "HEAD"), ("status", "--porcelain")):
        subprocess.run(("git", *command), stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=20)
    assert canary.exists(), "the payload has no effect, so the test would prove nothing"
    canary.unlink()
    Path("code.py").touch()
    os.utime("other.py", (2, 2))
    (tmp_path / "run").mkdir()
    record_environment(tmp_path / "run")
    assert not canary.exists()
    diff = (tmp_path / "run" / "uncommitted.diff").read_text()
    assert "-a = 1\n+a = 23\n" in diff
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())["git"]
    assert recorded["uncommitted"] == [" M code.py"]
    assert recorded["commit"] == git("rev-parse", "HEAD").decode().strip()


def test_a_partial_clone_fetches_nothing(tmp_path, canary):
    git("config", "extensions.partialClone", "origin")
    git("config", "remote.origin.promisor", "true")
    git("config", "remote.origin.url", f"ext::{tmp_path / 'payload'}")
    git("config", "protocol.ext.allow", "always")
    (blob,) = (Path(".git/objects") / name for name in [git("rev-parse", "HEAD:code.py").decode().strip()])
    (blob.parent / blob.name[:2] / blob.name[2:]).unlink()
    subprocess.run(("git", "diff", "HEAD"), stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=20)
    assert canary.exists(), "the payload has no effect, so the test would prove nothing"
    canary.unlink()
    (tmp_path / "run").mkdir()
    record_environment(tmp_path / "run")
    assert not canary.exists()
