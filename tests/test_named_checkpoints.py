"""Every command that takes a run takes one of its checkpoints, <run>/checkpoints/step_<n>."""

import json
import shutil

import pytest
import torch

from commands import assert_config_error, assert_same_run, assert_success
from gptlab.pretrained.source import open_model_source
from gptlab.pretrained.weights import load_model


def stored(directory, step: int) -> dict[str, torch.Tensor]:
    return torch.load(directory / "checkpoints" / f"step_{step:06d}" / "state.pt", weights_only=True)["state_dict"]


@pytest.mark.parametrize("name", ["step_000003", "step_3"])
def test_the_weights_of_a_named_checkpoint_are_loaded(halted, name):
    loaded = load_model(open_model_source(str(halted / "checkpoints" / name))).state_dict()
    expected, best = stored(halted, 3), stored(halted, 6)
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())
    assert not torch.equal(loaded["wte.weight"], best["wte.weight"])


@pytest.mark.slow
def test_sample_evaluate_export_and_replay_use_a_named_checkpoint(user, halted):
    alone = user.folder / "outputs" / "alone"  # the same run with this checkpoint only
    shutil.copytree(halted, alone)
    shutil.rmtree(alone / "checkpoints" / "step_000006")
    texts = []
    for model in (halted / "checkpoints" / "step_000003", alone):
        arguments = (f"run={model}", "prompt=line", "max_new_tokens=40", "seed=1")
        done = user.python("gptlab.sample", *arguments)
        assert_success(done)
        texts.append(done.stdout)
    assert texts[0] == texts[1]
    assert_success(user.python("gptlab.evaluate", f"run={halted}/checkpoints/step_000003", "windows=10"))
    (result,) = (halted / "evaluations").glob("*.json")
    found = json.loads(result.read_text())
    record = json.loads((halted / "checkpoints" / "step_000003" / "record.json").read_text())
    assert found["checkpoint"] == "step_000003"
    assert found["loss"] == pytest.approx(record["facts"]["val_loss"], abs=1e-5)
    assert_success(user.python("gptlab.export", f"run={halted}/checkpoints/step_3", "format=hf", "out=hf"))
    assert "| steps | 3 |" in (user.folder / "hf" / "README.md").read_text()
    assert_success(user.python("gptlab.prepare", f"replay={halted}/checkpoints/step_000003"))


def test_a_run_starts_from_the_weights_of_a_named_checkpoint(user, halted):
    unchanged = ("optimizer.lr=1e-30", "train.max_steps=1", "callbacks=checkpoint", "name=new")
    assert_success(user.train(f"init_from={halted}/checkpoints/step_000003", *unchanged))
    first = stored(user.only_run("new"), 1)
    torch.testing.assert_close(first, stored(halted, 3), atol=1e-6, rtol=0)


def test_the_newest_checkpoint_of_a_run_is_resumed(user, halted):
    assert_success(user.python("gptlab.train", f"resume={halted}/checkpoints/step_000006", "train.max_steps=9"))
    assert_same_run(halted, user.only_run("whole"))


@pytest.mark.slow
def test_an_earlier_checkpoint_is_not_resumed_since_later_steps_would_be_lost(user, halted):
    before = sorted(halted.rglob("*"))
    earlier = halted / "checkpoints" / "step_000003"
    done = user.python("gptlab.train", f"resume={earlier}", "train.max_steps=9")
    assert_config_error(done, f"resume={earlier} would discard the later steps, up to step_000006")
    assert f"init_from={earlier}" in done.stderr
    assert sorted(halted.rglob("*")) == before
    (halted / "checkpoints" / "step_000006").rename(user.folder / "step_000006")
    assert_success(user.python("gptlab.train", f"resume={earlier}", "train.max_steps=9"))
    assert_same_run(halted, user.only_run("whole"))


@pytest.mark.parametrize("launcher", ["SLURM", pytest.param("TORCHELASTIC", marks=pytest.mark.slow)])
def test_a_restarted_job_resumes_from_its_own_later_checkpoint(user, halted, launcher):
    user.environment[f"{launcher}_RESTART_COUNT"] = "1"
    assert_success(user.python("gptlab.train", f"resume={halted}/checkpoints/step_000003", "train.max_steps=9"))
    assert_same_run(halted, user.only_run("whole"))


@pytest.mark.parametrize("key", ["run", "init_from", "resume"])
def test_a_missing_checkpoint_is_an_error_that_lists_those_of_the_run(user, halted, key):
    module = "gptlab.sample" if key == "run" else "gptlab.train"
    named = f"{key}={halted}/checkpoints/step_000004"
    done = user.python(module, named)
    assert_config_error(done, f"{named} does not exist. Checkpoints of this run: step_000003, step_000006.")


def test_a_damaged_checkpoint_that_is_named_is_an_error(user, halted):
    path = halted / "checkpoints" / "step_000003" / "state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    for done in (
        user.python("gptlab.sample", f"run={path.parent}"),
        user.train(f"init_from={path.parent}", "name=new"),
    ):
        assert_config_error(done, "step_000003 is damaged: state.pt")
    assert not (user.folder / "outputs" / "new").exists()
