import math

import numpy as np
import pytest
import torch

from gptlab.evaluation.loss import LossSums
from gptlab.model.loss import LogitSettings, token_losses

# Five ids: one, two, three and four bytes of text, and the end of text.
TOKEN_BYTES = torch.tensor([1, 2, 3, 4, 0], dtype=torch.uint8)


def by_hand(logits: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Loss and bits per byte in float64, token by token."""
    nats, tokens, text_nats, text_bytes = 0.0, 0, 0.0, 0
    for row, target in zip(logits.reshape(-1, logits.shape[-1]).astype(np.float64), targets.flatten(), strict=True):
        if target == -100:
            continue
        surprise = math.log(sum(math.exp(logit) for logit in row)) - row[target]
        nats, tokens = nats + surprise, tokens + 1
        if target != 4:
            text_nats, text_bytes = text_nats + surprise, text_bytes + (1, 2, 3, 4)[target]
    return nats / tokens, text_nats / math.log(2) / text_bytes


def nats_of(logits: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Losses (B, T) of logits (B, T, V), which a head of ones and zeros lets through."""
    vocab_size = logits.size(-1)
    unit = torch.eye(vocab_size, dtype=logits.dtype)
    settings = LogitSettings(vocab_size, None)
    return token_losses(logits.flatten(0, 1), unit, targets.flatten(), settings, None).view_as(targets)


def add(sums: LossSums, logits: torch.Tensor, targets: torch.Tensor) -> None:
    sums.add(nats_of(logits, targets), targets)


@pytest.fixture
def scored():
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(6, 9, 5, generator=generator)
    targets = torch.randint(0, 5, (6, 9), generator=generator)
    targets[torch.rand(6, 9, generator=generator) < 0.2] = -100
    assert {-100, 4} < set(targets.flatten().tolist())
    return logits, targets


def test_loss_and_bits_per_byte_of_probabilities_that_are_powers_of_two():
    logits = torch.log(torch.tensor([1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 16])).expand(1, 4, 5)
    sums = LossSums(TOKEN_BYTES)
    add(sums, logits, torch.tensor([[0, 1, 4, -100]]))  # 1, 2 and 4 bits; the 4 stand for no text
    loss, bits_per_byte = sums.result()
    assert loss == pytest.approx((1 + 2 + 4) / 3 * math.log(2), rel=1e-6)
    assert bits_per_byte == pytest.approx((1 + 2) / (1 + 2), rel=1e-6)


def test_loss_and_bits_per_byte_equal_float64_by_hand(scored):
    logits, targets = scored
    sums = LossSums(TOKEN_BYTES)
    add(sums, logits, targets)
    assert sums.result() == pytest.approx(by_hand(logits.numpy(), targets.numpy()), rel=1e-6)


def test_half_precision_logits_are_summed_in_float32(scored):
    logits, targets = scored
    sums = LossSums(TOKEN_BYTES)
    add(sums, logits.bfloat16(), targets)
    rounded = logits.bfloat16().double().numpy()
    assert sums.result() == pytest.approx(by_hand(rounded, targets.numpy()), rel=1e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (2, 4), (5, 1), (3, 3)])
def test_sums_add_up_over_any_split_into_batches_and_devices(scored, sizes):
    logits, targets = scored
    whole = LossSums(TOKEN_BYTES)
    add(whole, logits, targets)
    devices = [LossSums(TOKEN_BYTES), LossSums(TOKEN_BYTES)]
    for number, (some, following) in enumerate(zip(logits.split(sizes), targets.split(sizes), strict=True)):
        add(devices[number % 2], some, following)
    total = devices[0].sums + devices[1].sums
    torch.testing.assert_close(total, whole.sums, rtol=1e-12, atol=0)
    assert total[1] == (targets >= 0).sum()
    assert total[3] == sum((1, 2, 3, 4, 0)[target] for target in targets.flatten().tolist() if target >= 0)


def test_many_small_additions_lose_nothing_to_rounding():
    logits = torch.log(torch.tensor([0.7, 0.1, 0.1, 0.05, 0.05])).expand(1, 50, 5)
    sums = LossSums(TOKEN_BYTES)
    sums.sums[:] = torch.tensor([1e9, 1e9, 1e9, 1e9])  # in float32 the next additions would be below its precision
    for _ in range(100):
        add(sums, logits, torch.zeros(1, 50, dtype=torch.long))
    assert (sums.sums[0] - 1e9).item() == pytest.approx(-5000 * math.log(0.7), rel=1e-6)
    assert (sums.sums[1] - 1e9).item() == 5000


def test_where_nothing_is_scored_the_result_is_nan():
    sums = LossSums(TOKEN_BYTES)
    assert all(math.isnan(value) for value in sums.result())
    add(sums, torch.zeros(1, 3, 5), torch.full((1, 3), -100))
    assert all(math.isnan(value) for value in sums.result())
    add(sums, torch.zeros(1, 1, 5), torch.tensor([[4]]))  # a special token alone has a loss but no bytes
    loss, bits_per_byte = sums.result()
    assert loss == pytest.approx(math.log(5), rel=1e-6)
    assert math.isnan(bits_per_byte)
