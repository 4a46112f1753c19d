import gzip
import json
import sys
import tracemalloc
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from gptlab.data.sources.compression import BLOCK_BYTES
from gptlab.data.sources.corpora import open_corpus
from gptlab.data.sources.file_types import FileType
from gptlab.data.sources.files import Corpus
from gptlab.data.sources.readers import split_spans
from gptlab.data.tokenizers.tokenizer import GPT2Tokenizer
from gptlab.errors import UserError
from preparing import data_config, prepare_text, tokens_on_disk

WHOLE = 10**9
WHITE_SPACE = [" ", "  ", "     ", "\t", " \t", "\n", "\n\n", " \n", "\n ", "\r\n", "\r\n\r\n", "\r", "\v", "\f"]
WHITE_SPACE += ["\x1c", "\x85", "\u00a0", " \u00a0", "\u00a0 ", "\u2028", "\u3000 ", " \u3000"]
PIECES = [
    "a",
    "word",
    "'ll",
    "'",
    "s",
    "12",
    "345",
    "!?",
    ".",
    "naïve",
    "👍",
    "世界。",
    "é",
    "ﬁ",
    "<|endoftext|>",
    "\x01",
]


def adversarial_text(pieces: int, seed: int = 0) -> str:
    """Returns random words, punctuation and whitespace, in random sequences."""
    random = np.random.default_rng(seed)
    kinds = [WHITE_SPACE, PIECES]
    return "".join(str(random.choice(kinds[kind])) for kind in random.integers(0, 2, size=pieces))


TEXTS = {
    "adversarial": adversarial_text(3000),
    "crlf": "one line\r\nand another\r\n\r\n   indented\r\n" * 60,
    "without whitespace": "0123456789abcdef" * 200,
    "multibyte characters": "naïve 👍 世界 é " * 150,
    "trailing whitespace": "word " * 500 + " " * 500,
    "leading whitespace": "\n" * 700 + "word " * 300,
    "other scripts": "Съешь ещё этих мягких французских \n世界。これは\u3000 テスト\r\nнаⅧ\u2009 \u1680 ꙮ " * 60,
    "only whitespace": " \t\r\n" * 500,
}


def open_text(source: Path, **values) -> Corpus:
    return open_corpus(data_config(source=str(source), **values))


def joined(corpus: Corpus, size: int) -> list[tuple[str, str]]:
    """Returns the name and text of every document, with its parts joined, which must be contiguous."""
    documents: list[tuple[str, str]] = []
    position = 1.0
    for task in corpus.tasks(size):
        for name, text, begin, end, _ in corpus.documents(task):
            assert begin == position % 1
            position = end
            if begin == 0:
                documents.append((name, text))
            else:
                assert documents[-1][0] == name
                documents[-1] = (name, documents[-1][1] + text)
    assert position == 1
    return documents


def write_rows(path: Path, rows: list[dict]) -> Path:
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows).encode()
    if path.suffix == ".gz":
        data = gzip.compress(data)
    elif path.suffix == ".zst":
        data = pytest.importorskip("zstandard").compress(data)
    path.write_bytes(data)
    return path


ROWS = [{"id": n, "text": f"Row {n}:\r\n" + "naïve\u2028👍 \n" * (n % 5)} for n in range(60)]


# --- text


@pytest.mark.parametrize("kind", TEXTS)
def test_text_does_not_depend_on_the_task_size(tmp_path, kind):
    path = tmp_path / "a.txt"
    path.write_bytes(TEXTS[kind].encode())
    length = path.stat().st_size
    for size in (*range(1, 40), 100, 333, length // 2, length - 1, length, length + 1, WHOLE):
        assert joined(open_text(path), size) == [("a.txt", TEXTS[kind])], f"tasks of {size}"


@pytest.mark.parametrize("kind", TEXTS)
def test_spans_are_contiguous_and_end_at_the_next_split_offset(tmp_path, kind):
    path = tmp_path / "a.txt"
    data = TEXTS[kind].encode()
    path.write_bytes(data)
    white = {b" ", b"\t", b"\r", b"\n"}
    ends = np.cumsum([len(character.encode()) for character in TEXTS[kind]]).tolist()
    solid = [end for end, character in zip(ends, TEXTS[kind], strict=True) if not character.isspace()]
    places = {n for n in solid if data[n : n + 1] in white and data[n - 1 : n] not in (b"\x01", b"\x7f")}
    for size in (1, 7, 100, 333, len(data) - 1, len(data)):
        found = list(split_spans(path, size, FileType()))
        assert [span.bytes for span in found] == [span.stop - span.start for span in found]
        assert [0, *(span.stop for span in found)] == [*(span.start for span in found), len(data)]
        for span in found[:-1]:
            assert span.stop == min(place for place in places if place >= span.start + size)
        if found[-1].bytes > size:
            assert not [place for place in places if place >= found[-1].start + size]


def test_file_of_the_span_size_is_one_span_and_one_byte_more_gives_two(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"word " * 20)
    assert list(split_spans(path, 100, FileType())) == [(0, 100, 100, FileType())]
    path.write_bytes(b"word " * 20 + b"w")
    assert [span[:3] for span in split_spans(path, 99, FileType())] == [(0, 99, 99), (99, 101, 2)]


def test_next_split_offset_is_found_at_any_distance(tmp_path):
    path = tmp_path / "a.txt"
    for before in (BLOCK_BYTES - 2, BLOCK_BYTES - 1, BLOCK_BYTES, BLOCK_BYTES + 1, BLOCK_BYTES + 2, 3 * BLOCK_BYTES):
        path.write_bytes(b"x" * before + b" y")
        spans = [span[:3] for span in split_spans(path, 1, FileType())]
        assert spans == [(0, before, before), (before, before + 2, 2)]
    lines = [b"{%d: 0}\n" % n + b" " * n for n in (BLOCK_BYTES - 9, BLOCK_BYTES - 8, 2 * BLOCK_BYTES)]
    (tmp_path / "a.jsonl").write_bytes(b"\n".join(lines))
    ends = [n + 1 for n, byte in enumerate(b"\n".join(lines)) if byte == 10]
    assert [span.stop for span in split_spans(tmp_path / "a.jsonl", 1, FileType("jsonl"))] == [
        *ends,
        (tmp_path / "a.jsonl").stat().st_size,
    ]


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory) -> GPT2Tokenizer:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))
        return GPT2Tokenizer(None)


@pytest.mark.parametrize("seed", range(5))
def test_gpt2_tokens_of_a_divided_text_are_those_of_the_whole(tmp_path, gpt2, seed):
    text = adversarial_text(2500, seed)
    (tmp_path / "a.txt").write_bytes(text.encode())
    corpus = open_text(tmp_path / "a.txt")
    expected = gpt2.encode(text).tolist()
    for size in np.random.default_rng(seed).permutation(np.arange(1, 400))[:15].tolist():
        tasks = corpus.tasks(size)
        assert len(tasks) > 5
        found = [gpt2.encode(document.text) for task in tasks for document in corpus.documents(task)]
        assert np.concatenate(found).tolist() == expected, f"tasks of {size}"


def test_replacement_of_invalid_utf8_does_not_depend_on_the_task_size(tmp_path):
    random = np.random.default_rng(0)
    pieces = [b"\xff", b"\xc3", b"\xe4\xb8", b"\xf0\x9f", b"\x80", b"a", b" ", b"\n", *(4 * [b"good"])]
    data = b"".join(random.choice(pieces, size=2000))
    (tmp_path / "a.txt").write_bytes(data)
    for size in (1, 2, 3, 10, 101, WHOLE):
        assert joined(open_text(tmp_path / "a.txt"), size) == [("a.txt", data.decode(errors="replace"))]


# --- records


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.ndjson", "rows.jsonl.gz", "rows.jsonl.zst"])
def test_jsonl_lines_are_documents_named_by_offset_for_any_task_size(tmp_path, name):
    path = write_rows(tmp_path / name, ROWS)
    lengths = [len((json.dumps(row, ensure_ascii=False) + "\n").encode()) for row in ROWS]
    starts = [0, *np.cumsum(lengths).tolist()]
    expected = [(f"{name}:{start}", row["text"]) for start, row in zip(starts, ROWS, strict=False)]
    corpus = open_text(path, column="text")
    for size in (1, 30, 31, 32, 33, 100, 1000, starts[-1] - 1, starts[-1], WHOLE):
        assert joined(corpus, size) == expected
    assert len(corpus.tasks(100)) == 1 if name.endswith(("gz", "zst")) else len(corpus.tasks(100)) > 10


def test_jsonl_accepts_empty_lines_crlf_and_no_final_newline(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'\n{"text": "one"}\r\n  \n\n{"text": "two"}\r\n{"text": "three"}')
    expected = [("a.jsonl:1", "one"), ("a.jsonl:22", "two"), ("a.jsonl:39", "three")]
    for size in (1, 5, 20, WHOLE):
        assert joined(open_text(tmp_path / "a.jsonl", column="text"), size) == expected


@pytest.mark.parametrize("group", [1, 7, 60])
def test_parquet_rows_are_documents_named_by_row_for_any_task_size(tmp_path, group):
    path = tmp_path / "rows.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=group)
    expected = [(f"rows.parquet:{row['id']}", row["text"]) for row in ROWS]
    corpus = open_text(path, column="text")
    for size in (1, 300, 1000, WHOLE):
        assert joined(corpus, size) == expected
    assert len(corpus.tasks(1)) == -(-60 // group)
    assert len(corpus.tasks(WHOLE)) == 1


def test_row_numbers_are_correct_in_large_row_groups(tmp_path):
    pq.write_table(pa.table({"text": [str(n) for n in range(5000)]}), tmp_path / "a.parquet", row_group_size=2500)
    expected = [(f"a.parquet:{n}", str(n)) for n in range(5000)]
    assert joined(open_text(tmp_path / "a.parquet", column="text"), 1) == expected


def test_records_without_text_are_skipped_and_other_names_do_not_change(tmp_path):
    rows = [{"text": "one"}, {"text": None}, {"text": "three"}, {"text": ""}]
    write_rows(tmp_path / "a.jsonl", rows)
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet")
    for size in (1, WHOLE):
        found = joined(open_text(tmp_path / "a.jsonl", column="text"), size)
        assert found == [("a.jsonl:0", "one"), ("a.jsonl:31", "three"), ("a.jsonl:49", "")]
        found = joined(open_text(tmp_path / "a.parquet", column="text"), size)
        assert found == [("a.parquet:0", "one"), ("a.parquet:2", "three"), ("a.parquet:3", "")]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
def test_compressed_text_is_one_document(tmp_path, suffix):
    text = TEXTS["adversarial"]
    compress = gzip.compress if suffix == "gz" else pytest.importorskip("zstandard").compress
    (tmp_path / f"a.txt.{suffix}").write_bytes(compress(text.encode()))
    for size in (1, WHOLE):
        assert joined(open_text(tmp_path / f"a.txt.{suffix}"), size) == [(f"a.txt.{suffix}", text)]


@pytest.mark.parametrize("suffix", ["gz", "zst"])
@pytest.mark.parametrize("kind", TEXTS)
def test_compressed_text_is_divided_like_plain_text(tmp_path, kind, suffix):
    data = TEXTS[kind].encode()
    (tmp_path / "a.txt").write_bytes(data)
    compress = gzip.compress if suffix == "gz" else pytest.importorskip("zstandard").compress
    (tmp_path / f"b.txt.{suffix}").write_bytes(compress(data))
    for size in (1, 7, 100, 333, len(data) - 1, len(data), len(data) + 1):
        plain, compressed = (
            [tuple(document)[1:] for task in corpus.tasks(size) for document in corpus.documents(task)]
            for corpus in (open_text(tmp_path / name, task_bytes=size) for name in ("a.txt", f"b.txt.{suffix}"))
        )
        assert compressed == plain


def test_memory_for_compressed_text_is_limited(tmp_path):
    with gzip.open(tmp_path / "a.txt.gz", "wb", compresslevel=1) as file:
        for _ in range(60):
            file.write(b"some words\n" * 100_000)  # 66 MB
    corpus = open_text(tmp_path / "a.txt.gz", task_bytes=10**6, max_expansion=1000.0)
    (task,) = corpus.tasks(10**6)
    tracemalloc.start()
    parts = sum(1 for _ in corpus.documents(task))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert parts == 66
    assert peak < 8 * 10**6


# --- directories


@pytest.fixture
def mixed(tmp_path) -> Path:
    """A directory of all kinds of files: large, small and empty."""
    folder = tmp_path / "mixed"
    (folder / "below").mkdir(parents=True)
    for n in range(80):
        (folder / f"{n:02d}.txt").write_bytes(f"Text {n} ".encode() * (n % 9))
    (folder / "below" / "large.txt").write_bytes(TEXTS["adversarial"].encode())
    (folder / "below" / "a.txt.gz").write_bytes(gzip.compress(TEXTS["crlf"].encode()))
    write_rows(folder / "below" / "a.jsonl", ROWS)
    write_rows(folder / "b.jsonl.gz", ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), folder / "c.parquet", row_group_size=11)
    return folder


def test_directory_of_all_file_kinds_does_not_depend_on_the_task_size(mixed):
    corpus = open_text(mixed, column="text")
    whole = joined(corpus, WHOLE)
    assert len(whole) == 80 - 9 + 2 + 3 * 60  # nine are empty
    assert len({name for name, _ in whole}) == len(whole)
    assert dict(whole)["below/large.txt"] == TEXTS["adversarial"]
    assert dict(whole)["07.txt"] == "Text 7 " * 7
    for size in (1, 13, 100, 1000, 10_000):
        assert joined(corpus, size) == whole


def test_tasks_are_numbered_and_have_about_the_requested_size(mixed):
    corpus = open_text(mixed, column="text")
    for size in (100, 1000):
        tasks = corpus.tasks(size)
        assert [task.number for task in tasks] == list(range(len(tasks)))
        assert tasks == open_text(mixed, column="text").tasks(size)
        for task in tasks[:-1]:
            assert task.bytes >= size
            assert task.bytes - task.parts[-1][1].bytes < size
        assert all(one.parts != other.parts for one, other in pairwise(tasks))


def test_val_documents_do_not_depend_on_the_task_size(mixed):
    def splits(size: int) -> list[list[int]]:
        chosen = {"val_split": "documents", "val_fraction": 0.3, "column": "text", "task_bytes": size}
        folder = prepare_text(mixed, **chosen).folder
        return [tokens_on_disk(folder, split) for split in ("train", "val")]

    whole = splits(WHOLE)
    assert all(ids.count(256) > 40 for ids in whole)
    for size in (150, 1001, 5000):
        assert splits(size) == whole


# --- invalid files


def read_all(source: Path, size: int = WHOLE, **values) -> None:
    joined(open_text(source, **values), size)


def test_invalid_utf8_raises_with_its_offset_for_refuse(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"good \xc3\xa9 \xff\xfe bad")
    with pytest.raises(UserError, match=rf"{path}.* is not UTF-8 at byte 8: b'\\xff\\xfe bad'.*undecodable=replace"):
        read_all(path, undecodable="refuse")
    read_all(path)
    path.write_bytes("gut: é 👍".encode())
    read_all(path, undecodable="refuse")


def test_record_with_invalid_utf8_raises_with_its_offset_for_refuse(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": "\xff"}\n')
    for size in (1, WHOLE):
        with pytest.raises(UserError, match=rf"{path}, line at byte 16 is not UTF-8 at byte 10"):
            read_all(path, size, column="text", undecodable="refuse")
        assert joined(open_text(path, column="text"), size)[1] == ("a.jsonl:16", "\ufffd")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_invalid_json_line_is_reported_with_its_offset(tmp_path, suffix):
    path = tmp_path / f"a.jsonl{suffix}"
    data = '{"text": "é"}\n{"text": "two}\n{"text": "three"}\n'.encode()
    path.write_bytes(gzip.compress(data) if suffix else data)
    for size in (1, 20, WHOLE):
        with pytest.raises(UserError, match=rf"{path}, line at byte 15 is not JSON: "):
            read_all(path, size, column="text")


def test_line_without_the_column_is_reported_with_the_existing_columns(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", [{"text": "one"}, {"body": "two", "id": 2}])
    with pytest.raises(UserError, match=rf"data\.column=text is not in {path}, line at byte 16\..*: body, id\."):
        read_all(path, column="text")
    with pytest.raises(UserError, match=rf"data\.column is required to read {path}, line at byte 0\..*: text\."):
        read_all(path)
    path.write_text('"text"\n')
    with pytest.raises(UserError, match=rf"data\.column=text is not in {path}, line at byte 0\..*: none\."):
        read_all(path, column="text")


def test_parquet_without_the_column_is_reported_with_the_existing_columns(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(ROWS), path)
    with pytest.raises(UserError, match=rf"data\.column=body is not in {path}\. Its columns are: id, text\."):
        read_all(path, column="body")
    with pytest.raises(UserError, match=rf"data\.column is required to read {path}\. Its columns are: id, text\."):
        read_all(path)


def test_column_that_is_not_text_raises_with_its_row(tmp_path):
    write_rows(tmp_path / "a.jsonl", ROWS)
    pq.write_table(pa.Table.from_pylist(ROWS), tmp_path / "a.parquet")
    for name, where in (("a.jsonl", "line at byte 0"), ("a.parquet", "row 0")):
        with pytest.raises(UserError, match=rf"{name}, {where}: data\.column=id contains int .*: 0\..*id, text"):
            read_all(tmp_path / name, column="id")


def test_damaged_file_is_reported(tmp_path):
    whole = gzip.compress("".join(json.dumps(row) + "\n" for row in ROWS * 50).encode())
    middle = len(whole) // 2
    broken = {"a.jsonl.gz": whole[:-9], "b.txt.gz": b"plain", "c.txt.gz": whole[:middle] + b"\0" * 99 + whole[middle:]}
    for name, data in (broken | {"d.parquet": b"PAR1 no parquet PAR1"}).items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(UserError, match=rf"{tmp_path / name} is damaged"):
            read_all(tmp_path / name, column=None if ".txt" in name else "text")


def test_zst_file_without_zstandard_raises(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "zstandard", None)
    for name in ("a.txt.zst", "a.jsonl.zst"):
        (tmp_path / name).write_bytes(bytes.fromhex("28b52ffd2003190000616263"))
        with pytest.raises(UserError, match=rf"{name} cannot be decompressed.*pip install zstandard"):
            read_all(tmp_path / name, column="text")


def test_zst_file_of_several_frames_is_read_and_a_damaged_one_is_reported(tmp_path):
    compress = pytest.importorskip("zstandard").compress
    data = "".join(json.dumps(row) + "\n" for row in ROWS).encode()
    (tmp_path / "a.jsonl.zst").write_bytes(compress(data) + compress(data))
    assert len(joined(open_text(tmp_path / "a.jsonl.zst", column="text"), WHOLE)) == 2 * len(ROWS)
    (tmp_path / "b.txt.zst").write_bytes(compress(data) + compress(data))
    assert joined(open_text(tmp_path / "b.txt.zst"), WHOLE) == [("b.txt.zst", (data + data).decode())]
    (tmp_path / "b.txt.zst").write_bytes(compress(data)[:-20])
    with pytest.raises(UserError, match=r"b\.txt\.zst is damaged"):
        read_all(tmp_path / "b.txt.zst")


def test_offset_of_invalid_utf8_is_relative_to_the_file(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"word " * 100 + b"\xff")
    for size in (100, 300, WHOLE):
        with pytest.raises(UserError, match=r"a\.txt is not UTF-8 at byte 500"):
            read_all(tmp_path / "a.txt", size, undecodable="refuse")


def test_lone_surrogates_in_json_are_replaced_or_refused(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b'{"text": "a\\ud800b"}\n{"text": "\\ud83d\\udc4d"}\n' * 9)
    prepared = prepare_text(tmp_path / "a.jsonl", "characters", column="text", val_split="documents", val_fraction=0.5)
    assert prepared.tokenizer.record()["characters"] == "ab\ufffd👍"
    assert sum(shard.num_replaced for shard in prepared.manifest.shards()) == 9
    with pytest.raises(UserError, match=r"line at byte 0: data\.column=text has a lone surrogate at character 1"):
        read_all(tmp_path / "a.jsonl", column="text", undecodable="refuse")


def test_file_name_may_contain_special_characters(tmp_path):
    for name in ("a::b.jsonl", "*.jsonl", "[a].jsonl", "file:a.jsonl"):
        write_rows(tmp_path / name, ROWS[:1])
        assert joined(open_text(tmp_path / name, column="text"), WHOLE) == [(f"{name}:0", ROWS[0]["text"])]


def test_line_that_exceeds_python_limits_is_reported(tmp_path):
    for number in ("1" * 5000, "[" * 100_000):
        (tmp_path / "a.jsonl").write_text(f'{{"text": "a", "n": {number}}}\n')
        with pytest.raises(UserError, match=r"a\.jsonl, line at byte 0 is not JSON"):
            read_all(tmp_path / "a.jsonl", column="text")
