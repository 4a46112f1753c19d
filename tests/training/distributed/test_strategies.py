"""What two processes hold and communicate, by torch's own count."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import spread
from spread import MICRO_BATCHES, STEPS

BLOCKS = 2
GROUPS = BLOCKS + 1  # what FSDP handles at once: each block, and what remains


@pytest.fixture(scope="module")
def found():
    """What the script has found, by strategy."""
    script = Path(spread.__file__)
    command = (sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", str(script))
    paths = os.pathsep.join([str(script.parents[1]), os.environ.get("PYTHONPATH", "")])
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(next(line for line in done.stdout.splitlines() if line.startswith("{")))


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "at_once"), [("ddp", 1), ("fsdp", GROUPS), ("fsdp_tp", 0)])
def test_gradients_are_reduced_once_a_step_and_not_once_a_micro_batch(found, strategy, at_once):
    assert MICRO_BATCHES > 1
    assert found[strategy]["reduced"] == STEPS * at_once


@pytest.mark.slow
def test_sampling_gathers_a_sharded_network_once(found):
    assert found["fsdp"]["gathered"] == GROUPS  # of three forward passes


@pytest.mark.slow
@pytest.mark.parametrize(("strategy", "share"), [("ddp", 1), ("fsdp", 1 / 2), ("fsdp_tp", 1 / 2)])
def test_a_process_holds_its_share_of_the_blocks(found, strategy, share):
    assert found[strategy]["held"] == share


@pytest.mark.slow
def test_a_split_network_computes_what_the_whole_one_does(found):
    assert found["fsdp_tp"]["split"]["logits"] < 1e-6
    assert found["fsdp_tp"]["split"]["gradients"] < 1e-6


@pytest.mark.slow
def test_processes_that_split_a_network_drop_out_alike(found):
    # else what both hold whole would drift apart
    assert found["fsdp_tp"]["alike"]
