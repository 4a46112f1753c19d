"""Memory and communication of two processes with each strategy, counted by torch."""

import json
import os
import subprocess
import sys
from pathlib import Path

import lightning as L
import pytest
import torch

import distributed_training
from conftest import tiny_config
from distributed_training import MICRO_BATCHES, STEPS
from gptlab.model.config import parameter_count
from gptlab.training.distributed.strategies import any_length

BLOCKS = 2
GROUPS = BLOCKS + 1  # FSDP units: each block, and the remaining parameters


@pytest.fixture(scope="module")
def found():
    """The results of the script, by strategy."""
    script = Path(distributed_training.__file__)
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script))
    paths = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "collectives"), [("ddp", 1), ("fsdp", GROUPS), ("fsdp_tp", 0)])
def test_gradients_are_reduced_once_per_step_not_per_micro_batch(found, strategy, collectives):
    assert MICRO_BATCHES > 1
    assert found[strategy]["reduced"] == STEPS * collectives
    assert not found[strategy]["syncs_buffers"]  # they are constant


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp", "fsdp_tp"])
def test_no_optimizer_changes_weights_in_a_step_with_a_nan_gradient(found, strategy):
    assert found[strategy]["kept"] == dict.fromkeys(distributed_training.optimizers(strategy), True)


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_process_accumulates_whole_float32_gradients(found, strategy):
    assert found[strategy]["accumulated"] == 4 * parameter_count(tiny_config())


@pytest.mark.slow
def test_fsdp_s_mixed_precision_is_that_of_ddp(found):
    assert found["fsdp"]["mixed"] == found["ddp"]["mixed"]  # autocast's, with the residual stream in float32


@pytest.mark.slow
def test_ddp_with_many_buckets_has_the_losses_of_a_plain_loop(found):
    assert found["buckets"]["reduced"] >= 4 * STEPS
    assert found["buckets"]["losses"] == pytest.approx(found["buckets"]["plain"], abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "collectives"), [("replicated", 1), ("sharded", 2)])
def test_ranks_divide_the_matrices_of_muon(found, layout, collectives):
    muon = found["muon"][layout]
    assert muon["error"] < 1e-14  # compared with torch's Muon in one process, in float64
    assert muon["alike"]
    assert muon["orthogonalized"] == STEPS * (2 + 1 + 1)  # by the first of two ranks, of three matrices, one and one
    assert muon["gathers"] == STEPS * 3 * collectives  # of three stacks, not of five matrices


@pytest.mark.slow
def test_sampling_gathers_a_sharded_model_once(found):
    assert found["fsdp"]["gathered"] == GROUPS  # in three forward passes


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "share"), [("ddp", 1), ("fsdp", 1 / 2), ("fsdp_tp", 1 / 2)])
def test_each_process_holds_its_share_of_the_blocks(found, strategy, share):
    assert found[strategy]["held"] == share


@pytest.mark.slow
def test_tensor_parallel_logits_and_gradients_match_those_of_one_device(found):
    assert found["fsdp_tp"]["split"]["logits"] < 1e-6
    assert found["fsdp_tp"]["split"]["gradients"] < 1e-6


@pytest.mark.slow
def test_dropout_is_the_same_on_all_devices_of_a_tensor_parallel_group(found):
    # otherwise replicated activations would diverge
    assert found["fsdp_tp"]["alike"]


@pytest.mark.parametrize("warn_only", [False, True])
def test_samples_and_scores_of_a_deterministic_run_may_use_any_kernel(warn_only):
    trainer = L.Trainer(accelerator="cpu", devices=1, logger=False, deterministic="warn" if warn_only else True)
    try:
        with any_length(trainer):
            assert not torch.are_deterministic_algorithms_enabled()
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
    finally:
        torch.use_deterministic_algorithms(False)
