"""Opt-outs in W&B's own settings: even with an API key and a reachable server, nothing is sent."""

import functools
import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml
from click.testing import CliRunner
from wandb.cli import cli

from commands import assert_config_error, assert_success
from configs import resolved
from gptlab.config.schema import RunConfig
from gptlab.dashboards.workspace import build_workspace, save_workspace
from gptlab.errors import UserError
from gptlab.launch.launcher import preflight
from gptlab.tracking.environment import ENVIRONMENT, record_environment
from gptlab.tracking.loggers import build_loggers
from gptlab.tracking.run_directory import CONFIG, load_config
from gptlab.tracking.wandb.evaluations import send_evaluation
from gptlab.tracking.wandb.init import init_run
from gptlab.tracking.wandb.logger import RunWandbLogger
from gptlab.training.checkpoints.records import CheckpointMetadata
from wandb_records import records
from wandb_server import Server

TEXT = ("data=text", "data.source=text.txt", "model=tiny")
OF_THE_PROCESS = ("WANDB_DATA_DIR", "WANDB_ERROR_REPORTING", "WANDB_SILENT", "WANDB_SERVICE")  # set by the tested code


@pytest.fixture
def server(tmp_path, monkeypatch, caplog) -> Iterator[Server]:
    """Server that W&B's client would use, with the empty `tmp_path` as home directory."""
    server = Server()
    for name in ("WANDB_MODE", "WANDB_DISABLED", "WANDB_CONFIG_DIR", "WANDB_DIR", *OF_THE_PROCESS):
        monkeypatch.setenv(name, "")  # restored afterwards
        monkeypatch.delenv(name)
    for name, value in (server.environment | {"HOME": str(tmp_path / "home")}).items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    caplog.set_level(logging.INFO, "gptlab")
    wandb.teardown()
    yield server
    wandb.teardown()
    server.die()


def forbid(monkeypatch, how: str) -> None:
    """Sets environment variables ("A=b C=d"), runs a W&B command with them, or writes a settings file."""
    *variables, last = how.split(" ")
    if "=" in last:
        variables, last = [*variables, last], ""
    for variable in variables:
        monkeypatch.setenv(*variable.split("="))
    if last in ("offline", "disabled"):
        assert CliRunner().invoke(getattr(cli, last)).exit_code == 0
    elif last:
        Path(last).parent.mkdir(parents=True, exist_ok=True)
        Path(last).write_text("[default]\nmode = disabled\nunknown = 1\n")
    wandb.teardown()  # the process of a user's command would not have this state


def config_of(*overrides: str) -> RunConfig:
    Path("text.txt").write_text("a line\n" * 500)
    return resolved(*TEXT, "logger=wandb", *overrides)


@functools.cache
def environment() -> str:
    """Environment record, created once since it takes a while."""
    record_environment(Path.cwd())
    return Path(ENVIRONMENT).read_text()


def run_directory(config: RunConfig) -> Path:
    directory = Path("run")
    directory.mkdir()
    (directory / CONFIG).write_text(yaml.safe_dump(config.model_dump(mode="json")))
    (directory / ENVIRONMENT).write_text(environment())
    return directory


def record_of(config: RunConfig, directory: Path, keep_until: int | None = None) -> RunWandbLogger | None:
    """Returns the W&B logger of a run, if any."""
    records = [one for one in build_loggers(config, directory, keep_until) if isinstance(one, RunWandbLogger)]
    return records[0] if records else None


@pytest.mark.parametrize(
    ("how", "mode", "source"),
    [
        ("WANDB_MODE=disabled", "auto", "WANDB_MODE=disabled"),
        ("WANDB_MODE=disabled", "offline", "WANDB_MODE=disabled"),
        ("WANDB_DISABLED=true WANDB_MODE=online", "auto", "WANDB_DISABLED=true"),
        ("WANDB_DISABLED=YES", "auto", "WANDB_DISABLED=YES"),
        ("disabled", "auto", "mode=disabled in {cwd}/wandb/settings"),
        ("WANDB_DIR=elsewhere disabled", "auto", "mode=disabled in elsewhere/wandb/settings"),
        ("home/.config/wandb/settings", "auto", "mode=disabled in {cwd}/home/.config/wandb/settings"),
        ("WANDB_CONFIG_DIR=conf conf/settings", "auto", "mode=disabled in conf/settings"),
    ],
)
def test_disabled_wandb_writes_and_sends_nothing(server, monkeypatch, caplog, how, mode, source):
    forbid(monkeypatch, how)
    directory = run_directory(config := config_of(f"logger.wandb.mode={mode}"))
    assert record_of(config, directory) is None
    assert server.connections == 0
    assert list(directory.glob("wandb*")) == []
    assert [line for line in caplog.messages if "W&B" in line] == [
        f"W&B is off because of {source.format(cwd=Path.cwd())}."
    ]


@pytest.mark.parametrize(
    ("how", "source"),
    [
        ("WANDB_MODE=offline", "WANDB_MODE=offline"),
        ("offline", "mode=offline in {cwd}/wandb/settings"),
    ],
)
def test_an_offline_record_is_not_sent(server, monkeypatch, caplog, capfd, how, source):
    forbid(monkeypatch, how)
    capfd.readouterr()
    directory = run_directory(config := config_of("logger.wandb.checkpoints=all"))
    record = record_of(config, directory)
    use(record, directory, step=1)
    assert server.connections == 0
    (kept,) = directory.glob("wandb/offline-run-*")
    (line,) = (line for line in caplog.messages if line.startswith("W&B is offline"))
    assert source.format(cwd=Path.cwd()) in line
    assert line.endswith(f": wandb sync --include-online {kept}")
    assert "wandb:" not in "".join(capfd.readouterr())


def use(record: RunWandbLogger | None, directory: Path, step: int) -> None:
    """Logs everything that a run logs, and finalizes."""
    assert record is not None
    assert record.artifacts is not None
    checkpoint = directory / "checkpoints" / f"step_{step}"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.pt").write_bytes(b"weights")
    (directory / "samples").mkdir(exist_ok=True)
    (directory / "samples" / f"step_{step}.txt").write_text("--- sample 1 ---\na\n")
    record.log_metrics({"train/loss": 1.0, "tokens": step}, step)
    record.artifacts.upload(checkpoint, CheckpointMetadata(step=step, val_loss=1.0, evaluation_due=False))
    record.log_samples(step, lambda step: step)
    record.alert("No progress", "It hangs.")
    record.finalize("success")


def test_an_online_run_can_be_resumed_offline(server, monkeypatch):
    directory = run_directory(config := config_of("logger.wandb.checkpoints=all"))
    use(record_of(config, directory), directory, step=1)
    (run,) = server.runs.values()
    assert len(run.history) == 1
    heard = server.connections
    forbid(monkeypatch, "WANDB_MODE=offline")
    use(record_of(config, directory, keep_until=1), directory, step=2)
    assert server.connections == heard
    assert len(list(directory.glob("wandb/offline-run-*"))) == 1


@pytest.mark.parametrize("how", ["WANDB_MODE=offline", "WANDB_DISABLED=true", "disabled"])
def test_mode_online_with_an_opt_out_is_an_error(server, monkeypatch, how):
    forbid(monkeypatch, how)
    config = config_of("logger.wandb.mode=online")
    with pytest.raises(UserError, match=rf"logger\.wandb\.mode=online contradicts .*{how}"):
        preflight(config)


@pytest.mark.parametrize("mode", ["off", ""])
def test_an_unknown_wandb_mode_is_an_error(server, monkeypatch, mode):
    forbid(monkeypatch, f"WANDB_MODE={mode}")
    config = config_of()
    with pytest.raises(UserError, match=f"WANDB_MODE={mode} is not a valid W&B mode"):
        preflight(config)


@pytest.mark.parametrize("how", ["WANDB_DISABLED=true", "WANDB_MODE=offline"])
def test_an_evaluation_is_not_sent_with_an_opt_out(server, monkeypatch, caplog, how):
    directory = run_directory(config_of())
    (directory / "wandb_id").write_text("r1")
    (directory / "wandb" / "run-20260101_000000-r1").mkdir(parents=True)
    (directory / "wandb" / "run-20260101_000000-r1" / "run-r1.wandb").touch()
    forbid(monkeypatch, how)
    with monkeypatch.context() as context:
        context.setitem(sys.modules, "wandb", None)  # an opt-out must not import the client
        send_evaluation(directory, "loss", {"loss": 1.0})
    assert server.connections == 0
    (line,) = caplog.messages
    assert how in line


@pytest.mark.parametrize("how", ["WANDB_DISABLED=true", "WANDB_MODE=offline"])
def test_a_workspace_is_not_saved_with_an_opt_out(server, monkeypatch, how):
    forbid(monkeypatch, how)
    with pytest.raises(UserError, match=f"because of {how}.*dry_run=true"):
        save_workspace(build_workspace("me", "models", "gptlab"))
    assert server.connections == 0


CODE, MACHINE = {"git_commit", "git_uncommitted"}, {"host", "system", "processor", "cores", "gpus", "memory_gb"}


@pytest.mark.parametrize(
    ("how", "hidden"),
    [
        ("WANDB_DISABLE_GIT=true", CODE),
        ("WANDB__DISABLE_META=true", MACHINE),
        ("WANDB__DISABLE_MACHINE_INFO=true", CODE | MACHINE),
    ],
)
def test_wandb_settings_can_omit_code_and_machine(server, monkeypatch, how, hidden):
    forbid(monkeypatch, f"{how} WANDB_HOST=anonymous WANDB_MODE=offline")
    directory = run_directory(config := config_of())
    assert config.logger.wandb is not None
    run = init_run(config, config.logger.wandb, directory)
    sent = run.config["environment"]
    run.finish()
    assert sent.keys() & (CODE | MACHINE) == (CODE | MACHINE) - hidden
    assert sent.get("host", "anonymous") == "anonymous"


NAMES = {
    "project": ("WANDB_PROJECT", "mine", "mine"),
    "entity": ("WANDB_ENTITY", "team", "team"),
    "display_name": ("WANDB_NAME", "first", "first"),
    "notes": ("WANDB_NOTES", "a note", "a note"),
    "run_group": ("WANDB_RUN_GROUP", "lr", "lr"),
    "job_type": ("WANDB_JOB_TYPE", "debug", "debug"),
    "tags": ("WANDB_TAGS", "a,b c", ["a", "b c"]),
}


def offline_run(directory: Path, config: RunConfig) -> list[dict[str, Any]]:
    """Starts and ends an offline run; returns its record as W&B's reader prints it."""
    assert config.logger.wandb is not None
    init_run(config, config.logger.wandb, directory).finish()
    (record,) = records(directory, "*run-*")
    return record


def test_names_in_wandb_variables_are_used_and_recorded(server, monkeypatch):
    forbid(monkeypatch, "WANDB_MODE=offline")
    for variable, value, _ in NAMES.values():
        monkeypatch.setenv(variable, value)
    directory = run_directory(config_of())
    for variable, _, _ in NAMES.values():
        monkeypatch.delenv(variable)  # the shell of a resume does not have them
    (started,) = (line["run"] for line in offline_run(directory, load_config(directory)) if line["type"] == "run")
    assert {name: started[name] for name in NAMES} == {name: expected for name, (_, _, expected) in NAMES.items()}


def test_the_command_line_takes_precedence_over_wandb_variables(server, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    monkeypatch.setenv("WANDB_TAGS", "a,b")
    wandb_config = config_of("logger.wandb.project=other", "logger.wandb.tags=[c]").logger.wandb
    assert wandb_config is not None
    assert (wandb_config.project, wandb_config.tags) == ("other", ["c"])


def test_neither_the_command_line_nor_paths_nor_the_git_remote_are_sent(server, monkeypatch, tmp_path):
    for command in (("init", "-q"), ("remote", "add", "origin", "https://secret-token@example.com/a.git")):
        subprocess.run(("git", *command), check=True)
    subprocess.run(
        ("git", "-c", "user.name=a", "-c", "user.email=b", "commit", "-qm", "c", "--allow-empty"), check=True
    )
    monkeypatch.setattr(sys, "argv", ["train.py", "data.source=https://me:secret-word@example.com/a.txt"])
    forbid(monkeypatch, "WANDB_MODE=offline")
    directory = run_directory(config := config_of().model_copy(update={"data": resolved().data}))
    sent = json.dumps(offline_run(directory, config))
    assert "secret" not in sent
    assert str(tmp_path / "run") not in sent
    assert sys.executable not in sent
    assert '"git_commit"' in sent


@pytest.fixture
def typed(user, server, tmp_path) -> Server:
    """The server, in the environment of commands."""
    user.environment |= server.environment | {"HOME": str(tmp_path)}
    return server


@pytest.mark.slow
def test_two_processes_train_with_wandb_disabled(user, typed):
    user.environment["WANDB_MODE"] = "disabled"
    done = user.train("logger=wandb", "trainer=ddp", "trainer.devices=2")
    assert_success(done)
    assert typed.connections == 0
    assert done.stdout.count("W&B") == 1
    directory = user.only_run()
    assert list(directory.glob("wandb*")) == []
    assert json.loads((directory / "state.json").read_text())["step"] == 6


@pytest.mark.slow
def test_a_sweep_with_a_contradicting_mode_is_refused_as_a_whole(user, typed):
    user.environment["WANDB_DISABLED"] = "true"
    online = ("logger=wandb", "logger.wandb.mode=online")
    done = user.python("gptlab.train", "-m", *TEXT, "optimizer.lr=1e-3,2e-3", "train.max_steps=1", *online)
    assert_config_error(done, "logger.wandb.mode=online contradicts WANDB_DISABLED=true")
    assert typed.connections == 0
    assert not (user.folder / "outputs").exists()
