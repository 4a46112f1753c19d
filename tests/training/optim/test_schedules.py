"""Learning-rate schedules, compared with nanoGPT's get_lr and with hand-computed values."""

import math

import pytest

from gptlab.training.config import ConstantConfig, CosineConfig, LinearConfig, WSDConfig
from gptlab.training.optim.schedules import learning_rate

LR, MIN_LR, W, D = 6e-4, 6e-5, 2000, 600_000
COSINE = CosineConfig(name="cosine", warmup_steps=W, decay_steps=D, min_lr_ratio=0.1)


def nanogpt(it: int) -> float:
    """Computes nanoGPT's learning rate: warm-up until W, cosine until D, then min_lr."""
    if it < W:
        return LR * (it + 1) / (W + 1)
    if it > D:
        return MIN_LR
    return MIN_LR + 0.5 * (1.0 + math.cos(math.pi * (it - W) / (D - W))) * (LR - MIN_LR)


@pytest.mark.parametrize("step", [0, 1, W - 1, W, W + 1, (W + D) // 2, D - 1, D, D + 1, 2 * D])
def test_cosine_matches_nanogpt(step):
    assert learning_rate(step, COSINE, lr=LR, max_steps=D) == pytest.approx(nanogpt(step), abs=1e-12, rel=0)


def test_cosine_has_hand_computed_values():
    at = {step: learning_rate(step, COSINE, lr=LR, max_steps=D) for step in (0, W, (W + D) // 2, D)}
    assert at[0] == pytest.approx(6e-4 / 2001, abs=1e-12)
    assert at[W] == pytest.approx(6e-4, abs=1e-12)
    assert at[(W + D) // 2] == pytest.approx(3.3e-4, abs=1e-12)
    assert at[D] == pytest.approx(6e-5, abs=1e-12)


def test_the_decay_ends_with_the_run_unless_decay_steps_is_set():
    schedule = COSINE.model_copy(update={"decay_steps": None})
    assert learning_rate(5000, schedule, lr=LR, max_steps=5000) == pytest.approx(MIN_LR, abs=1e-12)
    assert learning_rate(4999, schedule, lr=LR, max_steps=5000) > MIN_LR


def test_a_run_can_end_during_warm_up():
    schedule = COSINE.model_copy(update={"decay_steps": None})
    lrs = [learning_rate(step, schedule, lr=LR, max_steps=2) for step in range(3)]
    assert lrs == [nanogpt(0), nanogpt(1), nanogpt(2)]


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        # warm-up of 4 steps in fifths
        (ConstantConfig(name="constant", warmup_steps=4), {0: 0.2, 3: 0.8, 4: 1.0, 50: 1.0, 104: 1.0}),
        (
            LinearConfig(name="linear", warmup_steps=4, decay_steps=104, min_lr_ratio=0.5),
            {0: 0.2, 4: 1.0, 54: 0.75, 104: 0.5, 200: 0.5},
        ),
        (
            WSDConfig(name="wsd", warmup_steps=4, decay_fraction=0.2, min_lr_ratio=0.0),
            {0: 0.2, 4: 1.0, 79: 1.0, 80: 1.0, 90: 0.5, 95: 0.25, 100: 0.0, 101: 0.0},
        ),
        (
            WSDConfig(name="wsd", warmup_steps=4, decay_fraction=0.0, min_lr_ratio=0.0),
            {0: 0.2, 4: 1.0, 50: 1.0, 99: 1.0},
        ),
    ],
)
def test_other_schedules_have_hand_computed_values(schedule, expected):
    found = {step: learning_rate(step, schedule, lr=1.0, max_steps=100) for step in expected}
    assert found == pytest.approx(expected, abs=1e-12)
