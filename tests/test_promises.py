"""Claims of the README about whole runs."""

import json
import math
import os
import re

import pytest

from commands import assert_success, metrics
from gptlab.model.config import parameter_count
from gptlab.tracking.run_directory import load_config

pytestmark = pytest.mark.slow


def test_the_default_run_learns_python(user):
    del user.environment["OMP_NUM_THREADS"]
    assert_success(user.python("gptlab.train", timeout=900))
    directory = user.only_run()
    assert min(metrics(directory, "val/bits_per_byte").values()) <= 2.6
    # eight samples, since one text of 200 bytes may have no keyword
    sampled = user.python("gptlab.sample", f"run={directory}", "num_samples=8")
    assert_success(sampled)
    assert re.search(r"\b(def|self|import|return|class|if)\b", sampled.stdout), sampled.stdout
    assert sorted(directory.glob("samples/*"))[-1].name == "step_001200.txt"


@pytest.fixture
def source():
    """Path of tinyshakespeare."""
    if (path := os.environ.get("GPTLAB_TINYSHAKESPEARE")) is None:
        pytest.skip("requires tinyshakespeare: GPTLAB_TINYSHAKESPEARE=<input.txt>")
    return path


@pytest.mark.parametrize("seed", [1, 2, 3, 4, 5])
def test_the_speedrun_reaches_nanogpts_loss_with_fewer_parameters(user, source, seed):
    assert_success(
        user.python("gptlab.train", "experiment=speedrun_cpu", f"data.source={source}", f"seed={seed}", timeout=300)
    )
    directory = user.only_run("speedrun_cpu")
    assert metrics(directory, "val/loss")[220] <= 1.8857
    assert parameter_count(load_config(directory).model) <= 804_096  # nanoGPT's, without its biases


def test_the_ladder_runs_the_recipe_with_and_without_a_part(user, source):
    arguments = ("suite=ladder", f"speedrun.source={source}", "speedrun.parts=[muon]", "speedrun.target=3", "rounds=1")
    assert_success(user.python("gptlab.bench", *arguments, "out=measured", timeout=600))
    (part,) = json.loads((user.folder / "measured" / "ladder.json").read_text())["parts"]
    whole, without = (row["medians"] for row in part["rows"])
    assert whole["steps to it"] == 20
    assert whole["val loss"] < without["val loss"]
    assert part["rows"][1]["ratio"] == pytest.approx(without["val loss"] / whole["val loss"])


def test_shakespeare_char_cpu_reaches_nanogpts_loss(user, source):
    del user.environment["OMP_NUM_THREADS"]
    assert_success(user.python("gptlab.train", "experiment=shakespeare_char_cpu", f"data.source={source}", timeout=900))
    directory = user.only_run("shakespeare_char_cpu")
    assert metrics(directory, "train/loss")[1] == pytest.approx(math.log(65), abs=0.05)
    assert metrics(directory, "val/loss")[2000] <= 1.90  # nanoGPT: 1.8857


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_gpt2_runs_on_two_processes(user, strategy):
    size = ("model=gpt2", f"trainer={strategy}", "trainer.devices=2", "model.block_size=128", "train.max_steps=2")
    assert_success(user.python("gptlab.train", *size, "train.eval_windows=24", timeout=1200))
    directory = user.only_run()
    assert list(metrics(directory, "train/loss")) == [1, 2]
    # a wide tolerance: with tied weights an untrained model favors its input token, which often recurs in text
    assert metrics(directory, "train/loss")[1] == pytest.approx(math.log(50257), abs=1)
