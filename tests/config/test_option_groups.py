"""Config groups of the commands, and the commands that an experiment is for."""

import pytest

from gptlab.config.command import configuration_folder
from gptlab.config.option_groups import OptionGroups
from gptlab.errors import UserError

CONF = configuration_folder()
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
EVALUATIONS = [name for name in EXPERIMENTS if name.startswith("eval_")]


@pytest.mark.parametrize("command", ["train", "plan", "prove", "evaluate"])
def test_every_experiment_is_for_training_commands_or_for_evaluate(command):
    scores = command == "evaluate"
    groups = OptionGroups(command, [CONF])
    fitting = [name for name in EXPERIMENTS if (name in EVALUATIONS) == scores]
    assert groups.fitting_options("experiment", EXPERIMENTS) == fitting
    assert groups.fitting_options("model", EVALUATIONS) == EVALUATIONS  # only experiments are specific to a command
    for name in EXPERIMENTS:
        if (name in EVALUATIONS) == scores:
            groups.check_experiments([f"experiment={name}", "run=eval_gpt2"])
        else:
            chosen = f"experiment={name}" if scores else f"experiment=quickstart,{name}"
            with pytest.raises(UserError, match=f"^experiment={name} is for python -m gptlab.(train|evaluate): "):
                groups.check_experiments(["seed=1", chosen])


@pytest.mark.parametrize(
    ("text", "commands"),
    [
        ("defaults: [override /data: text]\nsplit: all", {"evaluate"}),
        ("defaults: [speedrun_cpu, _self_]", {"train", "plan"}),  # like the experiment that it includes
        ("defaults:\n- override /data: text", {"train", "plan", "evaluate"}),  # all commands have this group
        ("gpu: h100\nname: x", {"plan"}),
        ("trian: {max_steps: 3}", {"train", "plan", "evaluate"}),  # an unknown key, which is reported as such
        ("{", {"train", "plan", "evaluate"}),  # invalid YAML, which Hydra reports
    ],
)
def test_a_user_experiment_is_for_the_commands_that_have_its_keys(tmp_path, text, commands):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    found = {
        name
        for name in ("train", "plan", "evaluate")
        if OptionGroups(name, [tmp_path, CONF]).fitting_options("experiment", ["mine"])
    }
    assert found == commands


def test_groups_table_lists_the_groups_of_the_command():
    lines = OptionGroups("prepare", [CONF]).table().splitlines()
    listed = [line.partition(": ")[0] for line in lines if not line.startswith(" ")]
    assert listed == ["data", "tokenizer"]


@pytest.mark.parametrize(
    ("override", "selected"),
    [
        ("+experiment=quickstart", "experiment=quickstart"),
        ("++model=gpt2", "model=gpt2"),
        ("+debug=limit", "debug=limit"),
        ("+hydra/job_logging=stdout", "hydra/job_logging=stdout"),
        ("+logger=[csv,wandb]", "logger=[csv,wandb]"),
        ("+machine=big", "+machine=big"),  # not in the defaults list
        ("+model.n_layer=3", "+model.n_layer=3"),
        ("+logger={wandb: null}", "+logger={wandb: null}"),
    ],
)
def test_plus_before_a_group_of_the_defaults_list_selects_an_option(override, selected):
    assert OptionGroups("train", [CONF]).normalize([override]) == [selected]


@pytest.mark.parametrize("none", ["{}=null", "{}=[]", "{}=", "~{}", "+{}=null"])
@pytest.mark.parametrize(
    ("group", "selected"),
    [
        ("callbacks", "callbacks=none"),
        ("logger", "logger=csv"),  # only metrics.csv
        *((group, f"~{group}") for group in ("lora", "loss", "debug", "without", "sweeps", "experiment")),
    ],
)
def test_no_option_of_a_group(group, selected, none):
    assert OptionGroups("train", [CONF]).normalize([none.format(group)]) == [selected]


@pytest.mark.parametrize("group", ["model", "data", "tokenizer", "optimizer", "schedule", "trainer"])
def test_a_required_group_needs_an_option(group):
    with pytest.raises(UserError, match=f"^{group}=null: {group} needs an option. Valid options: "):
        OptionGroups("train", [CONF]).normalize([f"{group}=null"])
    assert OptionGroups("evaluate", [CONF]).normalize(["data=null", "~tokenizer"]) == ["~data", "~tokenizer"]


@pytest.mark.parametrize("value", ["5", "true", "[nano,5]", "1e-3"])
def test_an_option_is_not_a_number(value):
    with pytest.raises(UserError, match=r"^Unknown option model=\S+\. Valid options: "):
        OptionGroups("train", [CONF]).normalize([f"model={value}"])


def test_plus_before_a_group_with_several_options_is_ambiguous():
    with pytest.raises(UserError, match=r"callbacks=\[<option>,trace\]"):
        OptionGroups("train", [CONF]).normalize(["+callbacks=trace"])
