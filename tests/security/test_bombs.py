"""Small files that expand to any size are refused before memory is spent."""

import codecs
import contextlib
import copy
import gzip
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
import zstandard
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.checkpoint import FileSystemReader, FileSystemWriter, load, save
from torch.distributed.checkpoint.api import CheckpointException

from conftest import TINY
from gptlab.data.shards.formats import read_layout
from gptlab.data.sources.corpora import open_corpus
from gptlab.data.tokenizers.external import read_json, tokenizer_record
from gptlab.errors import UserError
from gptlab.model.config import GPTConfig
from gptlab.pretrained.source import open_model_source
from gptlab.training.checkpoints.reading import read_plain, read_state
from gptlab.training.checkpoints.records import CheckpointMetadata, commit
from gptlab.training.checkpoints.shards import read_tensors
from preparing import data_config
from run_directories import write_run

MB = 10**6
LINE = b'{"text": "' + b"a" * MB + b'"}\n'


def write_zst(path: Path, content: bytes, times: int) -> None:
    with path.open("wb") as file, zstandard.ZstdCompressor(level=3).stream_writer(file) as writer:
        for _ in range(times):
            writer.write(content)


def write_gz(path: Path, content: bytes, times: int) -> None:
    with gzip.open(path, "wb") as file:
        for _ in range(times):
            file.write(content)


def write_dictionary(path: Path, content: bytes, times: int) -> None:
    rows = pa.DictionaryArray.from_arrays(pa.array([0] * times), pa.array([content.decode()]))
    pq.write_table(pa.table({"text": rows}), path, compression="zstd")


def write_prefixes(path: Path, content: bytes, times: int) -> None:
    rows = {"text": [content.decode()] * times}
    encoding = {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}}
    pq.write_table(pa.table(rows), path, compression="zstd", **encoding)


def write_plain(path: Path, content: bytes, times: int) -> None:
    pq.write_table(pa.table({"text": [content.decode()] * times}), path, compression="zstd", use_dictionary=False)


BOMBS: dict[str, tuple[str, Callable[[Path, bytes, int], None], bytes]] = {
    "gz": ("a.txt.gz", write_gz, b"a" * MB),
    "zst": ("a.txt.zst", write_zst, b"a" * MB),
    "jsonl.gz": ("a.jsonl.gz", write_gz, LINE),
    "jsonl.zst": ("a.jsonl.zst", write_zst, LINE),
    "parquet, dictionary": ("a.parquet", write_dictionary, b"a" * MB),
    "parquet, prefixes": ("a.parquet", write_prefixes, b"a" * MB),
    "parquet, plain": ("a.parquet", write_plain, b"a" * MB),
}


def read(path: Path, **values) -> int:
    """Returns the number of characters of a corpus."""
    corpus = open_corpus(
        data_config(source=str(path), column=None if ".txt" in path.name else "text", task_bytes=2**26, **values)
    )
    return sum(len(document.text) for task in corpus.tasks(2**26) for document in corpus.documents(task))


def peak(call: Callable[[], object]) -> int:
    """Returns the peak memory of Python objects during a call, in bytes."""
    tracemalloc.start()
    try:
        call()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refused(call: Callable[[Path], object], path: Path) -> None:
    with pytest.raises(UserError):
        call(path)


@pytest.mark.parametrize(("name", "write", "content"), BOMBS.values(), ids=BOMBS)
def test_a_compressed_corpus_that_expands_too_much_is_refused(tmp_path, name, write, content):
    path = tmp_path / name
    write(path, content, 60)
    assert path.stat().st_size < MB / 5
    assert read(path, max_expansion=1e9) >= 60 * MB  # the payload works
    with pytest.raises(UserError, match=rf"{name} expands from .* \(data\.max_expansion=100\)") as error:
        read(path)
    assert f"{path.stat().st_size:,}" in str(error.value) or "parquet" in name  # of one column
    assert peak(lambda: refused(read, path)) < 40 * MB


def test_one_block_of_a_zst_file_does_not_fill_the_memory(tmp_path):
    block = struct.pack("<I", 1 << 1 | 2**17 << 3)[:3] + b"a"  # RLE: 4 bytes for 128 KiB (RFC 8878, 3.1.1.2)
    frame = bytes.fromhex("28b52ffd") + b"\x00\x38" + block * 2500 + b"\x01\x00\x00"
    (tmp_path / "a.txt.zst").write_bytes(frame)
    assert peak(lambda: zstandard.ZstdDecompressor().decompressobj().decompress(frame)) > 2500 * 2**17
    assert peak(lambda: refused(read, tmp_path / "a.txt.zst")) < 50 * MB


def test_ordinary_and_small_compressed_files_are_accepted(tmp_path):
    write_gz(tmp_path / "small.txt.gz", b"a" * MB, 16)  # a ratio of 1000, but only 16 MB
    assert read(tmp_path / "small.txt.gz") == 16 * MB
    text = "".join(f"{i} {i * i} some ordinary words\n" for i in range(700_000)).encode()
    write_gz(tmp_path / "ordinary.txt.gz", text, 1)
    assert len(text) > 2**24
    assert read(tmp_path / "ordinary.txt.gz") == len(text)


def test_the_limit_is_not_part_of_the_fingerprint(tmp_path):
    (tmp_path / "a.txt").write_text("a")
    values = {"source": str(tmp_path / "a.txt")}
    corpora = [open_corpus(data_config(**values, max_expansion=ratio)) for ratio in (10.0, 1000.0)]
    assert corpora[0].fingerprint() == corpora[1].fingerprint()
    assert (
        str(corpora[0].decoding) == "Decoding(column=None, undecodable='replace', part_bytes=300)"
    )  # as in old caches


def test_a_parquet_file_that_lies_about_its_sizes_is_refused(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": ["some text"] * 1000}), path, use_dictionary=False, store_schema=False)
    assert read(path) == 9000
    column = pq.read_metadata(path).row_group(0).column(0)
    lie = zigzag(column.total_compressed_size + 5000)
    content, footer = path.read_bytes(), pq.read_metadata(path).serialized_size + 8
    assert len(lie) == len(zigzag(column.total_compressed_size))
    path.write_bytes(content[:-footer] + content[-footer:].replace(zigzag(column.total_compressed_size), lie))
    assert pq.read_metadata(path).row_group(0).column(0).total_compressed_size == column.total_compressed_size + 5000
    with pytest.raises(UserError, match=r"a\.parquet is damaged"):
        read(path)


def zigzag(value: int) -> bytes:
    """Encodes a number as in Thrift's compact protocol."""
    value, encoded = value << 1, bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes((*encoded, value))


# --- checkpoints


class Call:
    """Pickled as a call of a function."""

    def __init__(self, function: Callable[..., object], *args: object) -> None:
        self.call = function, args

    def __reduce__(self):
        return self.call


def doubled(value: object, times: int) -> object:
    for _ in range(times):
        value = Call(codecs.encode, value, "hex")
    return value


def shared(times: int) -> tuple:
    """Returns nested tuples, each of which contains the previous one twice: 2**times in all."""
    value: tuple = ()
    for _ in range(times):
        value = (value, value)
    return value


def write_archive(path: Path, content: bytes, compression: int) -> None:
    """Writes an archive of torch.save with another pickle."""
    torch.save({"a": torch.zeros(3)}, path)
    with zipfile.ZipFile(path) as archive:
        entries = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in entries.items():
            archive.writestr(name, content if name.endswith("data.pkl") else data)


def load_with_torch(path: Path) -> None:
    with contextlib.suppress(pickle.UnpicklingError):
        torch.load(path, weights_only=True, mmap=True)


TEXT = "a" * MB
EXPANDING = {
    "bytearray": Call(bytearray, 64 * MB),
    "hex": doubled(b"a" * (MB // 4), 8),
    "hex of text": Call(codecs.encode, doubled(b"a" * (MB // 4), 8), "hex"),
    "the same text, encoded several times": [Call(codecs.encode, TEXT, "latin1") for _ in range(64)],
    "the same list, in several sets": [Call(set, numbers) for numbers in [[*range(10**4)]] * 150],
}


@pytest.mark.parametrize("value", [*EXPANDING.values(), None], ids=[*EXPANDING, "compressed"])
def test_a_checkpoint_that_expands_is_refused(tmp_path, value):
    path = tmp_path / "ckpt.pt"
    if value is None:
        write_archive(path, pickle.dumps({"a": "a" * 64 * MB}, protocol=2), zipfile.ZIP_DEFLATED)
    else:
        write_archive(path, pickle.dumps({"a": value}, protocol=2), zipfile.ZIP_STORED)
    assert path.stat().st_size < 1.5 * MB
    plain = peak(lambda: load_with_torch(path))
    assert plain >= 60 * MB, "the payload has no effect, so the test would prove nothing"
    with pytest.raises(UserError, match=r"ckpt\.pt (cannot be read as a checkpoint: |was not loaded: )"):
        read_plain(path)
    assert peak(lambda: refused(read_plain, path)) < 30 * MB


def test_a_shard_of_an_earlier_version_that_expands_is_refused(tmp_path):
    tensors = {"model.a": torch.zeros(3)}
    save(tensors, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    write_archive(tmp_path / "a.pt", pickle.dumps(doubled(b"a" * 1000, 16), protocol=2), zipfile.ZIP_STORED)
    (tmp_path / "a.pt").rename(tmp_path / "__0_0.distcp")
    description = pickle.loads((tmp_path / ".metadata").read_bytes())  # noqa: S301  (written above)
    next(iter(description.storage_data.values())).length = (tmp_path / "__0_0.distcp").stat().st_size
    (tmp_path / ".metadata").write_bytes(pickle.dumps(description))

    def load_with_dcp() -> None:
        with pytest.raises(CheckpointException):
            load(tensors, storage_reader=FileSystemReader(tmp_path), no_dist=True)

    assert peak(load_with_dcp) >= 60 * MB, "the payload has no effect, so the test would prove nothing"
    with pytest.raises(UserError, match=r"The shards of .* cannot be read: ValueError: it has bytes in the encoding"):
        read_tensors(tmp_path, lambda name: True)
    assert peak(lambda: refused(lambda path: read_tensors(path, lambda name: True), tmp_path)) < 10 * MB


def test_chunks_of_an_earlier_version_that_overlap_are_refused(tmp_path):
    tensors = {f"model.{number}": torch.full((2**16,), float(number)) for number in range(8)}
    save(tensors, storage_writer=FileSystemWriter(tmp_path), no_dist=True)
    assert read_tensors(tmp_path, lambda name: True).keys() == tensors.keys()
    description = pickle.loads((tmp_path / ".metadata").read_bytes())  # noqa: S301  (written above)
    infos = list(description.storage_data.values())
    for info in infos[1:]:
        info.offset, info.length = infos[0].offset, infos[0].length
    (tmp_path / ".metadata").write_bytes(pickle.dumps(description))
    shard = tmp_path / "__0_0.distcp"
    shard.write_bytes(shard.read_bytes()[: infos[0].offset + infos[0].length])
    load(tensors, storage_reader=FileSystemReader(tmp_path), no_dist=True)  # the payload works
    with pytest.raises(UserError, match=r"the chunks of '__0_0\.distcp' overlap"):
        read_tensors(tmp_path, lambda name: True)


def test_shared_tuples_in_a_checkpoint_are_refused_at_once(tmp_path):
    state = {"global_step": 1, "callbacks": {"MetricsCallback": {"best": shared(16)}}, "optimizer_states": []}
    torch.save(state, tmp_path / "state.pt")
    began = time.perf_counter()
    copy.deepcopy(torch.load(tmp_path / "state.pt", weights_only=True))
    assert time.perf_counter() - began > 0.05, "the payload has no effect, so the test would prove nothing"
    for times in (16, 40):
        state["callbacks"]["MetricsCallback"]["best"] = shared(times)
        torch.save(state, tmp_path / "state.pt")
        assert (tmp_path / "state.pt").stat().st_size < 3000
        with pytest.raises(UserError, match=r"state\.pt cannot be read .*: it uses the same parts many times"):
            read_state(tmp_path)


def test_a_list_that_contains_itself_is_refused(tmp_path):
    loop: list = []
    loop.append(loop)
    torch.save({"a": loop}, tmp_path / "a.pt")
    with pytest.raises(UserError, match="one of its values contains itself"):
        read_plain(tmp_path / "a.pt")


def test_deep_nesting_in_a_checkpoint_is_refused(tmp_path):
    write_archive(tmp_path / "a.pt", b"\x80\x02" + b")" + b"\x85" * 10**5 + b".", zipfile.ZIP_STORED)
    with pytest.raises(UserError, match="it is nested more than 50 deep"):
        read_plain(tmp_path / "a.pt")


def test_a_second_directory_of_an_archive_is_refused(tmp_path):
    """zipfile permits bytes before an archive, so it finds another directory than torch."""
    write_archive(tmp_path / "hidden.pt", pickle.dumps({"a": "hidden"}, protocol=2), zipfile.ZIP_STORED)
    write_archive(tmp_path / "public.pt", pickle.dumps({"a": "public"}, protocol=2), zipfile.ZIP_STORED)
    hidden, shown = ((tmp_path / name).read_bytes() for name in ("hidden.pt", "public.pt"))
    assert hidden[-10:-6] == shown[-10:-6]  # sizes of the directories
    (tmp_path / "a.pt").write_bytes(hidden[:-22] + shown[:-6] + hidden[-6:])
    assert torch.load(tmp_path / "a.pt", weights_only=True) == {"a": "hidden"}
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        assert b"public" in archive.read(next(name for name in archive.namelist() if name.endswith("data.pkl")))
    with pytest.raises(UserError, match="the end of the archive is damaged"):
        read_plain(tmp_path / "a.pt")


def test_an_ordinary_checkpoint_is_accepted(tmp_path):
    saved = {"a": torch.arange(5), "b": {1, 2}, "c": b"bytes", "d": torch.zeros(2, dtype=torch.uint16), "e": 2.5}
    torch.save(saved, tmp_path / "a.pt")
    assert str(read_plain(tmp_path / "a.pt")) == str(saved)


HEADERS = {
    "larger than the file": struct.pack("<Q", 2**40) + b"{}",
    "deep": b"[" * 100_000,
    "overlapping tensors": json.dumps(
        {f"t{i}": {"dtype": "U8", "shape": [8], "data_offsets": [0, 8]} for i in range(1000)}
    ).encode(),
    "shape larger than the data": b'{"a": {"dtype": "F32", "shape": [1099511627776], "data_offsets": [0, 8]}}',
}


@pytest.mark.parametrize("header", HEADERS.values(), ids=HEADERS)
def test_the_library_refuses_hostile_safetensors_headers(tmp_path, header):
    length = b"" if header.endswith(b"\0{}") else struct.pack("<Q", len(header))
    (tmp_path / "model.safetensors").write_bytes(length + header + bytes(8))
    with pytest.raises(SafetensorError), safe_open(tmp_path / "model.safetensors", "pt"):
        pass


# --- sizes of models

EXTREME = [("n_layer", 10**9), ("n_layer", 10_000), ("n_embd", 2**30), ("vocab_size", 10**12), ("block_size", 2**30)]


def assert_size_refused(path: Path, key: str) -> None:
    with pytest.raises(UserError, match=r"has [\d,]+ parameters, but its weights have only|is not valid: ") as error:
        open_model_source(str(path))
    assert key in str(error.value)


@pytest.mark.parametrize(("key", "value"), EXTREME)
def test_a_hugging_face_model_of_an_extreme_size_is_refused(tmp_path, key, value):
    sizes = {"vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16} | {key: value}
    config = {**sizes, "model_type": "gpt2", "n_positions": sizes["block_size"]}
    (tmp_path / "config.json").write_text(json.dumps(config))
    save_file({"wte.weight": torch.zeros(61, 32)}, tmp_path / "model.safetensors")
    assert_size_refused(tmp_path, key)


@pytest.mark.parametrize(("key", "value"), EXTREME)
def test_a_nanogpt_checkpoint_of_an_extreme_size_is_refused(tmp_path, key, value):
    sizes = {"vocab_size": 61, "n_layer": 2, "n_head": 2, "n_embd": 32, "block_size": 16} | {key: value}
    torch.save({"model": {"a": torch.zeros(4)}, "model_args": sizes}, tmp_path / "ckpt.pt")
    assert_size_refused(tmp_path / "ckpt.pt", key)


@pytest.mark.parametrize(("key", "value"), EXTREME)
def test_a_run_of_an_extreme_size_is_refused(tmp_path, key, value):
    run = write_run(tmp_path / "run")
    config = yaml.safe_load((run / "config.yaml").read_text())
    config["model"][key] = value
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    (run / "checkpoints" / "unfinished").mkdir(parents=True)
    (run / "checkpoints" / "unfinished" / "state.pt").write_bytes(bytes(100_000))
    facts = CheckpointMetadata(step=1, val_loss=None, evaluation_due=False)
    commit(run / "checkpoints" / "unfinished", run / "checkpoints" / "step_000001", facts, {})
    assert_size_refused(run, key)


def test_a_width_with_many_possible_heads_is_checked_quickly():
    code = "import sys; from gptlab.model.config import GPTConfig; GPTConfig.model_validate_json(sys.argv[1])"
    values = json.dumps(TINY | {"n_embd": 2**31 - 1, "n_head": 2})
    done = subprocess.run([sys.executable, "-c", code, values], capture_output=True, text=True, timeout=20, check=False)
    assert "Nearest divisors: 1 and 2147483647" in done.stderr


def test_sizes_beyond_32_bits_are_refused():
    for key in ("block_size", "vocab_size", "n_head", "n_embd", "n_layer", "pad_vocab_to_multiple_of"):
        with pytest.raises(ValueError, match=key):
            GPTConfig.model_validate(TINY | {key: 2**31})


# --- tokenizers and token files


@pytest.mark.parametrize("name", ["tokenizer.json", "vocab.json", "merges.txt", "meta.pkl"])
def test_huge_tokenizer_files_are_refused(tmp_path, name):
    for file in ("vocab.json", "merges.txt"):
        (tmp_path / file).write_text("{}")
    (tmp_path / "ckpt.pt").touch()
    with (tmp_path / name).open("wb") as file:
        os.truncate(file.fileno(), 2**40)  # sparse: a terabyte
    path = tmp_path / "ckpt.pt" if name == "meta.pkl" else tmp_path
    with pytest.raises(UserError, match=rf"{name} (cannot be read: it has more than|has 1,099,511,627,776 bytes)"):
        tokenizer_record(path, 7)


def test_a_tokenizer_in_the_hub_cache_is_a_link(tmp_path):
    (tmp_path / "blob").write_text('{"a": 1}')
    (tmp_path / "tokenizer.json").symlink_to(tmp_path / "blob")
    assert read_json(tmp_path / "tokenizer.json") == {"a": 1}


def test_an_archive_instead_of_a_token_file_is_refused(tmp_path):
    np.savez(tmp_path / "train.npz", a=np.zeros(3))
    (tmp_path / "train.npz").rename(tmp_path / "train.npy")
    with pytest.raises(UserError, match="is not an array saved by numpy: it is an archive"):
        read_layout(tmp_path / "train.npy")
