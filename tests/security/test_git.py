"""Recording the code version in somebody else's repository runs no program that its config names."""

import json
import os
import subprocess
from functools import partial
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


def set_filter(payload: Path, name: bytes) -> None:
    """Names a filter, which may have any characters but spaces."""
    Path(".git/info/attributes").write_bytes(b"*.py filter=" + name + b"\n")
    quoted = name.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
    with Path(".git/config").open("ab") as file:
        file.write(b'[FILTER "%s"]\n\tCLEAN = "%s"\n' % (quoted, os.fsencode(payload)))


def set_included(payload: Path) -> None:
    Path(".git/included").write_text(f'[filter "a=b"]\n\tclean = "{payload}"\n')
    set_attribute("filter=a=b", include__path="included")


def set_worktree_config(payload: Path) -> None:
    Path(".git/config.worktree").write_text(f'[filter "a=b"]\n\tclean = "{payload}"\n')
    set_attribute("filter=a=b", extensions__worktreeConfig="true")


def add_submodule(**config: str) -> None:
    """Adds a submodule with a new commit, an uncommitted change and a config of its own."""
    git("init", "-q", "sub")
    Path("sub/code.py").write_text("a = 1\n")
    git("-C", "sub", "add", ".")
    git("-C", "sub", "commit", "-qm", "x")
    git("add", "sub")
    git("commit", "-qm", "submodule", "sub")
    Path("sub/code.py").write_text("a = 2\n")
    git("-C", "sub", "commit", "-qam", "y")
    Path("sub/code.py").write_text("a = 34\n")
    Path("sub/.git/info/attributes").write_text("*.py filter=x\n")
    for key, text in config.items():
        git("-C", "sub", "config", key.replace("__", "."), text)
    git("config", "diff.submodule", "diff")
    git("config", "submodule.recurse", "true")
    git("config", "status.submoduleSummary", "true")


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
    "filter in an included file": set_included,
    "filter in a config of the work tree": set_worktree_config,
    "hook": set_hook,
    **{
        f"filter {name!r}": partial(set_filter, name=name)
        for name in (b"a=b", b"=", b"A.b=c.clean", b"'a\"b\\c`$(x)'", b"\xff=\xfe", "=\u00e9".encode())
    },
}
SUBMODULES = {
    "external diff": {"diff__external": "{payload}"},
    "fsmonitor": {"core__fsmonitor": "{payload}"},
    "filter": {"filter__x__clean": "{payload}"},
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


@pytest.mark.parametrize("config", SUBMODULES.values(), ids=SUBMODULES)
def test_a_config_of_a_submodule_runs_nothing_and_its_new_commit_is_recorded(tmp_path, canary, config):
    add_submodule(**{key: value.format(payload=tmp_path / "payload") for key, value in config.items()})
    for command in (("status", "--porcelain"), ("diff", "HEAD")):
        subprocess.run(("git", *command), stdin=subprocess.DEVNULL, capture_output=True, check=False, timeout=20)
    assert canary.exists(), "the payload has no effect, so the test would prove nothing"
    canary.unlink()
    Path("sub/code.py").touch()
    (tmp_path / "run").mkdir()
    record_environment(tmp_path / "run")
    assert not canary.exists()
    diff = (tmp_path / "run" / "uncommitted.diff").read_text()
    assert "-a = 1\n+a = 23\n" in diff
    new = git("-C", "sub", "rev-parse", "HEAD").decode().strip()
    assert f"+Subproject commit {new}\n" in diff
    recorded = json.loads((tmp_path / "run" / "environment.json").read_text())["git"]
    assert recorded["uncommitted"] == [" M code.py", " M sub"]


def test_a_work_tree_elsewhere_is_not_read(tmp_path, canary):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "code.py").write_text("secret\n")
    git("config", "core.worktree", str(tmp_path / "elsewhere"))
    assert b"+secret" in git("diff", "HEAD"), "the payload has no effect, so the test would prove nothing"
    (tmp_path / "run").mkdir()
    record_environment(tmp_path / "run")
    diff = (tmp_path / "run" / "uncommitted.diff").read_text()
    assert "+a = 23\n" in diff
    assert "secret" not in diff


def test_colors_are_not_recorded_and_a_user_may_set_config_variables(tmp_path, canary, monkeypatch):
    git("config", "color.ui", "always")
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "diff.noprefix")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "true")
    (tmp_path / "run").mkdir()
    record_environment(tmp_path / "run")
    assert (tmp_path / "run" / "uncommitted.diff").read_text().startswith("diff --git code.py code.py\n")


def test_a_linked_work_tree_is_recorded_from_a_directory_in_it(tmp_path, canary, monkeypatch):
    git("worktree", "add", "-q", str(tmp_path / "linked"))
    (tmp_path / "linked" / "code.py").write_text("a = 45\n")
    (tmp_path / "linked" / "below").mkdir()
    monkeypatch.chdir(tmp_path / "linked" / "below")
    (tmp_path / "run").mkdir()
    record_environment(tmp_path / "run")
    assert "-a = 1\n+a = 45\n" in (tmp_path / "run" / "uncommitted.diff").read_text()


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
