"""Loss functions for ``loss._target_``, compared with their formulas in float64."""

import pytest
import torch

from gptlab.model.losses import smoothed_cross_entropy, z_loss

LOGITS = 3 * torch.randn(50, 13, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
TARGETS = torch.randint(13, (50,), generator=torch.Generator().manual_seed(1))
TARGETS[::7] = -100
SCORED = [(row, int(target)) for row, target in enumerate(TARGETS) if target != -100]


def log_z(row: int) -> torch.Tensor:
    return LOGITS[row].exp().sum().log()


@pytest.mark.parametrize("coefficient", [0.0, 1e-4, 0.3])
def test_z_loss_is_cross_entropy_plus_the_mean_square_of_log_z(coefficient):
    terms = [log_z(row) - LOGITS[row, target] + coefficient * log_z(row) ** 2 for row, target in SCORED]
    expected = torch.stack(terms).mean()
    torch.testing.assert_close(z_loss(LOGITS, TARGETS, coefficient=coefficient), expected, atol=1e-12, rtol=0)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 1.0])
def test_smoothed_cross_entropy_mixes_the_target_with_the_uniform_distribution(smoothing):
    terms = []
    for row, target in SCORED:
        q = torch.full((13,), smoothing / 13, dtype=torch.float64)
        q[target] += 1 - smoothing
        terms.append((q * (log_z(row) - LOGITS[row])).sum())
    found = smoothed_cross_entropy(LOGITS, TARGETS, smoothing=smoothing)
    torch.testing.assert_close(found, torch.stack(terms).mean(), atol=1e-12, rtol=0)


def test_logits_that_are_not_scored_get_no_gradient():
    logits = LOGITS.clone().requires_grad_()
    z_loss(logits, TARGETS, coefficient=0.1).backward()
    assert torch.equal(logits.grad[::7], torch.zeros_like(logits.grad[::7]))
    assert (logits.grad[1:7] != 0).all()
