"""Loss and bits per byte of batches and of a whole split, compared with direct computation in float64."""

import math

import numpy as np
import pytest
import torch

from conftest import tiny_config
from gptlab.data.batches import EvaluationBatches, RankSlice
from gptlab.data.order import evaluation_starts
from gptlab.evaluation.loss import LossSums, WindowBatches, accumulate_losses, cut_windows
from gptlab.model.gpt import GPT
from gptlab.model.loss import LogitSettings, token_losses
from preparing import prepare_text

# Five tokens: one, two, three and four bytes of text, and the end-of-text token.
TOKEN_BYTES = torch.tensor([1, 2, 3, 4, 0], dtype=torch.uint8)


def expected_result(logits: np.ndarray, targets: np.ndarray) -> tuple[float, float]:
    """Returns the loss and bits per byte, computed token by token in float64."""
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
    """Returns the losses (B, T) of logits (B, T, V), using an identity matrix as the head."""
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
    add(sums, logits, torch.tensor([[0, 1, 4, -100]]))  # 1, 2 and 4 bits; the last for the end-of-text token
    loss, bits_per_byte = sums.result()
    assert loss == pytest.approx((1 + 2 + 4) / 3 * math.log(2), rel=1e-6)
    assert bits_per_byte == pytest.approx((1 + 2) / (1 + 2), rel=1e-6)


def test_loss_and_bits_per_byte_match_float64(scored):
    logits, targets = scored
    sums = LossSums(TOKEN_BYTES)
    add(sums, logits, targets)
    assert sums.result() == pytest.approx(expected_result(logits.numpy(), targets.numpy()), rel=1e-6)


def test_bfloat16_logits_are_summed_in_float32(scored):
    logits, targets = scored
    sums = LossSums(TOKEN_BYTES)
    add(sums, logits.bfloat16(), targets)
    rounded = logits.bfloat16().double().numpy()
    assert sums.result() == pytest.approx(expected_result(rounded, targets.numpy()), rel=1e-6)


@pytest.mark.parametrize("sizes", [(1, 1, 1, 1, 1, 1), (2, 4), (5, 1), (3, 3)])
def test_sums_do_not_depend_on_batches_and_devices(scored, sizes):
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


def test_many_small_additions_are_not_lost_to_rounding():
    logits = torch.log(torch.tensor([0.7, 0.1, 0.1, 0.05, 0.05])).expand(1, 50, 5)
    sums = LossSums(TOKEN_BYTES)
    sums.sums[:] = torch.tensor([1e9, 1e9, 1e9, 1e9])  # the next additions would be lost in float32
    for _ in range(100):
        add(sums, logits, torch.zeros(1, 50, dtype=torch.long))
    assert (sums.sums[0] - 1e9).item() == pytest.approx(-5000 * math.log(0.7), rel=1e-6)
    assert (sums.sums[1] - 1e9).item() == 5000


def test_result_without_scored_tokens_is_nan():
    sums = LossSums(TOKEN_BYTES)
    assert all(math.isnan(value) for value in sums.result())
    add(sums, torch.zeros(1, 3, 5), torch.full((1, 3), -100))
    assert all(math.isnan(value) for value in sums.result())
    add(sums, torch.zeros(1, 1, 5), torch.tensor([[4]]))  # a special token has a loss but no bytes
    loss, bits_per_byte = sums.result()
    assert loss == pytest.approx(math.log(5), rel=1e-6)
    assert math.isnan(bits_per_byte)


BLOCK = 16  # block size of the tiny model
END = 256  # end-of-text token of the bytes tokenizer


@pytest.fixture(scope="module")
def model() -> GPT:
    torch.manual_seed(0)
    model = GPT(tiny_config(vocab_size=257)).double().eval()
    for parameter in model.parameters():  # far from uniform, so that the context has an effect
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus") / "texts"
    folder.mkdir()
    for number in range(9):
        (folder / f"{number}.txt").write_text(f"däs ist {number * 'Text '}und {number}³ = {number**3}.\n")
    return prepare_text(folder, val_fraction=0.9)


@pytest.fixture(scope="module")
def tokens(prepared) -> list[int]:
    stream = prepared.stream("val")
    return stream.read([0], len(stream))[0].tolist()


def sums_of(model, prepared, *, stride=BLOCK, limit=None, batch_size=3, eot_id=None, ranks=1) -> torch.Tensor:
    """Returns the sums over all processes of an evaluation."""
    stream = prepared.stream("val")
    windows = cut_windows(len(stream), BLOCK, stride, limit)
    total = torch.zeros(4, dtype=torch.float64)
    for rank in range(ranks):
        sums = LossSums(torch.from_numpy(prepared.tokenizer.token_bytes()))
        accumulate_losses(
            sums, model, WindowBatches(stream, windows, BLOCK, batch_size, eot_id, rank, ranks), chunk=None
        )
        total += sums.sums
    return total


@torch.no_grad()
def loss_of_token(model: GPT, context: list[int], token: int) -> float:
    """Returns the loss in nats of one token after its context, in float64."""
    logits = model(torch.tensor([context]))[0, -1].numpy()
    return float(np.log(np.exp(logits - logits.max()).sum()) + logits.max() - logits[token])


def naive(model: GPT, tokens: list[int], stride: int, *, masked: bool = False) -> list[float]:
    """Returns the loss in nats of every token except the first, with the context of the first window that has it."""
    nats = []
    for position in range(1, len(tokens)):
        begin = 0
        while begin + BLOCK < position:
            begin += stride
        context = tokens[begin:position]
        if masked:
            ends = [number for number, token in enumerate(context) if token == END]
            context = context[ends[-1] :] if ends else context
        nats.append(loss_of_token(model, context, tokens[position]))
    return nats


def test_cut_windows_matches_known_values():
    windows = cut_windows(12, 4, 2, None)  # predicts tokens 1 to 11
    assert windows.begins.tolist() == [0, 2, 4, 6, 8]
    assert windows.lengths.tolist() == [4, 4, 4, 4, 3]
    assert windows.scored.tolist() == [4, 2, 2, 2, 1]
    assert [part.tolist() for part in cut_windows(10, 4, 4, None)] == [[0, 4, 8], [4, 4, 1], [4, 4, 1]]
    assert [part.tolist() for part in cut_windows(3, 4, 1, None)] == [[0], [2], [2]]
    assert cut_windows(45, 4, 4, 3).begins.tolist() == [0, 12, 28]  # of 11 full windows, as in evaluation_starts
    with pytest.raises(ValueError, match="has 1 token, but at least two"):
        cut_windows(1, 4, 4, None)


@pytest.mark.parametrize("stride", [1, 3, 5, 8])
def test_every_token_is_scored_once_with_enough_context(stride):
    for tokens in range(2, 40):
        windows = cut_windows(tokens, 8, stride, None)
        scored = []
        for begin, length, count in zip(*windows, strict=True):
            targets = range(begin + 1, begin + length + 1)
            scored += targets[length - count :]
            assert begin == 0 or length - count == 8 - stride
        assert scored == list(range(1, tokens))


@pytest.mark.parametrize("stride", [BLOCK, 5, 1])
def test_loss_of_a_split_matches_one_token_at_a_time(model, prepared, tokens, stride):
    nats = naive(model, tokens, stride)
    assert (len(tokens) - 1) % BLOCK  # the last window is shorter
    sums = sums_of(model, prepared, stride=stride)
    assert sums[1] == len(tokens) - 1
    assert sums[0].item() == pytest.approx(math.fsum(nats), rel=1e-6)


def test_bits_per_byte_exclude_end_of_text_tokens(model, prepared, tokens):
    nats = naive(model, tokens, BLOCK)
    text = [(n, token) for n, token in zip(nats, tokens[1:], strict=True) if token != END]
    assert 0 < len(text) < len(nats)
    sums = LossSums(torch.from_numpy(prepared.tokenizer.token_bytes()))
    sums.sums = sums_of(model, prepared)
    expected = math.fsum(n for n, _ in text) / math.log(2) / len(bytes(token for _, token in text))
    assert sums.result()[1] == pytest.approx(expected, rel=1e-6)


def test_masked_documents_are_scored_separately(model, prepared, tokens):
    nats = naive(model, tokens, 5, masked=True)
    assert math.fsum(nats) != pytest.approx(math.fsum(naive(model, tokens, 5)), rel=1e-4)
    sums = sums_of(model, prepared, stride=5, eot_id=END)
    assert sums[0].item() == pytest.approx(math.fsum(nats), rel=1e-6)


def test_evaluation_does_not_depend_on_ranks_and_batch_size(model, prepared):
    alone = sums_of(model, prepared, stride=7)
    for ranks in (2, 3, 7):
        torch.testing.assert_close(sums_of(model, prepared, stride=7, ranks=ranks), alone, rtol=1e-12, atol=0)
    for batch_size in (1, 4, 100):
        other = sums_of(model, prepared, stride=7, batch_size=batch_size)
        torch.testing.assert_close(other, alone, rtol=1e-7, atol=0)  # losses are rounded to float32


@torch.no_grad()
def sums_in_training(model, prepared, windows: int, world_size: int, micro_batch_size: int) -> torch.Tensor:
    """Returns the sums over all ranks of an evaluation during training."""
    stream = prepared.stream("val")
    starts = evaluation_starts(len(stream), BLOCK, windows)
    sums = LossSums(torch.from_numpy(prepared.tokenizer.token_bytes()))
    for rank in range(world_size):
        batches = EvaluationBatches(stream, starts, BLOCK, RankSlice(rank, world_size, micro_batch_size))
        for number in range(len(batches)):
            idx, targets, _ = batches[number]
            sums.add(model.token_losses(idx, targets, None, None), targets)
    return sums.sums


@pytest.mark.parametrize("world_size", range(1, 9))
@pytest.mark.parametrize("micro_batch_size", [1, 2, 3])
def test_validation_in_training_does_not_depend_on_ranks_and_micro_batches(
    model, prepared, world_size, micro_batch_size
):
    for windows in range(1, 10):
        expected = sums_in_training(model, prepared, windows, 1, windows)
        assert expected[1] == windows * BLOCK
        found = sums_in_training(model, prepared, windows, world_size, micro_batch_size)
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
