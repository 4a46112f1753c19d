"""Time, network traffic and disk space, against hand-computed values."""

import pytest

from configs import resolved
from gptlab.model.config import flops_per_token, forward_flops_per_token, parameter_count
from gptlab.planning.costs import (
    RunLength,
    add_network,
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


def test_fsdp_gathers_blocks_in_bfloat16_per_micro_batch_and_reduces_float32_once():
    # 480 sequences on 8 devices with a micro-batch size of 12: 5 micro-batches
    gathered = 5 * (2 * BLOCKS * 2 + (N - BLOCKS) * 4)
    assert network_traffic(GPT2, ParallelLayout("fsdp", 8), "bf16-mixed", 12) == pytest.approx(
        7 / 8 * (4 * N + gathered), rel=1e-12
    )


def test_tensor_parallelism_adds_the_traffic_of_activations():
    # 2 devices per block: 1 group, so no other traffic; 40 micro-batches of 12
    tensor = 12 * 1024 * 768 * 2
    assert network_traffic(GPT2, ParallelLayout("fsdp_tp", 2, 2), "bf16-mixed", 12) == 40 * 12 * tensor / 2 * 14


def test_muon_sends_the_updates_or_shards_of_the_matrices_in_bfloat16():
    muon = resolved("experiment=gpt2_openwebtext", "optimizer=muon").with_vocabulary(50257)
    matrices = 12 * 12 * 768**2
    for strategy, shared in (("ddp", 2 * matrices), ("fsdp", 2 * 2 * matrices / 8)):
        without, found = (network_traffic(c, ParallelLayout(strategy, 8), "bf16-mixed", 12) for c in (GPT2, muon))
        assert found - without == pytest.approx(7 / 8 * shared, rel=1e-9)


def test_lora_sends_only_the_gradients_of_the_added_matrices():
    lora = resolved("experiment=gpt2_openwebtext", "lora=attention", "init_from=gpt2").with_vocabulary(50257)
    rank = lora.lora.rank
    added = 12 * rank * (4 * 768 + 2 * 768)  # c_attn: C x r and r x 3 C; c_proj: C x r and r x C
    assert network_traffic(lora, ParallelLayout("ddp", 8), "bf16-mixed", 12) == 2 * 7 / 8 * 4 * added


def test_lora_checkpoint_has_all_weights_and_the_optimizer_state_of_the_added_matrices():
    lora = resolved("experiment=gpt2_openwebtext", "lora=all", "init_from=gpt2").with_vocabulary(50257)
    added = 12 * lora.lora.rank * 768 * (4 + 2 + 5 + 5)
    assert disk_usage(lora, "bf16-mixed", 10).checkpoint == 4 * (N + 3 * added)
    averaged = lora.model_copy(update={"train": lora.train.model_copy(update={"ema_decay": 0.99})})
    assert disk_usage(averaged, "bf16-mixed", 10).checkpoint == 4 * (N + 4 * added)
    assert sum(count_by_part(lora.model, lora.lora).values()) == N + added
    assert count_shares(lora.model, lora=lora.lora) == (BLOCKS + added, 12 * 12 * 768**2, N - BLOCKS, added)


XL = resolved("model=gpt2-xl", "train.global_batch_size=4096").with_vocabulary(50257)


def test_network_of_1024_gpus_is_overlapped_or_added():
    length = RunLength(steps=10, tokens=10 * 4096 * 1024, evaluations=0, evaluated=0)
    computing = estimate_at_mfu(XL, length, plan_hardware(XL, ["h100"])._replace(devices=1024), 0.4)
    n = (50_257 + 1024 + 2) * 1600 + 48 * (12 * 1600**2 + 13 * 1600)  # with biases; the vocabulary is not padded
    flops = 6 * (n - 1024 * 1600) + 12 * 48 * 1600 * 1024
    own, sent = 4096 * 1024 * flops / (0.4 * 989.4e12 * 1024), 2 * 1023 / 1024 * 4 * n / 50e9
    assert (round(own, 3), round(sent, 3)) == (0.106, 0.249)
    traffic = network_traffic(XL, ParallelLayout("ddp", 1024), "bf16-mixed", 4)
    overlapped, sequential = add_network(computing, length, traffic, 50e9)
    assert overlapped.seconds == pytest.approx(10 * sent, rel=1e-9)
    assert sequential.seconds == pytest.approx(10 * (own + sent), rel=1e-9)
    assert sequential.tokens_per_second == pytest.approx(4096 * 1024 / (own + sent), rel=1e-9)
    fast, _ = add_network(computing, length, traffic, 500e9)
    assert fast.seconds == pytest.approx(10 * own, rel=1e-9)  # the traffic fits into the time of computing


def test_time_without_a_bandwidth_is_that_of_computing():
    length = RunLength(steps=10, tokens=10 * 4096 * 1024, evaluations=0, evaluated=0)
    computing = estimate_at_mfu(XL, length, plan_hardware(XL, ["h100"]), 0.4)
    (alone,) = add_network(computing, length, 1e9, None)
    assert (alone.network, alone.seconds) == ("excluded", computing.seconds)
    assert alone.step_computing == pytest.approx(computing.seconds / 10, rel=1e-12)
    assert add_network(computing, length, 0.0, 50e9) == [computing]


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
    time = estimate_from_measurement(CONFIG, length, plan_hardware(CONFIG, []), TAKEN)
    # an evaluated token takes a third of the time of a training token; the rest is the sample and the checkpoint
    each = 2 + (128 - 64) / (3 * 400 / 6)
    assert time.seconds == pytest.approx(10 + 9_900 / (400 / 6) + 3 * each)


def test_evaluated_token_of_lora_costs_more_than_a_third_of_a_training_token():
    lora = resolved("experiment=gpt2_openwebtext", "lora=all", "init_from=gpt2").with_vocabulary(50257)
    length = RunLength(steps=100, tokens=10_000, evaluations=3, evaluated=300)
    time = estimate_at_mfu(lora, length, plan_hardware(lora, ["a100"]), 0.5)
    total, forward = flops_per_token(lora.model, lora.lora), forward_flops_per_token(lora.model, lora.lora)
    assert time.seconds * 0.5 * 312e12 == pytest.approx(10_000 * total + 900 * forward)
    assert 0.45 < forward / total < 0.5


def test_time_from_mfu():
    length = RunLength(steps=100, tokens=10_000, evaluations=3, evaluated=300)
    time = estimate_at_mfu(CONFIG, length, plan_hardware(CONFIG, ["a100"]), 0.5)
    assert time.tokens_per_second == pytest.approx(0.5 * 312e12 / flops_per_token(CONFIG.model))
    assert time.seconds * time.tokens_per_second == pytest.approx(10_000 + 3 * 100)
