"""Bits per byte from the manifest, from the evaluation, and computed directly from the source files."""

import math

import numpy as np
import pytest
import tokenizers
import torch
import torch.nn.functional as F

from gptlab.data.batches import EvaluationBatches, RankSlice
from gptlab.data.order import evaluation_starts
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.evaluation.loss import LossSums
from preparing import is_in_val, prepare_text, tiktoken_gpt2

TEXTS = {
    f"{n:02d}.txt": f"Document {n}: naïve 👍🏽 世界。\n" * (n % 5) + "the cat and the dog. " * n for n in range(30)
}
BY_DOCUMENTS = {"val_split": "documents", "val_fraction": 0.4}


@pytest.fixture(params=["gpt2", "bytes", "bpe"])
def prepared(request, tmp_path) -> TokenDataset:
    (tmp_path / "source").mkdir()
    for name, text in TEXTS.items():
        (tmp_path / "source" / name).write_bytes(text.encode())
    sizes = {"vocab_size": 300, "train_mb": 1} if request.param == "bpe" else {}
    return prepare_text(tmp_path / "source", request.param, **sizes, **BY_DOCUMENTS)


def model_of(vocab_size: int) -> torch.Tensor:
    """Returns logits (7, V), indexed by the previous token ID modulo 7, with losses that are exact in float32.

    One token has e**40 times the probability of any other, so the loss of another token is the difference of logits.
    """
    generator = torch.Generator().manual_seed(0)
    logits = -torch.randint(40, 91, (7, vocab_size), generator=generator).double()
    logits[range(7), torch.randint(0, vocab_size, (7,), generator=generator)] = 0
    return logits


def nats_of(ids: list[int], end: int) -> list[float]:
    """Returns the loss in nats of each token, in float64. The first one follows an end-of-text token."""
    nats = -model_of(end + 1).log_softmax(-1)
    return nats[torch.tensor([end, *ids[:-1]]) % 7, torch.tensor(ids)].tolist()


def ids_from_files(prepared: TokenDataset) -> tuple[list[int], int]:
    """Returns the token IDs of val, encoded with the libraries of the tokenizers, and the bytes of the text."""
    record, end = prepared.manifest.tokenizer, prepared.manifest.vocab_size - 1
    ids, size = [], 0
    for path in sorted((prepared.folder.parents[1] / "source").iterdir()):
        content = path.read_bytes()
        if not content or not is_in_val(path.name, BY_DOCUMENTS["val_fraction"]):
            continue
        if record["name"] == "gpt2":
            encoded = tiktoken_gpt2().encode_ordinary(content.decode())
        elif record["name"] == "bytes":
            encoded = list(content)
        else:
            encoded = tokenizers.Tokenizer.from_str(record["trained"]).encode(content.decode()).ids
        ids, size = [*ids, *encoded, end], size + len(content)
    return ids, size


def test_bits_per_byte_agree_between_files_manifest_and_evaluation(prepared):
    manifest, stream = prepared.manifest, prepared.stream("val")
    end = manifest.vocab_size - 1

    # from the files, without end-of-text tokens
    ids, size = ids_from_files(prepared)
    assert len(ids) > 1000
    assert ids.count(end) > 5
    nats = nats_of(ids, end)
    text_nats = [nat for nat, token in zip(nats, ids, strict=True) if token != end]
    assert 50 < np.mean(text_nats) < 80
    directly = math.fsum(text_nats) / math.log(2) / size

    # from the manifest: losses of the tokens in the shards
    row = stream.read([0], len(stream))[0].tolist()
    on_disk = np.array(nats_of(row, end))
    by_manifest = on_disk[np.array(row) != end].sum() / (math.log(2) * manifest.bytes("val"))
    assert by_manifest == pytest.approx(directly, rel=1e-9)

    # from the evaluation in windows of one token, which score all tokens except the first
    batches = EvaluationBatches(stream, evaluation_starts(len(stream), 1, None), 1, RankSlice(0, 1, 100))
    model, sums = model_of(end + 1), LossSums(torch.from_numpy(prepared.tokenizer.token_bytes()))
    for number in range(len(batches)):
        batch = batches[number]
        logits = model[batch.idx % 7]
        sums.add(F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), reduction="none"), batch.targets)
    _, tokens, some_nats, some_bytes = sums.sums.tolist()
    first = len(prepared.tokenizer.decode(row[:1]).encode())
    assert tokens == len(row) - 1
    assert some_bytes + first == manifest.bytes("val") == size
    assert sums.result()[1] == pytest.approx(math.fsum(text_nats[1:]) / math.log(2) / (size - first), rel=1e-9)
    assert (some_nats + nats[0]) / math.log(2) / (some_bytes + first) == pytest.approx(by_manifest, rel=1e-9)


def test_bytes_in_the_manifest_are_the_file_sizes_for_every_tokenizer(prepared):
    in_val = {name for name in TEXTS if is_in_val(name, BY_DOCUMENTS["val_fraction"])}
    sizes = {name: len(text.encode()) for name, text in TEXTS.items()}
    assert prepared.manifest.bytes("val") == sum(sizes[name] for name in in_val)
    assert prepared.manifest.bytes("train") == sum(sizes[name] for name in set(TEXTS) - in_val)
