"""Time, network traffic and disk space, against hand-computed values."""

import pytest

from configs import resolved
from gptlab.model.config import flops_per_token, parameter_count
from gptlab.planning.costs import (
    RunLength,
    disk_usage,
    estimate_at_mfu,
    estimate_from_measurement,
    network_traffic,
    run_length,
)
from gptlab.planning.memory import ParallelLayout, count_by_part, count_shares
from gptlab.planning.plans import plan_hardware
from measured_run import TAKEN

GPT2 = resolved("experiment=gpt2_openwebtext").with_vocabulary(50257)
N = 124_373_760  # parameters, with a vocabulary of 50,304 and without biases
CONFIG = resolved("trainer=cpu").with_vocabulary(257)  # 1,200 steps of 12 x 128 tokens, evaluated every 200
BLOCKS = 12 * (12 * 768**2 + 2 * 768)


def test_ddp_sends_every_gradient_almost_twice():
    assert parameter_count(GPT2.model) == N
    assert network_traffic(GPT2, ParallelLayout("single", 1), "bf16-mixed", 12) == 0
    assert network_traffic(GPT2, ParallelLayout("ddp", 8), "bf16-mixed", 12) == 2 * 7 / 8 * 4 * N


def test_fsdp_gathers_bfloat16_per_micro_batch_and_reduces_float32_once():
    # 480 sequences on 8 devices with a micro-batch size of 12: 5 micro-batches
    gathered = 5 * (2 * BLOCKS + (N - BLOCKS)) * 2
    assert network_traffic(GPT2, ParallelLayout("fsdp", 8), "bf16-mixed", 12) == pytest.approx(
        7 / 8 * (4 * N + gathered), rel=1e-12
    )


def test_tensor_parallelism_adds_the_traffic_of_activations():
    # 2 devices per block: 1 group, so no other traffic; 40 micro-batches of 12
    tensor = 12 * 1024 * 768 * 2
    assert network_traffic(GPT2, ParallelLayout("fsdp_tp", 2, 2), "bf16-mixed", 12) == 40 * 12 * tensor / 2 * 14


def test_disk_space_of_data_and_checkpoints():
    space = disk_usage(GPT2, "bf16-mixed", 9_035_582_198)  # nanoGPT's train.bin
    assert space.data == 2 * 9_035_582_198
    assert space.checkpoint == 3 * 4 * N
    assert space.kept == 4 * space.checkpoint  # the last two, the best one, and the one being written
    muon = resolved("experiment=gpt2_openwebtext", "optimizer=muon", "train.ema_decay=0.99").with_vocabulary(70_000)
    space = disk_usage(muon, "bf16-mixed", 10)
    assert space.data == 40  # a token ID needs four bytes
    assert space.checkpoint == 4 * (4 * parameter_count(muon.model) - 12 * 12 * 768**2)


@pytest.mark.parametrize("model", ["gpt2", "gpt2_modern", "nano", "mini"])
def test_parts_sum_to_all_parameters(model):
    config = resolved(f"model={model}").with_vocabulary(50257).model
    assert sum(count_by_part(config).values()) == parameter_count(config) == count_shares(config).all
    assert count_shares(config, 2).all == parameter_count(config) - count_shares(config, 2).matrices


def test_run_length_counts_steps_tokens_and_evaluations():
    assert run_length(CONFIG, 558_031) == RunLength(1200, 1200 * 12 * 128, 6, 500 * 128)
    everything = resolved("train.eval_windows=null", "train.eval_every=1000").with_vocabulary(257)
    assert run_length(everything, 1281) == RunLength(1200, 1200 * 12 * 128, 2, 10 * 128)
    assert run_length(everything, None).evaluated is None


def test_time_from_a_measurement():
    length = RunLength(steps=100, tokens=10_000, evaluations=3, evaluated=128)  # twice the measured evaluations
    time = estimate_from_measurement(length, plan_hardware(CONFIG, []), TAKEN)
    # an evaluated token takes a third of the time of a training token; the rest is the sample and the checkpoint
    each = 2 + (128 - 64) / (3 * 400 / 6)
    assert time.seconds == pytest.approx(10 + 9_900 / (400 / 6) + 3 * each)


def test_time_from_mfu():
    length = RunLength(steps=100, tokens=10_000, evaluations=3, evaluated=300)
    time = estimate_at_mfu(CONFIG, length, plan_hardware(CONFIG, ["a100"]), 0.5)
    assert time.tokens_per_second == pytest.approx(0.5 * 312e12 / flops_per_token(CONFIG.model))
    assert time.seconds * time.tokens_per_second == pytest.approx(10_000 + 3 * 100)
