"""Which command an experiment is for."""

import pytest

from gptlab.config.command import configuration_folder
from gptlab.config.option_groups import OptionGroups
from gptlab.errors import UserError

CONF = configuration_folder()
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
EVALUATIONS = [name for name in EXPERIMENTS if name.startswith("eval_")]


@pytest.mark.parametrize("command", ["train", "plan", "prove", "evaluate"])
def test_every_experiment_is_for_those_that_train_or_for_the_one_that_scores(command):
    scores = command == "evaluate"
    groups = OptionGroups(command, [CONF])
    fitting = [name for name in EXPERIMENTS if (name in EVALUATIONS) == scores]
    assert groups.fitting_options("experiment", EXPERIMENTS) == fitting
    assert groups.fitting_options("model", EVALUATIONS) == EVALUATIONS  # only experiments are for one command
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
        ("defaults: [speedrun_cpu, _self_]", {"train", "plan"}),  # as the one that it begins with
        ("defaults:\n- override /data: text", {"train", "plan", "evaluate"}),  # which all have
        ("gpu: h100\nname: x", {"plan"}),
        ("trian: {max_steps: 3}", {"train", "plan", "evaluate"}),  # nobody's: told as what it is
        ("{", {"train", "plan", "evaluate"}),  # Hydra's to tell
    ],
)
def test_an_experiment_of_ones_own_is_for_the_commands_that_have_what_it_sets(tmp_path, text, commands):
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(text)
    found = {
        name
        for name in ("train", "plan", "evaluate")
        if OptionGroups(name, [tmp_path, CONF]).fitting_options("experiment", ["mine"])
    }
    assert found == commands


def test_groups_are_those_of_the_command():
    listed = [line.partition(": ")[0] for line in OptionGroups("prepare", [CONF]).table().splitlines()]
    assert listed == ["data", "tokenizer"]
