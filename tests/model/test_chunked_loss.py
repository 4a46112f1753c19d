"""The chunked loss, compared with torch's cross-entropy of all logits."""

import pytest
import torch
import torch.nn.functional as F

from conftest import tiny_config
from gptlab.model.loss import LogitSettings, lm_loss, token_losses
from gptlab.model.modern import build_gpt

V, R, N, C = 53, 64, 41, 24  # vocabulary, rows of the head, tokens, channels


def tensors(dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(N, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    weight = torch.randn(R, C, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    targets = torch.randint(V, (N,), generator=generator)
    targets[::7] = -100
    return x, weight, targets


def by_torch(x: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, cap: float | None) -> torch.Tensor:
    logits = (x @ weight.T)[:, :V]
    return F.cross_entropy(logits if cap is None else cap * torch.tanh(logits / cap), targets)


@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("chunk", [1, 8, 40])
def test_the_chunked_loss_and_its_gradients_match_torch(chunk, cap):
    x, weight, targets = tensors(torch.float32)
    loss = lm_loss(x, weight, targets, LogitSettings(V, cap), chunk)
    (3 * loss).backward()
    exact_x, exact_weight, _ = tensors(torch.float64)
    exact = by_torch(exact_x, exact_weight, targets, cap)
    (3 * exact).backward()
    assert loss.item() == pytest.approx(exact.item(), rel=1e-6)
    torch.testing.assert_close(x.grad.double(), exact_x.grad, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(weight.grad.double(), exact_weight.grad, rtol=1e-5, atol=1e-6)
    assert not weight.grad[V:].any()  # no gradient of the padding


def test_in_bfloat16_the_chunked_loss_is_as_precise_as_the_unchunked_one():
    _, exact_weight, targets = tensors(torch.float64)
    errors = []
    for chunk in (None, 8):
        x, weight, _ = tensors(torch.float32)
        with torch.autocast("cpu", torch.bfloat16):
            loss = lm_loss(x, weight, targets, LogitSettings(V, None), chunk)
        loss.backward()
        exact_x, exact_weight, _ = tensors(torch.float64)
        exact = by_torch(exact_x, exact_weight, targets, None)
        exact.backward()
        assert loss.dtype == torch.float32
        assert loss.item() == pytest.approx(exact.item(), rel=3e-3)
        errors.append((weight.grad - exact_weight.grad).abs().max().item())
    assert errors[1] < 1.5 * errors[0]


def test_the_factor_of_gradient_accumulation_is_exact_in_bfloat16():
    _, weight, targets = tensors(torch.float32)
    gradients = []
    for micro_batches in (1, 12):  # 1/12 is 0.2 % too large in bfloat16
        x = tensors(torch.bfloat16)[0]
        (lm_loss(x, weight.detach(), targets, LogitSettings(V, None), 8) / micro_batches).backward()
        gradients.append(micro_batches * x.grad.double())
    ratio = gradients[1].norm() / gradients[0].norm()
    assert ratio.item() == pytest.approx(1, abs=2e-4)


@pytest.mark.parametrize("chunk", [None, 1, 8, 40])
def test_token_losses_match_torch_and_are_zero_where_not_scored(chunk):
    x, weight, targets = tensors(torch.float32)
    found = token_losses(x, weight, targets, LogitSettings(V, 3.0), chunk)
    logits = 3 * torch.tanh((x @ weight.T)[:, :V] / 3)
    torch.testing.assert_close(found, F.cross_entropy(logits, targets, reduction="none"), rtol=1e-6, atol=1e-6)
    assert (found == 0).equal(targets == -100)


def test_the_model_s_loss_is_the_cross_entropy_of_its_logits():
    torch.manual_seed(0)
    model = build_gpt(tiny_config(vocab_size=61, pad_vocab_to_multiple_of=64, logit_soft_cap=1.5)).double()
    idx, targets = torch.randint(61, (2, 3, 16)).unbind()
    expected = F.cross_entropy(model(idx).flatten(0, 1), targets.flatten())
    for chunk in (None, 10):
        torch.testing.assert_close(model.loss(idx, targets, None, chunk).double(), expected, rtol=1e-6, atol=0)
        found = model.token_losses(idx, targets, None, chunk)
        assert found.shape == targets.shape
        torch.testing.assert_close(found.mean().double(), expected, rtol=1e-6, atol=0)
