"""Nothing in another user's run directory is executed, neither from config.yaml nor from a .hydra directory."""

import copy
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.utils import instantiate

from canary import Canary
from commands import assert_config_error
from configs import resolved
from gptlab.config.trust import TRUST, check_trusted
from gptlab.errors import UserError
from gptlab.exit_codes import CONFIG_ERROR, DONE
from gptlab.launch.components import build_callbacks
from gptlab.launch.supervisor import Job, read_job
from gptlab.model.modern import build_gpt
from gptlab.tracking.run_directory import load_config
from gptlab.worker import run_rank
from own_package import as_override, make_importable

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


COMPONENTS = [("model",), ("optimizer",), ("schedule",)]  # groups that may be components


@pytest.mark.parametrize("path", COMPONENTS, ids=lambda path: ".".join(path))
def test_a_target_in_the_group_of_a_component_remains_plain_data(tmp_path, call, path):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(with_node(CONFIG, path, call.node)))
    config = load_config(tmp_path)
    assert config.model_dump()[path[0]]["_target_"] == "os.mkdir"
    assert not call.was_made()


@pytest.mark.parametrize(
    "path", [path for path in groups(CONFIG) if path not in COMPONENTS], ids=lambda path: ".".join(path) or "root"
)
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
        "gptlab.train": [f"resume={run}", "train.max_steps=41", "trust_paths=true"],
        "gptlab.sample": [f"run={run}", "max_new_tokens=4", "trust_paths=true"],
        "gptlab.evaluate": [f"run={run}", "windows=1", "trust_paths=true"],
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
    stored = json.dumps(values | call.of_hydra())  # JSON is YAML, without the aliases of safe_dump
    (run / "config.yaml").write_text(stored)
    for module, arguments in commands(run).items():
        done = user.python(module, *arguments)
        if module in ("gptlab.runs", "gptlab.report"):  # these print it unchanged
            assert done.returncode == DONE, done.stdout + done.stderr
        else:
            assert done.returncode == CONFIG_ERROR, done.stdout + done.stderr
            assert "config.yaml is not valid: Unknown config key `hydra`" in done.stderr
            assert "Traceback" not in done.stderr
        assert not call.was_made(), module


CALLBACK = {"_target_": "mylab.tools.Touch", "path": "canary"}
ACTIVATION = {"_target_": "mylab.tools.TouchActivation", "path": "canary"}
SAME_MODEL = ("model=gpt", "model.block_size=16", "model.n_layer=2", "model.n_head=2", "model.n_embd=16")
TEXT = ("data=text", "data.source=text.txt")


def with_components(user, *, callback: bool = True, model: bool = True) -> Path:
    """Copies another user's run whose configuration has components that create the file "canary"."""
    run = restored(user)
    values = yaml.safe_load((run / "config.yaml").read_text())
    if callback:
        values["callbacks"]["evil"] = CALLBACK
    if model:
        values["model"]["activation"] = ACTIVATION
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    return run


def assert_refused(done, key: str, target: str) -> None:
    """Checks that a component was refused with its package and how to trust it."""
    message = f"{key}._target_={target} in "
    assert_config_error(done, message)
    assert "would run code of the package mylab, which is not trusted. If you trust it: trust=[mylab]" in done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("module", ["gptlab.train", "gptlab.sample", "gptlab.evaluate"])
def test_a_component_of_a_stranger_is_built_only_if_its_package_is_trusted(lab, module):
    run, canary = with_components(lab), lab.folder / "canary"
    arguments = commands(run)[module]
    trusted = lab.python(module, *arguments, "trust=[mylab]")
    assert trusted.returncode == DONE, trusted.stdout + trusted.stderr
    assert canary.exists(), "the payload has no effect, so the test would prove nothing"
    canary.unlink()
    assert_refused(lab.python(module, *arguments), "model.activation", ACTIVATION["_target_"])
    assert not canary.exists()


def test_an_export_of_a_model_with_components_is_refused(lab):
    run = with_components(lab, callback=False)
    (lab.folder / "lab" / "mylab" / "__init__.py").write_text("import os\nos.mkdir('canary')\n")
    assert_refused(
        lab.python("gptlab.export", f"run={run}", "format=hf", "out=hf"), "model.activation", ACTIVATION["_target_"]
    )
    assert not (lab.folder / "canary").exists()  # not even imported
    assert not (lab.folder / "hf").exists()


@pytest.mark.slow
def test_load_builds_a_component_of_a_stranger_only_if_its_package_is_trusted(lab):
    run, canary = with_components(lab, callback=False), lab.folder / "canary"
    code = (sys.executable, "-c", f"import gptlab; gptlab.load({str(run)!r})")
    done = lab.run(*code)
    assert "UserError: model.activation._target_=mylab.tools.TouchActivation in " in done.stderr
    assert not canary.exists()
    lab.environment |= {"GPTLAB_TRUST": "mylab", "GPTLAB_TRUST_PATHS": "1"}
    assert lab.run(*code).returncode == 0
    assert canary.exists()


def test_commands_that_display_a_run_do_not_build_its_components(lab):
    run, canary = with_components(lab), lab.folder / "canary"
    (lab.folder / "lab" / "mylab" / "__init__.py").write_text("import os\nos.mkdir('canary')\n")
    for module in ("gptlab.runs", "gptlab.report"):
        done = lab.python(module, *commands(run)[module])
        assert done.returncode == DONE, done.stdout + done.stderr
    page = (lab.folder / "report.html").read_text()
    assert "mylab.tools.TouchActivation" in page
    assert '"canary"' in page  # the argument
    assert not canary.exists()


@pytest.mark.slow
def test_weights_of_a_stranger_are_loaded_without_building_its_components(lab):
    run = with_components(lab)
    (lab.folder / "lab" / "mylab" / "__init__.py").write_text("import os\nos.mkdir('canary')\n")
    done = lab.python("gptlab.train", *TEXT, *SAME_MODEL, "optimizer.lr=1", "train.max_steps=1", f"init_from={run}")
    assert done.returncode == DONE, done.stdout + done.stderr
    assert not (lab.folder / "canary").exists()


def test_resume_auto_does_not_build_components_that_only_the_earlier_run_has(lab):
    run, canary = with_components(lab), lab.folder / "canary"
    (lab.folder / "outputs" / "single").mkdir(parents=True)
    run.rename(lab.folder / "outputs" / "single" / "2026-01-01_00-00-00")
    done = lab.python("gptlab.train", *TEXT, *SAME_MODEL, "optimizer.lr=1", "name=single", "resume=auto")
    assert done.returncode == CONFIG_ERROR
    assert not canary.exists()


@pytest.mark.parametrize("node", [CALLBACK, ACTIVATION], ids=["callback", "model"])
def test_a_job_file_with_an_untrusted_component_is_refused(tmp_path, monkeypatch, node):
    make_importable()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(TRUST, "mylab")
    plain = resolved(*TEXT, "model=tiny")
    key = "callbacks.evil" if node is CALLBACK else "model.activation"
    config = resolved(*TEXT, "model=tiny", f"{'+' if node is CALLBACK else ''}{key}={as_override(node)}")
    for name, job in (("plain", plain), ("evil", config)):
        Job(job.with_vocabulary(61), None).write(tmp_path / name)
    read = read_job(tmp_path / "evil").config
    build_callbacks(read), build_gpt(read.model)
    assert Path("canary").exists(), "the payload has no effect, so the test would prove nothing"
    Path("canary").unlink()
    monkeypatch.setenv(TRUST, "")
    with pytest.raises(UserError, match=rf"{key}\._target_={node['_target_']} in .*evil would run code of the package"):
        read_job(tmp_path / "evil")
    assert read_job(tmp_path / "plain").config == plain.with_vocabulary(61)
    assert not Path("canary").exists()


@pytest.mark.parametrize("key", ["callbacks.x", "optimizer", "schedule", "loss", "model"])
def test_a_worker_checks_the_interfaces_of_trusted_classes(tmp_path, monkeypatch, key):
    started = []
    monkeypatch.setattr("gptlab.launch.train_run.train_run", lambda *_, **__: started.append(1) or DONE)
    values = resolved(*TEXT, "model=tiny").with_vocabulary(257).model_dump(mode="json")
    job = tmp_path / "job.json"
    monkeypatch.setattr("gptlab.worker.open_data", lambda config: None)

    def write(node: dict[str, Any] | None) -> None:
        changed = copy.deepcopy(values)
        if node is not None:
            first, _, rest = key.partition(".")
            if rest:
                changed[first][rest] = node
            else:
                changed[first] = (changed[first] or {}) | node if first == "model" else node
        job.write_text(json.dumps({"config": changed, "run_dir": None, "plan": None}))

    write(None)
    assert run_rank(job) == DONE
    assert started == [1]
    # a class of gptlab that starts a process
    write({"_target_": "gptlab.verification.runs.RunProcess", "lr": 1, "config": {}, "run_dir": "a", "output": "b"})
    with pytest.raises(UserError, match=rf"{key}\._target_=gptlab\.verification\.runs\.RunProcess is not a"):
        run_rank(job)
    assert started == [1]


@pytest.mark.slow
def test_a_resumed_sweep_does_not_take_overrides_from_a_file(lab):
    sweep = ("-m", "name=sweep", "seed=1,2", *TEXT, "model=tiny", "train.max_steps=1", "train.eval_windows=4")
    assert lab.python("gptlab.train", *sweep).returncode == DONE
    (directory,) = (lab.folder / "outputs" / "sweep").iterdir()
    path = directory / "1" / "trial.json"
    canary = f"+callbacks.evil={as_override(CALLBACK)}"
    for changes in ({canary.partition("=")[0]: canary.partition("=")[2]}, {"seed": "3"}, {"name": "${oc.env:HOME}"}):
        trial = json.loads(path.read_text())
        path.write_text(json.dumps(trial | {"state": "waiting", "overrides": {"seed": "2"} | changes}))
        assert_config_error(lab.python("gptlab.train", *sweep), "is not a point of its search space")
    assert not (lab.folder / "canary").exists()
    typed = lab.python("gptlab.train", *sweep[3:], canary)
    assert typed.returncode == DONE, typed.stdout + typed.stderr
    assert (lab.folder / "canary").exists(), "the payload has no effect, so the test would prove nothing"
