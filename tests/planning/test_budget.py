"""Compute-optimal runs, against the tables of the papers and the composed configuration."""

import pytest

from configs import resolved
from gptlab.errors import UserError
from gptlab.model.config import flops_per_token, parameter_count
from gptlab.planning.budget import choose_compute_optimal, model_ladder, optimal_batch_tokens, optimal_learning_rate

GPT2 = ("tokenizer=gpt2", "model.block_size=1024")


def with_vocabulary(*overrides: str):
    return resolved(*overrides).with_vocabulary(50257)


@pytest.mark.parametrize(("parameters", "batch", "rate"), [(7e9, 2304, 4.2e-4), (67e9, 4608, 3.2e-4)])
def test_batch_size_and_learning_rate_match_deepseek_table(parameters, batch, rate):
    # Bi et al. 2024, table 2: two trillion tokens, sequences of 4096; 6 N FLOPs a token
    budget = 6 * parameters * 2e12
    assert optimal_batch_tokens(budget) == pytest.approx(batch * 4096, rel=0.03)
    assert optimal_learning_rate(budget) == pytest.approx(rate, rel=0.02)


def test_ladder_contains_gpt2_sizes():
    shapes = {(size.n_layer, size.n_head, size.n_embd) for size in model_ladder(with_vocabulary(*GPT2).model)}
    assert {(12, 12, 768), (24, 16, 1024), (36, 20, 1280)} <= shapes


@pytest.mark.parametrize("budget", [1e15, 1e17, 1e19, 1e21])
@pytest.mark.parametrize("devices", [1, 8])
def test_chosen_run_uses_the_budget(budget, devices):
    choice = choose_compute_optimal(with_vocabulary(*GPT2), budget, devices)
    composed = with_vocabulary(*GPT2, *choice.overrides)
    assert composed == choice.config
    tokens = composed.steps * composed.train.global_batch_size * 1024
    assert tokens * flops_per_token(composed.model) == pytest.approx(budget, rel=0.02)
    assert 20 / 1.5 < tokens / parameter_count(composed.model) < 20 * 1.5
    assert composed.train.global_batch_size % devices == 0


def test_chinchilla_budget_gives_its_model_size():
    # Hoffmann et al. 2022, table 1: Chinchilla, 70B parameters and 1.4T tokens, 5.76e23 FLOPs; table 3: 1B for 1.21e20
    choice = choose_compute_optimal(with_vocabulary(*GPT2), 1.21e20, 1)
    assert parameter_count(choice.config.model) == pytest.approx(1e9, rel=0.25)


def test_muon_keeps_its_learning_rate_and_other_overrides_are_replaced():
    named = ("optimizer=muon", "train.micro_batch_size=6", "train.batch_schedule=[[4,6]]", "train.max_steps=null")
    config = with_vocabulary(*GPT2, *named, "train.max_tokens=1e6")
    choice = choose_compute_optimal(config, 1e17, 1)
    assert not any(override.startswith("optimizer.lr") for override in choice.overrides)
    assert with_vocabulary(*GPT2, *named, "train.max_tokens=1e6", *choice.overrides) == choice.config


@pytest.mark.parametrize(
    ("budget", "message"),
    [(1e9, r"budget=1e\+09 FLOPs is too small .* at least"), (1e27, r"budget=1e\+27 FLOPs is too large")],
)
def test_budget_out_of_range_raises(budget, message):
    with pytest.raises(UserError, match=message):
        choose_compute_optimal(with_vocabulary(*GPT2), budget, 1)
