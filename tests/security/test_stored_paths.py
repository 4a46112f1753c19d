"""Paths and URLs in somebody else's run directory are used only if the user agrees."""

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from commands import assert_config_error, assert_success
from configs import resolved
from gptlab.config import locations
from gptlab.config.base import known_keys
from gptlab.config.locations import TRUST_PATHS, check_locations, find_locations, trust_paths
from gptlab.config.resume import merge_resume_config, resume_as
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.tracking.run_directory import load_config
from gptlab.tracking.wandb import evaluations
from serving import served

STORED = Path(__file__).parents[1] / "compatibility" / "single"
CONFIG = yaml.safe_load((STORED / "config.yaml").read_text())
SECRET = "".join(f"secret {i}\n" for i in range(500))


def write(run: Path, **data: Any) -> Path:
    """Copies somebody else's run and changes its ``data``."""
    shutil.copytree(STORED, run)
    (run / "config.yaml").write_text(json.dumps(CONFIG | {"data": CONFIG["data"] | data}))
    return run


@pytest.fixture
def stranger(user) -> Path:
    (user.folder / "secret.txt").write_text(SECRET)
    source, cache = (str(user.folder / name) for name in ("secret.txt", "made"))
    return write(user.folder / "stranger", source=source, cache_dir=cache)


COMMANDS = {
    "evaluate": ("gptlab.evaluate", "run=stranger", "windows=1"),
    "replay": ("gptlab.prepare", "replay=stranger"),
    "resume": ("gptlab.train", "resume=stranger", "force_resume=true", "train.max_steps=41"),
    "plan": ("gptlab.plan", "resume=stranger", "train.max_steps=41"),
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_source_and_a_cache_outside_of_the_run_are_refused(user, stranger, name):
    if name != "plan":  # which tokenizes nothing
        assert_success(user.python(*COMMANDS[name], "trust_paths=true"))
        shards = b"".join(path.read_bytes() for path in (user.folder / "made").rglob("*.bin"))
        assert b"s\0e\0c\0r\0e\0t" in shards, "the payload has no effect, so the test would prove nothing"
        shutil.rmtree(user.folder / "made")
    done = user.python(*COMMANDS[name])
    assert_config_error(done, f"data.source={user.folder}/secret.txt")
    assert f"data.cache_dir={user.folder}/made" in done.stderr
    assert "If you trust them, add trust_paths=true or set GPTLAB_TRUST_PATHS=1." in done.stderr
    assert not (user.folder / "made").exists()


def test_a_server_is_contacted_only_if_the_user_agrees(user):
    with served(user.folder) as server:
        url = server.url
        write(user.folder / "stranger", corpus="shards", path=url, cache_dir=str(user.folder / "stranger" / "cache"))
        assert user.python(*COMMANDS["replay"], "trust_paths=true").returncode != 0  # there are no shards
        assert server.requests, "the payload has no effect, so the test would prove nothing"
        server.requests.clear()
        assert_config_error(user.python(*COMMANDS["replay"]), f"data.path={url}")
        assert not server.requests


def test_a_model_is_sampled_without_a_question(user, stranger):
    assert_success(user.python("gptlab.sample", "run=stranger", "max_new_tokens=2"))


def test_a_path_that_the_user_types_is_used(user, stranger):
    typed = ("data=text", "data.source=secret.txt", "data.cache_dir=made")
    assert_success(user.python(*COMMANDS["replay"], *typed))
    assert (user.folder / "made").is_dir()


@pytest.fixture
def moved(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(locations, "_accepted", set())
    return write(tmp_path / "outputs" / "x" / "run")


def listed(run: Path, config: RunConfig | None = None) -> str:
    """Returns the message that refuses the paths of a run; "" if they may be used."""
    try:
        check_locations(config or load_config(run), run)
    except UserError as error:
        return str(error)
    return ""


def test_paths_of_a_run_in_outputs_are_used_only_if_the_user_wrote_it(moved, monkeypatch):
    assert listed(moved) == ""
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    assert "data.source=/home/someone/gptlab/text.txt, data.cache_dir=/home/someone/gptlab/cache" in listed(moved)


def test_paths_of_a_run_outside_of_outputs_are_refused(moved, tmp_path):
    run = moved.rename(tmp_path / "run")
    assert "data.source" in listed(run)
    trust_paths(True)
    assert os.environ[TRUST_PATHS] == "1"
    assert listed(run) == ""


@pytest.mark.parametrize("setting", [None, "cache", "~/cache"])
def test_the_default_cache_is_used_without_a_question(tmp_path, monkeypatch, setting):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv("GPTLAB_CACHE", raising=False)
    if setting:
        monkeypatch.setenv("GPTLAB_CACHE", setting)
    default = str(tmp_path / ("cache" if setting else ".cache/gptlab"))
    run = write(tmp_path / "run", cache_dir=default)
    assert "data.cache_dir" not in listed(run)
    assert "data.source=/home/someone/gptlab/text.txt" in listed(run)
    shutil.rmtree(run)
    assert f"data.source={default}" in listed(write(run, source=default, cache_dir=f"{default}/data"))
    assert f"data.cache_dir={default}/data" in listed(run)


def test_a_path_inside_of_the_run_is_used_unless_it_is_a_link_out_of_it(tmp_path):
    inside = {"source": str(tmp_path / "run" / "text.txt"), "cache_dir": str(tmp_path / "run" / "cache")}
    run = write(tmp_path / "run", **inside)
    assert listed(run) == ""
    (run / "cache").symlink_to(tmp_path)
    assert "data.cache_dir=" in listed(run)
    assert "data.source=" not in listed(run)


@pytest.mark.parametrize("path", ["{run}/../secret", "~/.ssh/id", "secret", "{run}\0", "file://{run}/x"])
def test_other_paths_are_outside_of_the_run(tmp_path, path):
    run = write(tmp_path / "run", source=path.format(run=tmp_path / "run"))
    assert "data.source=" in listed(run)


@pytest.mark.parametrize(("answer", "is_used"), [("y\n", True), ("n\n", False), ("\n", False), ("", False)])
def test_a_terminal_is_asked_and_control_characters_are_escaped(tmp_path, monkeypatch, answer, is_used):
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    output = Terminal()
    monkeypatch.setattr(locations, "_accepted", set())
    monkeypatch.setattr("sys.stdin", Terminal(answer * 2))
    monkeypatch.setattr("sys.stderr", output)
    run = write(tmp_path / "run", source="/etc/passwd\x1b[2K\u202e")
    assert (listed(run) == "") == is_used
    assert r"data.source=/etc/passwd\x1b[2K\u202e" in output.getvalue()
    assert "data.cache_dir=/home/someone/gptlab/cache" in output.getvalue()
    if is_used:
        assert listed(run) == ""
        assert output.getvalue().count("[y/N]") == 1


@pytest.mark.parametrize(
    ("key", "arguments", "found"),
    [
        ("logger.mlflow", {"tracking_uri": "http://server"}, ["tracking_uri"]),
        ("logger.mlflow", {"tracking_uri": "databricks"}, ["tracking_uri"]),
        ("logger.csv2", {"save_dir": "logs", "prefix": "train/", "flush_logs_every_n_steps": 1}, ["save_dir"]),
        ("callbacks.best", {"dirpath": "here", "monitor": "val/loss"}, ["dirpath"]),
        ("callbacks.eval_corpora", {"corpora": {"a": {"source": "passwd"}}}, ["corpora.a.source"]),
        ("callbacks.x", {"files": ["a", "b"], "anything": "a/b", "text": "plain"}, ["files.0", "files.1", "anything"]),
        ("callbacks.x", {"y": {"_target_": "lightning.X", "z": "../x"}}, ["y.z"]),
        ("callbacks.x", {"_args_": ["a"]}, ["_args_.0"]),
        ("data.reader", {"names": "s3://bucket"}, ["names"]),
        ("tokenizer", {"model": "/spm.model"}, ["model"]),
    ],
)
def test_arguments_of_components_that_may_be_paths_are_found(key, arguments, found):
    values = json.loads(json.dumps(CONFIG))
    *groups, name = key.split(".")
    parent = values[groups[0]] if groups else values
    parent[name] = {"_target_": "lightning.X", **arguments}
    if key == "data.reader":
        values["data"]["corpus"] = "component"
    config = RunConfig.model_validate(values)
    assert [k for k, _ in find_locations(config) if k.startswith(f"{key}.")] == [f"{key}.{name}" for name in found]


def test_every_text_in_the_configuration_is_checked_unless_it_is_known_to_be_no_path():
    no_paths = {
        *("name", "data.subset", "data.column", "callbacks.samples.prompt", "callbacks.early_stopping.monitor"),
        *("logger.wandb.project", "logger.wandb.name", "logger.wandb.notes"),
        *("logger.wandb.group", "logger.wandb.job_type", "tokenizer.end_of_text"),
    }
    marked = {
        *("resume", "init_from", "resume_from_nanogpt", "data.source", "data.path", "data.cache_dir"),
        *("tokenizer.vocab_dir", "tokenizer.path", "callbacks.hellaswag.path", "logger.wandb.entity"),
    }
    texts = {key for key in known_keys(RunConfig) if str in kinds(key)}
    assert texts == no_paths | marked
    own = ("tokenizer=file", "tokenizer.path=a", "callbacks=[default,hellaswag]", "callbacks.hellaswag.path=a")
    config = resolved("model=tiny", *own, "logger=wandb")
    for key in marked - {"resume", "init_from", "resume_from_nanogpt"}:
        config = changed(config, key)
    assert {key for key, _ in find_locations(config)} == marked - {"resume", "init_from", "resume_from_nanogpt"}


def kinds(key: str) -> set[object]:
    """Returns the types of a field of the configuration, by its dotted key."""
    types: list[Any] = [RunConfig]
    for part in key.split("."):
        fields = [t.model_fields[part] for t in types if part in getattr(t, "model_fields", {})]
        types = [inner for field in fields for inner in members(field.annotation)]
    return set(types)


def members(annotation: Any) -> list[Any]:
    """Returns the members of a union, without annotations."""
    inner = getattr(annotation, "__args__", None)
    if inner is None or getattr(annotation, "__origin__", None) in (list, dict, tuple):
        return [annotation]
    return [member for part in inner for member in members(part)]


def changed(config: RunConfig, key: str) -> RunConfig:
    values = config.model_dump(mode="json")
    *groups, name = key.split(".")
    part = values
    for group in groups:
        part = part[group]
    part[name] = "x"
    return RunConfig.model_validate(values)


def test_an_evaluation_is_sent_to_the_account_that_a_stranger_names_only_if_the_user_agrees(
    tmp_path, monkeypatch, caplog
):
    sent = []
    monkeypatch.setattr(evaluations, "_is_online", lambda _: True)
    monkeypatch.setattr(evaluations, "opt_out", lambda: None)
    monkeypatch.setattr(evaluations, "start_client", lambda: sent.append(1))
    run = write(tmp_path / "run")
    wandb = resolved("model=tiny", "logger=wandb", "logger.wandb.entity=stranger").logger.model_dump(mode="json")
    (run / "config.yaml").write_text(json.dumps(CONFIG | {"logger": wandb}))
    evaluations.send_evaluation(run, "loss", {"loss": 1.0})
    assert sent == []
    assert "logger.wandb.entity=stranger" in caplog.text
    monkeypatch.setenv(TRUST_PATHS, "1")
    evaluations.send_evaluation(run, "loss", {"loss": 1.0})
    assert sent, "the payload has no effect, so the test would prove nothing"


def test_a_requeued_job_asks_nothing_since_its_own_configuration_names_the_same_paths(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "geteuid", lambda: os.getuid() + 1)
    run = write(tmp_path / "run")
    config = load_config(run)
    assert resume_as(config, run, config).data.source == "/home/someone/gptlab/text.txt"
    with pytest.raises(UserError, match=r"data\.source"):
        merge_resume_config({}, [], run, config)
