"""HellaSwag: reading and writing its files, and the accuracy of a model with known probabilities."""

import json
import math

import numpy as np
import pytest
import torch

from gptlab.data.tokenizers.tokenizer import BytesTokenizer, CharactersTokenizer, load_tokenizer
from gptlab.errors import UserError
from gptlab.evaluation.completions import AccuracyCounts, EndingLoss, count_correct, ending_losses, rank_batches
from gptlab.evaluation.hellaswag import Example, read_examples, write_bin

LINE = {
    "ind": 24,
    "activity_label": "Roof shingle removal",
    "ctx_a": "A man is sitting on a roof.",
    "ctx_b": "he",
    "ctx": "A man is sitting on a roof. he",
    "label": 3,
    "endings": ["wraps skis.", "rips tiles.", "holds a cube.", "pulls up roofing."],
}
# arbitrary token IDs of GPT-2
EXAMPLES = [
    Example([15, 27, 300], [[7], [8, 9], [10, 11, 12], [50256, 1]], 2),
    Example([65534 % 50257, 2], [[1, 1, 1, 1], [2], [3, 4], [5]], 1),
]


def write_reference(path, examples):
    """Writes llm.c's layout value by value."""
    header = np.zeros(256, dtype="<i4")
    stream: list[int] = []
    longest = 0
    for number, example in enumerate(examples):
        record = [65535, 0, number, example.label, 4, len(example.context), *example.context]
        for ending in example.endings:
            record += [len(ending), *ending]
        record[1] = 2 * len(record)
        longest = max(longest, record[1])
        stream += record
    header[:4] = 20240522, 1, len(examples), longest
    path.write_bytes(header.tobytes() + np.array(stream, dtype="<u2").tobytes())


def test_llmc_file_is_read_and_written(tmp_path):
    write_reference(tmp_path / "theirs.bin", EXAMPLES)
    gpt2 = load_tokenizer({"name": "gpt2"}, None)
    assert read_examples(tmp_path / "theirs.bin", gpt2, None) == EXAMPLES
    assert read_examples(tmp_path / "theirs.bin", gpt2, 1) == EXAMPLES[:1]
    write_bin(tmp_path / "ours.bin", EXAMPLES)
    assert (tmp_path / "ours.bin").read_bytes() == (tmp_path / "theirs.bin").read_bytes()


def test_jsonl_lines_are_encoded_as_in_llmc(tmp_path):
    path = tmp_path / "hellaswag_val.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in (LINE, LINE | {"label": "1"})) + "\n")
    first, second = read_examples(path, BytesTokenizer(), None)
    assert bytes(first.context) == b"A man is sitting on a roof. he"
    assert [bytes(ending) for ending in first.endings] == [f" {ending}".encode() for ending in LINE["endings"]]
    assert (first.label, second.label) == (3, 1)
    assert len(read_examples(path, BytesTokenizer(), 1)) == 1
    # token IDs of "The quick" and " brown fox" from tiktoken's documentation
    path.write_text(json.dumps({"ctx": "The quick", "endings": ["brown fox", "jumps"], "label": 0}))
    (example,) = read_examples(path, load_tokenizer({"name": "gpt2"}, None), None)
    assert example == Example([464, 2068], [[7586, 21831], [18045]], 0)


def damaged(path, place: int, value: int) -> None:
    write_reference(path, EXAMPLES)
    stream = np.fromfile(path, dtype="<u2")
    stream[512 + place] = value
    stream.tofile(path)


@pytest.mark.parametrize("place", [0, 1, 3, 4, 5, 9, 22])
def test_damaged_record_is_reported(tmp_path, place):
    damaged(tmp_path / "x.bin", place, 999)
    with pytest.raises(UserError, match=r"x\.bin: the record of example [01] .* is damaged.*hellaswag_val"):
        read_examples(tmp_path / "x.bin", load_tokenizer({"name": "gpt2"}, None), None)


def test_invalid_hellaswag_file_is_reported(tmp_path):
    gpt2, path = load_tokenizer({"name": "gpt2"}, None), tmp_path / "x"
    with pytest.raises(UserError, match="no such file"):
        read_examples(path, gpt2, None)
    write_reference(path, EXAMPLES)
    with pytest.raises(UserError, match=r"holds tokens of tokenizer=gpt2, but .* tokenizer=bytes"):
        read_examples(path, BytesTokenizer(), None)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(UserError, match="the record of example 1"):
        read_examples(path, gpt2, None)
    for wrong in ({"label": 4}, {"label": -1}, {"label": None}, {"endings": "abcd"}, {"endings": [1, 2]}, {"ctx": ""}):
        path.write_text(json.dumps(LINE) + "\n" + json.dumps(LINE | wrong))
        with pytest.raises(UserError, match="line 2 has no valid ctx, endings and label"):
            read_examples(path, gpt2, None)
    path.write_text("")
    with pytest.raises(UserError, match="contains no examples"):
        read_examples(path, gpt2, None)
    path.write_text(json.dumps(LINE))
    with pytest.raises(UserError, match="The character 'A' is not in the vocabulary"):
        read_examples(path, CharactersTokenizer("ab"), None)
    with pytest.raises(UserError, match=r"example 0 has 3 endings, but llm\.c requires 4"):
        write_bin(path, [EXAMPLES[0]._replace(endings=[[1], [2], [3]])])
    with pytest.raises(UserError, match="example 0 does not fit"):
        write_bin(path, [EXAMPLES[0]._replace(context=[65535])])
    with pytest.raises(UserError, match="example 0 does not fit"):
        write_bin(path, [EXAMPLES[0]._replace(context=[1] * 40_000)])


class Bigrams:
    """Bigram model with three tokens, which records the widths of its inputs."""

    probabilities = torch.tensor([[1 / 2, 1 / 4, 1 / 4], [1 / 8, 3 / 4, 1 / 8], [1 / 16, 1 / 16, 7 / 8]])

    def __init__(self) -> None:
        self.widths: list[int] = []

    def token_losses(self, idx, targets, documents, chunk):
        self.widths.append(idx.size(1))
        nats = -self.probabilities[idx, targets.clamp(min=0)].log()
        return torch.where(targets < 0, 0, nats)


def losses_of(examples, block_size=100, model=None):
    return ending_losses(model or Bigrams(), examples, block_size=block_size, device=torch.device("cpu"), chunk=None)


# Probabilities after token 0: [1] 1/4; [0, 0] 1/4, 1/2 per token; [2, 2, 2] 1/4 · 49/64; [1, 0] 1/32.
KNOWN = Example([2, 0], [[1], [0, 0], [2, 2, 2], [1, 0]], 2)


def test_losses_of_endings_match_known_probabilities():
    (endings,) = losses_of([KNOWN])
    assert [loss.tokens for loss in endings] == [1, 2, 3, 2]
    expected = [-math.log(chance) for chance in (1 / 4, 1 / 4, 1 / 4 * 49 / 64, 1 / 32)]
    assert [loss.nats for loss in endings] == pytest.approx(expected, rel=1e-6)


def test_acc_and_acc_norm_where_they_differ():
    # sums: the first two endings are equally probable, so the first is the answer; means: 1.386, 0.693, 0.551, 1.733
    for label, by_sum, by_mean in ((0, 1, 0), (1, 0, 0), (2, 0, 1), (3, 0, 0)):
        assert count_correct(losses_of([KNOWN]), [label]) == AccuracyCounts(by_sum, by_mean, 1)
    found = count_correct(losses_of([KNOWN] * 5), [0, 2, 2, 2, 1])
    assert (found.acc, found.acc_norm) == (1 / 5, 3 / 5)
    assert count_correct([[EndingLoss(4.0, 4), EndingLoss(3.0, 1)]], [1]) == AccuracyCounts(1, 0, 1)


def test_long_examples_are_truncated_on_the_left():
    model = Bigrams()
    (endings,) = losses_of([Example([1, 1, 1, 0], [[2, 2, 2], [1, 1]], 0)], block_size=3, model=model)
    assert model.widths == [3]
    assert [loss.tokens for loss in endings] == [3, 2]  # inputs 0 2 2 2 and 1 0 1 1
    assert [loss.nats for loss in endings] == pytest.approx(
        [-math.log(1 / 4 * 49 / 64), -math.log(1 / 4 * 3 / 4)], rel=1e-6
    )
    (endings,) = losses_of([Example([1], [[2, 2, 0, 0, 1]], 0)], block_size=2)
    assert endings[0].tokens == 2  # input 0 0 1, without any token of the context
    assert endings[0].nats == pytest.approx(-math.log(1 / 2 * 1 / 4), rel=1e-6)


def test_rank_batches_contain_every_example_once():
    generator = np.random.default_rng(0)
    examples = [Example([0] * int(generator.integers(1, 9)), [[1, number], [2], [0], [1]], 0) for number in range(11)]
    for ranks in (1, 2, 3, 5, 11):
        for batch_size in (1, 2, 4, 20):
            shares = [rank_batches(examples, rank, ranks, batch_size) for rank in range(ranks)]
            assert len({len(batches) for batches in shares}) == 1
            dealt = [example for batches in shares for batch in batches for example in batch]
            assert sorted(dealt) == sorted(examples)
            assert max(len(batch) for batches in shares for batch in batches) <= batch_size
