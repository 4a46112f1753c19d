"""What is told of prepared data, against counts by hand."""

import numpy as np
import pytest

from gptlab.data.batch_size_schedule import BatchSizeSchedule
from gptlab.data.order import WindowOrder
from gptlab.data.shards import inspection
from gptlab.data.shards.formats import build_manifest
from gptlab.data.shards.inspection import batch_texts, first_documents, longest_document
from gptlab.data.shards.streams import LocalFolder
from gptlab.data.shards.token_dataset import TokenDataset, verify_shards
from gptlab.data.tokenizers.tokenizer import BytesTokenizer
from gptlab.errors import UserError

DOCUMENTS = ["short", "the longest document of them all", "", "middling text"]


@pytest.fixture
def prepared(tmp_path) -> TokenDataset:
    ids = [i for text in DOCUMENTS for i in (*text.encode(), 256)]
    for split in ("train", "val"):
        (tmp_path / f"{split}.bin").write_bytes(np.array(ids, dtype="<u2").tobytes())
    manifest = build_manifest([tmp_path / "train.bin", tmp_path / "val.bin"], BytesTokenizer())
    return TokenDataset(LocalFolder(tmp_path), manifest, BytesTokenizer())


@pytest.mark.parametrize("chunk", [1, 7, 33, 10**6])
def test_the_longest_document_wherever_the_chunks_are_cut(prepared, monkeypatch, chunk):
    monkeypatch.setattr(inspection, "CHUNK", chunk)
    stream = prepared.stream("train")
    assert longest_document(stream, 256) == len(DOCUMENTS[1])
    assert longest_document(stream, None) == len(stream)


def test_first_documents_are_decoded_and_cut(prepared):
    assert first_documents(prepared, "train", documents=2, tokens=11) == ["short", "the longest"]
    assert first_documents(prepared, "val", documents=9, tokens=99) == [text for text in DOCUMENTS if text]


@pytest.mark.parametrize("place", [0, 10, -1])
def test_one_flipped_bit_is_found_and_its_shard_named(prepared, place):
    assert verify_shards(prepared.store, prepared.manifest.shards()) == 2
    path = prepared.folder / "val.bin"
    content = bytearray(path.read_bytes())
    content[place] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"val\.bin is not what was written"):
        verify_shards(prepared.store, prepared.manifest.shards())


def test_the_batch_of_a_step_is_what_the_order_says(prepared):
    order = WindowOrder([prepared.manifest.tokens("train")], 4, 1, "data", "shuffled", 1, None)
    ids = prepared.stream("train").read([0], prepared.manifest.tokens("train"))[0]
    starts = order.starts(np.arange(6, 9))  # step 3 of batches of three
    expected = [(int(start), BytesTokenizer().decode(ids[start : start + 5].tolist())) for start in starts]
    assert batch_texts(prepared, order, step=3, stages=BatchSizeSchedule(3)) == expected
