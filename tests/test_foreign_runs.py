"""Nothing in another user's run directory is executed, neither from config.yaml nor from a .hydra directory."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate

from canary import Canary
from gptlab.config.components import check_trusted
from gptlab.errors import UserError
from gptlab.exit_codes import CONFIG_ERROR, DONE
from gptlab.tracking.run_directory import load_config

STORED = Path(__file__).parent / "compatibility" / "single"


class Call:
    """Config node that creates a directory when it is instantiated.

    Args:
        path: Directory to create.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.node = {"_target_": "os.mkdir", "path": str(path)}
        instantiate(self.node)
        assert self.was_made(), "the payload has no effect, so the test would prove nothing"
        path.rmdir()

    def was_made(self) -> bool:
        return self.path.exists()

    def of_hydra(self) -> dict[str, Any]:
        """Returns a config with a node in every place that Hydra instantiates or passes to Python's logging."""
        handlers = {"x": {"()": "os.mkdir", "path": str(self.path)}}
        log = {"version": 1, "root": {"handlers": ["x"]}, "handlers": handlers}
        nodes = {"launcher": self.node, "sweeper": self.node, "callbacks": {"x": self.node}}
        return {"hydra": {**nodes, "job_logging": log, "hydra_logging": log, "searchpath": ["file://more"]}}


@pytest.fixture
def call(tmp_path) -> Call:
    return Call(tmp_path / "called")


def groups(values: dict[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Yields the paths of all groups in a configuration, the root first."""
    yield path
    for name, value in values.items():
        if isinstance(value, dict):
            yield from groups(value, (*path, name))


def with_node(values: dict[str, Any], path: tuple[str, ...], node: dict[str, Any]) -> dict[str, Any]:
    """Adds the keys of a node to the group at a path."""
    if not path:
        return values | node
    return values | {path[0]: with_node(values[path[0]], path[1:], node)}


CONFIG = yaml.safe_load((STORED / "config.yaml").read_text())


@pytest.mark.parametrize("path", groups(CONFIG), ids=lambda path: ".".join(path) or "root")
def test_a_target_in_any_group_is_refused_with_its_key(tmp_path, call, path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(with_node(CONFIG, path, call.node)))
    with pytest.raises(UserError) as error:  # of keys that may have components, their packages are not trusted
        check_trusted(load_config(tmp_path).model_dump(mode="json"), tmp_path)
    assert ".".join((*path, "_target_")) in str(error.value)
    assert not call.was_made()


@pytest.mark.parametrize("key", ["name", "seed", "init_from", "model", "data", "callbacks", "logger"])
def test_a_target_that_replaces_a_value_or_a_group_is_refused(tmp_path, call, key):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG | {key: call.node}))
    with pytest.raises(UserError, match=key):
        load_config(tmp_path)
    assert not call.was_made()


def test_an_interpolation_is_not_resolved(tmp_path, monkeypatch):
    monkeypatch.setenv("SECRET", "resolved")
    text = "${oc.env:SECRET}"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(CONFIG | {"data": CONFIG["data"] | {"source": text}}))
    assert load_config(tmp_path).data.source == text


def commands(run: Path) -> dict[str, list[str]]:
    """Returns the arguments of every command that reads the configuration of a run directory."""
    return {
        "gptlab.train": [f"resume={run}", "train.max_steps=41"],
        "gptlab.sample": [f"run={run}", "max_new_tokens=4"],
        "gptlab.evaluate": [f"run={run}", "windows=1"],
        "gptlab.export": [f"run={run}", "format=hf", "out=hf"],
        "gptlab.runs": [f"runs={run}"],
        "gptlab.report": [f"runs={run}", "out=report.html"],
    }


def restored(user) -> Path:
    """Copies another user's run to the directory of a user."""
    run = user.folder / "stranger"
    shutil.copytree(STORED, run)
    shutil.copy(STORED.parent / "text.txt", user.folder / "text.txt")
    for path in (*run.glob("*.yaml"), *run.glob("*.json")):
        path.write_text(path.read_text().replace("/home/someone/gptlab", str(user.folder)))
    return run


@pytest.mark.slow
def test_hydra_files_in_a_run_directory_are_ignored(user, call):
    run, canary = restored(user), Canary(user.folder / "canary")
    for folder in (run / ".hydra", run / "more"):
        folder.mkdir()
        for name in ("config", "hydra", "train"):
            (folder / f"{name}.yaml").write_text(yaml.safe_dump(call.of_hydra() | call.node))
        (folder / "overrides.yaml").write_text(
            yaml.safe_dump([f"+hydra.callbacks.x._target_=os.mkdir path={call.path}"])
        )
        canary.write(folder / "config.pickle", "bare")
    for module, arguments in commands(run).items():
        done = user.python(module, *arguments)
        assert done.returncode == DONE, done.stdout + done.stderr
        assert not call.was_made(), module
        assert not canary.was_run(), module


def test_a_hydra_node_in_the_configuration_of_a_run_is_not_executed(user, call):
    run = restored(user)
    values = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(values | call.of_hydra()))
    for module, arguments in commands(run).items():
        done = user.python(module, *arguments)
        if module in ("gptlab.runs", "gptlab.report"):  # these print it unchanged
            assert done.returncode == DONE, done.stdout + done.stderr
        else:
            assert done.returncode == CONFIG_ERROR, done.stdout + done.stderr
            assert "config.yaml is not valid: Unknown config key `hydra`" in done.stderr
            assert "Traceback" not in done.stderr
        assert not call.was_made(), module
