"""Fine-tuning with LoRA, end to end."""

import pytest
import torch

from commands import assert_config_error, assert_success, metrics
from gptlab.pretrained.source import open_model_source
from gptlab.pretrained.weights import load_model
from gptlab.tracking.run_directory import newest_checkpoint
from gptlab.training.checkpoints.reading import read_checkpoint

IDS = torch.arange(32)[None] * 8
TUNED = ("name=tuned", "lora=all", "optimizer.lr=0.01", "schedule=constant", "schedule.warmup_steps=0")


@pytest.fixture
def begun(user, runs):
    """Run of six steps to start from."""
    return runs.give(user, "begun", "callbacks=checkpoint")


@pytest.mark.slow
def test_lora_trains_only_its_matrices_and_load_model_merges_them(user, begun):
    done = user.train(f"init_from={begun}", *TUNED, "callbacks=checkpoint")
    assert_success(done)
    log = user.only_run("tuned").joinpath("train.log").read_text()
    assert log.count("16,384 trained LoRA parameters (rank 8)") == 2  # at the start and in the summary
    assert "parameters exact" in log  # the forecast counts them, too
    before, after = (read_checkpoint(newest_checkpoint(directory)) for directory in (begun, user.only_run("tuned")))
    for name, tensor in before["state_dict"].items():
        assert torch.equal(after["state_dict"][name], tensor), name
    (optimizer,) = after["optimizer_states"]
    assert len(optimizer["state"]) == 2 * 4 * 2  # two matrices for each of four layers in two blocks
    assert all(".lora_" in name for name in optimizer["state"])
    losses = metrics(user.only_run("tuned"), "val/loss")
    assert losses[6] < metrics(begun, "val/loss")[6] - 0.05
    merged = load_model(open_model_source(str(user.only_run("tuned"))))
    assert set(merged.state_dict()) == set(before["state_dict"])
    weight, trained = (before["state_dict"]["h.0.mlp.c_fc.weight"], after["state_dict"])
    expected = weight + 16 / 8 * trained["h.0.mlp.c_fc.lora_B"] @ trained["h.0.mlp.c_fc.lora_A"]
    torch.testing.assert_close(merged.h[0].mlp.c_fc.weight.detach(), expected, rtol=0, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("devices", [("trainer=ddp",), ("trainer=fsdp",)], ids=["ddp", "fsdp"])
def test_two_devices_and_a_resume_give_the_weights_of_one_device(user, begun, devices):
    assert_success(user.train(f"init_from={begun}", *TUNED, "train.max_steps=6"))
    assert_success(
        user.train(f"init_from={begun}", *TUNED, "name=two", "train.max_steps=3", *devices, "trainer.devices=2")
    )
    assert_success(user.python("gptlab.train", f"resume={user.only_run('two')}", "train.max_steps=6"))
    one, two = (load_model(open_model_source(str(user.only_run(name))))(IDS) for name in ("tuned", "two"))
    torch.testing.assert_close(two, one, rtol=0, atol=1e-4)
    assert (one - load_model(open_model_source(str(begun)))(IDS)).abs().max() > 0.1


def test_lora_without_pretrained_weights_or_adamw_is_an_error(user, begun):
    assert_config_error(user.train("lora=all"), "lora adapts trained weights")
    assert_config_error(user.train("lora=all", f"init_from={begun}", "optimizer=muon"), "Use optimizer=adamw")
    assert not (user.folder / "outputs" / "quickstart").exists()
