"""The W&B workspace and sweep files: their metrics and keys exist, and the commands of W&B's agent work."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from wandb.sdk.launch.sweeps.utils import create_sweep_command, create_sweep_command_args

from commands import assert_config_error, assert_success
from configs import resolved
from gptlab.config.command import configuration_folder
from gptlab.dashboards.spaces import wandb_sweep
from gptlab.errors import UserError
from gptlab.tracking.run_store.runs import flatten

SWEEPS = configuration_folder() / "sweeps"
NAMES = sorted(path.stem for path in SWEEPS.glob("*.yaml"))
WORKSPACE = ("entity=me", "project=models", "dry_run=true")


@pytest.fixture
def spec(user) -> dict[str, Any]:
    """The specification that would be sent to W&B."""
    assert_success(user.python("gptlab.dashboard", *WORKSPACE, "out=here.json"))
    values = json.loads((user.folder / "here.json").read_text())
    assert (values["entity"], values["project"], values["name"]) == ("me", "models", "gptlab")
    return values["spec"]["section"]


def panels(spec: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for section in spec["panelBankConfig"]["sections"]:
        yield from section["panels"]


def named(value: Any) -> Iterator[str]:
    """Yields every metric, summary value and config key that panels name, as W&B addresses them."""
    if isinstance(value, dict):
        for key, one in value.items():
            if key in ("metrics", "xAxis", "yAxis", "accessor", "targetKey"):
                yield from one if isinstance(one, list) else [one]
            else:
                yield from named(one)
    elif isinstance(value, list):
        for one in value:
            yield from named(one)


def test_runs_have_every_metric_and_key_of_the_panels(user, spec, runs):
    directory = runs.give(user, "halted", "train.max_steps=6", "schedule.decay_steps=9", "callbacks=checkpoint")
    header = set((directory / "metrics.csv").read_text().splitlines()[0].split(","))
    settings = dict(flatten(yaml.safe_load((directory / "config.yaml").read_text())))
    names = set(named([panel["config"] for panel in panels(spec)]))
    keys = {name.removeprefix("config:").replace(".value", "", 1) for name in names if name.startswith("config:")}
    assert keys
    assert keys <= settings.keys()
    best = {name for name in names if name.endswith("val/loss.min")}  # in the summary, by define_metric
    metrics = {name for name in names if not name.startswith("config:")} - best
    assert best == {"summary:val/loss.min", "val/loss.min"}
    # a CPU has no published peak, so it has no mfu
    assert metrics - {"mfu"} == metrics & header
    assert {"tokens", "train/loss", "val/loss", "grad_norm", "weight_norm", "tokens_per_second", "mfu"} <= metrics
    (rates,) = (panel["config"]["metricRegex"] for panel in panels(spec) if "metricRegex" in panel["config"])
    assert {name for name in (*header, "lr/matrix") if re.search(rates, name)} == {"lr", "lr/matrix"}


def test_the_sections_of_the_workspace_plot_over_tokens(spec):
    sections = {section["name"]: section for section in spec["panelBankConfig"]["sections"]}
    assert list(sections) == ["Training health", "Throughput", "Sweep comparison", "Samples"]
    assert all(section["isOpen"] and section["panels"] for section in sections.values())
    assert spec["settings"]["xAxis"] == "tokens"
    lines = [panel["config"] for panel in panels(spec) if panel["viewType"] == "Run History Line Plot"]
    assert {line["xAxis"] for line in lines} == {"tokens"}
    assert '"samples"' in json.dumps(sections["Samples"])
    (grouped,) = (line for line in lines if "groupBy" in line)
    assert (grouped["groupBy"], grouped["groupArea"], grouped["metrics"]) == ("group", "stderr", ["val/loss"])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "A workspace belongs to a W&B project. Set entity=<user or team> project=<project>"),
        (("entity=me", "project=models"), "Log in with `wandb login`"),
        ((*WORKSPACE, "out=nowhere/here.json"), "out=nowhere/here.json cannot be written"),
        (("entitty=me",), "Did you mean entity?"),
    ],
)
def test_invalid_arguments_are_config_errors(user, tmp_path, arguments, message):
    user.environment["HOME"] = str(tmp_path)
    assert_config_error(user.python("gptlab.dashboard", *arguments), message)


def test_the_committed_wandb_sweeps_are_up_to_date(user):
    assert_success(user.python("gptlab.dashboard", "wandb_sweeps=made"))
    made = {path.name: path.read_text() for path in (user.folder / "made").iterdir()}
    assert made == {path.name: path.read_text() for path in (SWEEPS / "wandb").iterdir()}
    assert sorted(made) == [f"{name}.yaml" for name in NAMES]


def choices(parameter: dict[str, Any]) -> list[Any]:
    """Returns values that W&B may choose for a key."""
    return parameter["values"] if "values" in parameter else [parameter["min"], parameter["max"]]


@pytest.mark.parametrize("name", NAMES)
def test_the_command_of_a_wandb_sweep_is_a_run_of_the_sweep(name):
    sweep = yaml.safe_load((SWEEPS / "wandb" / f"{name}.yaml").read_text())
    space = yaml.safe_load((SWEEPS / f"{name}.yaml").read_text())["hydra"]["sweeper"]["params"]
    assert (sweep["metric"], sweep["name"]) == ({"name": "val/loss", "goal": "minimize"}, name)
    assert sweep["parameters"].keys() <= space.keys()
    command = create_sweep_command(list(sweep["command"]))
    assert command[:4] == ["${env}", "${interpreter}", "-m", "gptlab.train"]
    for which in (0, -1):
        point = {key: {"value": choices(parameter)[which]} for key, parameter in sweep["parameters"].items()}
        arguments = create_sweep_command_args({"args": point})["args_no_hyphens"]
        config = resolved(*(argument for argument in command[4:-1] if argument != "hydra.mode=RUN"), *arguments)
        assert config.logger.wandb is not None
        settings = dict(flatten(config.model_dump(mode="json")))
        for key, one in point.items():
            if key in settings:  # otherwise it is a group
                assert settings[key] == one["value"], key


@pytest.mark.slow
def test_a_run_of_wandbs_agent_is_a_single_run(user):
    """With the arguments of W&B's agent, gptlab.train starts no multirun, even if the sweep file has mode MULTIRUN."""
    command = yaml.safe_load((SWEEPS / "wandb" / "lr.yaml").read_text())["command"][4:-1]
    command.remove("logger=wandb")
    done = user.train(*command, "optimizer.lr=0.004", "callbacks=none")
    assert_success(done)
    config = yaml.safe_load((user.only_run("lr") / "config.yaml").read_text())
    assert config["optimizer"]["lr"] == 0.004


SPACE = """# What is it? python -m gptlab.train -m sweeps=x
hydra:
  sweeper:
    {}
    params: {}
"""


def made(folder: Path, params: str, search: str = "seed: 0") -> dict[str, Any]:
    path = folder / "x.yaml"
    path.write_text("# @package _global_\n" + SPACE.format(search, params))
    return yaml.safe_load(wandb_sweep(path, "models"))


@pytest.mark.parametrize(
    ("space", "method", "parameter"),
    [
        ("1e-3,2", "grid", {"values": [0.001, 2]}),
        ("null,true,a", "grid", {"values": ["null", "True", "a"]}),
        ("[[4,8]],[]", "grid", {"values": ["[[4,8]]", "[]"]}),
        ("range(1,6,2)", "grid", {"values": [1, 3, 5]}),
        ("interval(0.1,1.0)", "bayes", {"distribution": "uniform", "min": 0.1, "max": 1.0}),
        ("int(interval(1,8))", "bayes", {"distribution": "int_uniform", "min": 1, "max": 8}),
        ("tag(log,interval(1e-4,1e-1))", "bayes", {"distribution": "log_uniform_values", "min": 1e-4, "max": 1e-1}),
        (
            "int(tag(log,interval(1,64)))",
            "bayes",
            {"distribution": "q_log_uniform_values", "q": 1, "min": 1, "max": 64},
        ),
    ],
)
def test_a_search_space_is_converted_to_wandbs_parameters(tmp_path, space, method, parameter):
    sweep = made(tmp_path, f"{{key: '{space}', seed: 3}}")
    assert sweep["method"] == method
    assert sweep["parameters"] == {"key": parameter}
    assert sweep["command"][4:] == ["sweeps=x", "hydra.mode=RUN", "logger=wandb", "seed=3", "${args_no_hyphens}"]
    for value in parameter.get("values", []):  # the agent writes str(value), from which Hydra parses the value
        read = OverridesParser.create().parse_override(f"key={value}").value()
        assert read in list(OverridesParser.create().parse_override(f"key={space}").sweep_iterator())


@pytest.mark.parametrize(("search", "method"), [("random", "random"), ("tpe", "bayes"), ("cmaes", "bayes")])
def test_a_search_method_is_converted_to_wandbs(tmp_path, search, method):
    sweep = made(tmp_path, "{seed: '1,2'}", f"search: {search}\n    n_trials: 7\n    question: Is it?")
    assert (sweep["method"], sweep["run_cap"], sweep["description"]) == (method, 7, "Is it?")


@pytest.mark.parametrize("params", ["{}", "{seed: 1}", "{model: 'glob(*)'}", "{seed: '1,(2'}"])
def test_a_search_space_without_values_is_an_error(tmp_path, params):
    with pytest.raises(UserError, match=r"x\.yaml"):
        made(tmp_path, params)
