"""Which command an experiment is for."""

import pytest

from gptlab.config.command import configuration_folder
from gptlab.config.option_groups import Groups
from gptlab.errors import UserError

CONF = configuration_folder()
EXPERIMENTS = sorted(path.stem for path in (CONF / "experiment").glob("*.yaml"))
EVALUATIONS = [name for name in EXPERIMENTS if name.startswith("eval_")]


@pytest.mark.parametrize("command", ["train", "plan", "prove", "evaluate"])
def test_every_experiment_is_for_those_that_train_or_for_the_one_that_scores(command):
    scores = command == "evaluate"
    groups = Groups(command, [CONF])
    assert groups.own("experiment", EXPERIMENTS) == [name for name in EXPERIMENTS if (name in EVALUATIONS) == scores]
    assert groups.own("model", EVALUATIONS) == EVALUATIONS  # other groups are one command's or several's as a whole
    for name in EXPERIMENTS:
        if (name in EVALUATIONS) == scores:
            groups.check([f"experiment={name}", "run=eval_gpt2"])
        else:
            with pytest.raises(
                UserError, match=f"^experiment={name} is for python -m gptlab.(train|evaluate): it sets "
            ):
                groups.check(["seed=1", f"experiment=quickstart,{name}" if not scores else f"experiment={name}"])


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
        name for name in ("train", "plan", "evaluate") if Groups(name, [tmp_path, CONF]).own("experiment", ["mine"])
    }
    assert found == commands


def test_groups_are_those_of_the_command():
    listed = [line.partition(": ")[0] for line in Groups("prepare", [CONF]).table().splitlines()]
    assert listed == ["data", "tokenizer"]
