"""Sampling, compared with transformers' filters and with the expected distribution."""

import pytest
import torch
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gptlab.model.config import SamplingConfig
from gptlab.model.generation.sampler import NOT_FINITE, row_seeds, sample_next_token, uniform_numbers

PLAIN = {"temperature": 1.0, "top_k": None, "top_p": None, "min_p": None, "repetition_penalty": 1.0}
SETTINGS = {
    "plain": {},
    "temperature": {"temperature": 2.0},
    "top_k": {"top_k": 5},
    "top_k above the vocabulary": {"top_k": 500},
    "top_p": {"top_p": 0.7},
    "top_k and top_p": {"top_k": 6, "top_p": 0.8, "temperature": 1.5},
    "min_p": {"min_p": 0.1, "temperature": 1.3},
    "repetition_penalty": {"repetition_penalty": 1.7},
    "all": {"repetition_penalty": 1.3, "temperature": 1.4, "top_k": 9, "top_p": 0.95, "min_p": 0.05},
}


def expected_distribution(logits: torch.Tensor, seen: list[int], settings: dict) -> torch.Tensor:
    """Returns the distribution from which transformers samples."""
    ids, scores = torch.tensor([seen]), logits[None]
    processors = [
        RepetitionPenaltyLogitsProcessor(settings["repetition_penalty"]),
        TemperatureLogitsWarper(float(settings["temperature"])),
        *([TopKLogitsWarper(settings["top_k"])] if settings["top_k"] else []),
        *([TopPLogitsWarper(settings["top_p"])] if settings["top_p"] else []),
        *([MinPLogitsWarper(settings["min_p"])] if settings["min_p"] else []),
    ]
    for processor in processors:
        scores = processor(ids, scores)
    return scores[0].softmax(-1)


@pytest.mark.parametrize("changes", SETTINGS.values(), ids=SETTINGS)
def test_samples_follow_transformers_distribution(changes):
    settings, count = PLAIN | changes, 100_000
    logits = torch.linspace(-2, 3, 12)[torch.randperm(12, generator=torch.Generator().manual_seed(0))]
    expected = expected_distribution(logits, [3, 7, 7], settings)
    seen = torch.zeros(count, 12, dtype=torch.bool)
    seen[:, [3, 7]] = True
    uniforms = uniform_numbers([0], count)[0]
    ids = sample_next_token(logits.expand(count, 12), seen, uniforms, SamplingConfig(**settings))
    drawn = ids.bincount(minlength=12) / count
    assert torch.equal(drawn > 0, expected > 0)
    errors = (expected * (1 - expected) / count).sqrt()
    assert ((drawn - expected).abs() <= 4.5 * errors).all()  # within 4.5 standard errors


def test_the_smallest_and_the_largest_number_select_possible_tokens():
    logits = torch.tensor([[-1000.0, 0.0, 1.0, -1000.0]])
    uniforms = torch.tensor([0.0, 1 - 2**-24])  # the smallest and the largest number in [0, 1)
    drawn = sample_next_token(logits.expand(2, 4), None, uniforms, SamplingConfig(**PLAIN))
    assert drawn.tolist() == [1, 2]
    assert sample_next_token(logits, None, uniforms[:1], SamplingConfig(**PLAIN | {"temperature": 0})).tolist() == [2]


def test_the_numbers_of_a_row_depend_only_on_its_seed():
    seeds = row_seeds(7, 3)
    assert row_seeds(7, 5)[:3] == seeds
    assert len({*seeds, *row_seeds(8, 3)}) == 6
    numbers = uniform_numbers(seeds, 40)
    assert torch.equal(uniform_numbers(seeds[1:], 20), numbers[1:, :20])
    # the mean is 0.5 within four standard errors
    assert abs(uniform_numbers([1], 10_000).mean() - 0.5) < 4 / (12 * 10_000) ** 0.5


@pytest.mark.parametrize("changes", [{}, {"temperature": 0}, {"top_k": 3}, {"top_p": 0.5}, {"min_p": 0.1}], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_rows_whose_logits_are_not_finite_are_marked(changes, value):
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]]).repeat(3, 1)
    logits[1, 2] = value
    ids = sample_next_token(logits, None, torch.full((3,), 0.99), SamplingConfig(**PLAIN | changes)).tolist()
    assert ids[1] == NOT_FINITE
    assert 0 <= ids[0] == ids[2]


@pytest.mark.parametrize("temperature", [1e-10, 1e-38, 1e-45])
def test_a_tiny_temperature_selects_the_most_likely_token(temperature):
    logits, uniforms = torch.tensor([[-50.0, 80.0, 79.99, 80.01]]), torch.tensor([0.0])
    ids = sample_next_token(logits, None, uniforms, SamplingConfig(**PLAIN | {"temperature": temperature}))
    assert ids.tolist() == [3]
