"""Attention with masked documents, compared with each document alone."""

import pytest
import torch
from torch.nn.attention.flex_attention import BlockMask

from conftest import tiny_config
from gptlab.model.attention import attention_mask, positions_within
from gptlab.model.gpt import GPT
from gptlab.model.kernels import attend

DOCUMENTS = torch.tensor([[0] * 5 + [1] * 1 + [2] * 7 + [3] * 3, [4] * 16])  # (B, T)


def alone(documents: torch.Tensor) -> list[tuple[int, slice]]:
    """Returns the row and the slice of every document."""
    found = []
    for row, numbers in enumerate(documents.tolist()):
        for number in sorted(set(numbers)):
            first = numbers.index(number)
            found.append((row, slice(first, first + numbers.count(number))))
    return found


def test_positions_start_at_zero_in_each_document():
    assert positions_within(DOCUMENTS).tolist() == [[*range(5), *range(1), *range(7), *range(3)], [*range(16)]]


@pytest.mark.parametrize("options", [{}, {"activation_checkpointing": True}, {"bias": False}])
def test_logits_and_gradients_of_packed_documents_equal_those_of_separate_documents(options):
    torch.manual_seed(0)
    model = GPT(tiny_config(**options)).double()
    idx = torch.randint(61, DOCUMENTS.shape)
    together = model(idx, DOCUMENTS)
    together.square().sum().backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    for row, place in alone(DOCUMENTS):
        logits = model(idx[row : row + 1, place])
        torch.testing.assert_close(together[row, place], logits[0], rtol=0, atol=1e-12)
        logits.square().sum().backward()
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(together, model(idx), atol=1e-3)  # without the mask the logits differ


def test_a_single_document_equals_no_documents():
    model = GPT(tiny_config()).double()
    idx = torch.randint(61, (3, 16))
    torch.testing.assert_close(model(idx, torch.full_like(idx, 7)), model(idx), rtol=0, atol=1e-12)


def test_flex_attention_agrees_with_sdpa():
    """Tests the mask only, because FlexAttention has no backward pass on the CPU."""
    torch.manual_seed(0)
    documents = (torch.rand(2, 256) < 0.02).cumsum(dim=1)
    flex, plain = (attention_mask(documents, documents, None, flex=flex) for flex in (True, False))
    assert isinstance(flex, BlockMask)
    q, k, v = torch.randn(3, 2, 3, 256, 16).unbind()
    torch.testing.assert_close(attend(q, k, v, flex, 0.0), attend(q, k, v, plain, 0.0), rtol=1e-4, atol=1e-5)
