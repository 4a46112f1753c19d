"""Traffic and disk by hand."""

import pytest

from configs import resolved
from gptlab.model.config import parameter_count
from gptlab.planning.memory import ParallelLayout
from gptlab.planning.parameters import count_by_part, count_shares
from gptlab.planning.traffic import disk_usage, network_traffic

GPT2 = resolved("experiment=gpt2_openwebtext").with_vocabulary(50257)
N = 124_373_760  # parameters, with a vocabulary of 50,304 and without biases
BLOCKS = 12 * (12 * 768**2 + 2 * 768)


def test_ddp_sends_every_gradient_almost_twice():
    assert parameter_count(GPT2.model) == N
    assert network_traffic(GPT2, ParallelLayout("single", 1), "bf16-mixed", 12) == 0
    assert network_traffic(GPT2, ParallelLayout("ddp", 8), "bf16-mixed", 12) == 2 * 7 / 8 * 4 * N


def test_fsdp_gathers_in_bfloat16_for_every_micro_batch_and_sums_once_in_float32():
    # 480 sequences over 8 devices with 12 at once: 5 micro-batches
    gathered = 5 * (2 * BLOCKS + (N - BLOCKS)) * 2
    assert network_traffic(GPT2, ParallelLayout("fsdp", 8), "bf16-mixed", 12) == pytest.approx(
        7 / 8 * (4 * N + gathered), rel=1e-12
    )


def test_tensor_parallel_devices_send_activations_too():
    # 2 devices a block: 1 group of them, so nothing else is sent; 40 micro-batches of 12
    tensor = 12 * 1024 * 768 * 2
    assert network_traffic(GPT2, ParallelLayout("fsdp_tp", 2, 2), "bf16-mixed", 12) == 40 * 12 * tensor / 2 * 14


def test_disk():
    space = disk_usage(GPT2, "bf16-mixed", 9_035_582_198)  # nanoGPT's train.bin
    assert space.data == 2 * 9_035_582_198
    assert space.checkpoint == 3 * 4 * N
    assert space.kept == 4 * space.checkpoint  # two, the best one, and the one that is being written
    muon = resolved("experiment=gpt2_openwebtext", "optimizer=muon", "train.ema_decay=0.99").with_vocabulary(70_000)
    space = disk_usage(muon, "bf16-mixed", 10)
    assert space.data == 40  # ids need four bytes
    assert space.checkpoint == 4 * (4 * parameter_count(muon.model) - 12 * 12 * 768**2)


@pytest.mark.parametrize("model", ["gpt2", "gpt2_modern", "nano", "mini"])
def test_parts_are_all_parameters(model):
    config = resolved(f"model={model}").with_vocabulary(50257).model
    assert sum(count_by_part(config).values()) == parameter_count(config) == count_shares(config).all
    assert count_shares(config, 2).all == parameter_count(config) - count_shares(config, 2).matrices
