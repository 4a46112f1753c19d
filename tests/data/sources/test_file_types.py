"""Files as people have them: each is read as the documents that were written, or refused by name.

The expected documents are those that were written with the standard library, pyarrow and zstandard.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import pickle
import sqlite3
import tarfile
import zipfile
from collections.abc import Callable
from contextlib import ExitStack
from itertools import product
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.feather as feather
import pyarrow.orc as orc
import pyarrow.parquet as pq
import pytest
import zstandard

from gptlab.data.prepare.splitting import has_several_documents
from gptlab.data.sources.corpora import open_corpus
from gptlab.errors import UserError
from preparing import data_config, prepare_text, tokens_on_disk

DOCUMENTS = ["First, naïve 👍.\nSecond line.", "two", "x" * 9000, "\u2028 and \x0c control", "世界。これは " * 20]
TEXT = "\n".join(DOCUMENTS) + "\n"
COMPRESSIONS: dict[str, Callable[[bytes], bytes]] = {
    "": bytes,
    ".gz": gzip.compress,
    ".GZ": gzip.compress,
    ".gzip": gzip.compress,
    ".zst": zstandard.compress,
    ".zstd": zstandard.compress,
    ".bz2": bz2.compress,
    ".xz": lzma.compress,
}


def lines(documents: list[str], *, ascii: bool = False, end: str = "\n") -> bytes:  # noqa: A002
    return "".join(json.dumps({"n": 1, "text": one}, ensure_ascii=ascii) + end for one in documents).encode()


def parquet(documents: list[str], **options) -> bytes:
    buffer = io.BytesIO()
    kind = options.pop("type", pa.string())
    pq.write_table(pa.table({"n": list(range(len(documents))), "text": pa.array(documents, kind)}), buffer, **options)
    return buffer.getvalue()


def table(delimiter: str) -> bytes:
    buffer = io.StringIO()
    csv.writer(buffer, delimiter=delimiter).writerows([["n", "text"], *([n, one] for n, one in enumerate(DOCUMENTS))])
    return buffer.getvalue().encode()


def archive(kind: str) -> bytes:
    buffer = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(buffer, "w") as file:
            file.writestr("a.txt", TEXT)
    else:
        with tarfile.open(fileobj=buffer, mode=f"w:{kind}") as file:
            about = tarfile.TarInfo("a.txt")
            about.size = len(TEXT.encode())
            file.addfile(about, io.BytesIO(TEXT.encode()))
    return buffer.getvalue()


def written(write: Callable[[pa.Table, io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(pa.table({"text": DOCUMENTS}), buffer)
    return buffer.getvalue()


def database() -> bytes:
    connection = sqlite3.connect(":memory:")
    connection.execute("create table t (text)")
    return connection.serialize()


def large_window(data: bytes) -> bytes:
    """Compresses like zstd --ultra --long=31. The header has the window, since the size of the data is unknown."""
    options = zstandard.ZstdCompressionParameters(window_log=31, write_content_size=False)
    compressor = zstandard.ZstdCompressor(compression_params=options).compressobj()
    packed = compressor.compress(data) + compressor.flush()
    with pytest.raises(zstandard.ZstdError, match="too much memory"):
        zstandard.ZstdDecompressor().decompressobj().decompress(packed)
    return packed


SKIPPED = b"\x50\x2a\x4d\x18\x02\0\0\0ab"  # a skippable frame (RFC 8878, 3.1.2)
BOM = b"\xef\xbb\xbf"
READ: dict[str, tuple[str, bytes, bool]] = {  # case: file name, content, whether it has columns
    **{f"text{suffix}": (f"a.txt{suffix}", pack(TEXT.encode()), False) for suffix, pack in COMPRESSIONS.items()},
    **{
        f"{name}{suffix}": (f"{name}{suffix}", pack(lines(DOCUMENTS)), True)
        for name, (suffix, pack) in product(("a.jsonl", "a.JSONL", "a.ndjson", "a.json"), COMPRESSIONS.items())
    },
    **{
        f"{name}, {compression}": (name, parquet(DOCUMENTS, compression=compression, row_group_size=2), True)
        for name, compression in product(("a.parquet", "a.PARQUET", "a.parq", "a.pq", "a"), ("none", "snappy", "zstd"))
    },
    "parquet, large strings": ("a.parquet", parquet(DOCUMENTS, type=pa.large_string()), True),
    "parquet, dictionary": ("a.parquet", parquet(DOCUMENTS, type=pa.dictionary(pa.int32(), pa.string())), True),
    **{
        f"text, {name}": (name, TEXT.encode(), False)
        for name in (
            "README",
            "a.md",
            "a.py",
            "[a].txt",
            "a b.txt",
            "a.json.txt",
            "*.txt",
            "~a.txt",
            "ü.TXT",
            "a.gz.txt",
        )
    },
    **{
        f"compressed without suffix{suffix}": ("a", pack(TEXT.encode()), False) for suffix, pack in COMPRESSIONS.items()
    },
    "text with a BOM": ("a.txt", BOM + TEXT.encode(), False),
    "compressed text with a BOM": ("a.txt.gz", gzip.compress(BOM + TEXT.encode()), False),
    "jsonl with a BOM": ("a.jsonl", BOM + lines(DOCUMENTS), True),
    "jsonl.gz with a BOM": ("a.jsonl.gz", gzip.compress(BOM + lines(DOCUMENTS)), True),
    "jsonl with escapes": ("a.jsonl", lines(DOCUMENTS, ascii=True), True),
    "jsonl with CRLF": ("a.jsonl", lines(DOCUMENTS, end="\r\n"), True),
    "jsonl named .txt": ("a.txt", lines(DOCUMENTS), True),
    "jsonl without suffix": ("a", lines(DOCUMENTS), True),
    "several gzip members": (
        "a.jsonl.gz",
        gzip.compress(lines(DOCUMENTS[:2])) + gzip.compress(lines(DOCUMENTS[2:])),
        True,
    ),
    "several zstd frames": ("a.jsonl.zst", b"".join(zstandard.compress(lines([one])) for one in DOCUMENTS), True),
    "several bzip2 streams": ("a.jsonl.bz2", b"".join(bz2.compress(lines([one])) for one in DOCUMENTS), True),
    "several xz streams": ("a.jsonl.xz", b"".join(lzma.compress(lines([one])) for one in DOCUMENTS), True),
    "zstd with a skippable frame": (
        "a.txt.zst",
        zstandard.compress(TEXT.encode()) + b"\x50\x2a\x4d\x18\x02\0\0\0ab",
        False,
    ),
    "zstd, skippable frame first": ("a", SKIPPED + zstandard.compress(TEXT.encode()), False),
    "xz with padding": ("a.txt.xz", lzma.compress(TEXT.encode()) + bytes(2000), False),
    "several xz streams with padding": (
        "a.txt.xz",
        lzma.compress(TEXT[:99].encode()) + bytes(4) + lzma.compress(TEXT[99:].encode()) + bytes(4),
        False,
    ),
    **{
        f"text that begins with {start}": ("a", (start + TEXT).encode(), False)
        for start in ("ORC", "PAR1", "BZh9", "PK")
    },
    "zstd with a large window": ("a.txt.zst", large_window(TEXT.encode()), False),
}


def read(path: Path, column: str | None, **values) -> list[str]:
    """Returns the texts of the documents, with their parts joined."""
    corpus = open_corpus(data_config(source=str(path), column=column, **values))
    texts: dict[str, str] = {}
    for task in corpus.tasks(4000):
        for document in corpus.documents(task):
            texts[document.name] = texts.get(document.name, "") + document.text
    return list(texts.values())


@pytest.mark.parametrize("case", READ)
def test_documents_are_those_that_were_written(tmp_path, case):
    name, content, has_columns = READ[case]
    (tmp_path / name).write_bytes(content)
    expected = (
        DOCUMENTS
        if has_columns
        else [case.removeprefix("text that begins with ") + TEXT if " begins " in case else TEXT]
    )
    assert read(tmp_path / name, "text" if has_columns else None) == expected
    if not has_columns:
        with pytest.raises(UserError, match=r"data\.column=text is set, but .* is plain text, which has no columns"):
            read(tmp_path / name, "text")
    elif "txt" not in name and name != "a":
        with pytest.raises(UserError, match=r"data\.column is required to read .*Its columns are: n, text"):
            read(tmp_path / name, None)


def test_tokens_are_those_of_an_independent_reader(tmp_path):
    (tmp_path / "a.JSONL.BZ2").write_bytes(bz2.compress(lines(DOCUMENTS)))
    folder = prepare_text(
        tmp_path / "a.JSONL.BZ2", "bytes", column="text", val_split="documents", val_fraction=0.3
    ).folder
    found = [text for split in ("train", "val") for text in split_at(tokens_on_disk(folder, split))]
    with bz2.open(tmp_path / "a.JSONL.BZ2", "rt", encoding="utf-8") as file:
        rows = [json.loads(line)["text"].encode() for line in file]
    assert sorted(found) == sorted(rows)


def split_at(tokens: list[int]) -> list[bytes]:
    """Splits tokens of tokenizer=bytes at the end-of-text token."""
    texts, text = [], bytearray()
    for token in tokens:
        if token == 256:
            texts.append(bytes(text))
            text.clear()
        else:
            text.append(token)
    assert not text
    return texts


random_bytes = np.random.default_rng(0).bytes
UTF_16 = "Text in UTF-16, naïve.\n" * 9
REFUSED: dict[str, tuple[str, bytes, str]] = {  # case: file name, content, what it is
    **{f"csv{suffix}": (f"a.csv{suffix}", pack(table(",")), "CSV table") for suffix, pack in COMPRESSIONS.items()},
    "CSV": ("a.CSV", table(","), "CSV table"),
    "tsv": ("a.tsv", table("\t"), "TSV table"),
    "JSON array": ("a.json", json.dumps([{"text": one} for one in DOCUMENTS]).encode(), "JSON array"),
    "JSON array named jsonl": ("a.jsonl", json.dumps([{"text": "a"}]).encode(), "JSON array"),
    "indented JSON array": ("a.json", json.dumps([{"text": "a"}], indent=1).encode(), "JSON array"),
    "JSON array with a BOM": ("a.json", BOM + json.dumps([{"text": "a"}]).encode(), "JSON array"),
    "compressed JSON array": ("a.json.gz", gzip.compress(json.dumps([{"text": "a"}]).encode()), "JSON array"),
    "indented JSON": ("a.json", json.dumps({"text": "a"}, indent=1).encode(), "JSON document"),
    "zip": ("a.zip", archive("zip"), "ZIP archive"),
    "zip named txt": ("a.txt", archive("zip"), "ZIP archive"),
    "docx": ("a.docx", archive("zip"), "ZIP archive"),
    "tar": ("a.tar", archive(""), "tar archive"),
    "tar.gz": ("a.tar.gz", archive("gz"), "tar archive"),
    "tgz": ("a.tgz", archive("gz"), "tar archive"),
    "tar.bz2": ("a.tar.bz2", archive("bz2"), "tar archive"),
    "tar.xz": ("a.tar.xz", archive("xz"), "tar archive"),
    "tar.zst": ("a.tar.zst", zstandard.compress(archive("")), "tar archive"),
    "compressed twice": ("a.txt.gz.gz", gzip.compress(gzip.compress(TEXT.encode())), "compressed data"),
    "compressed parquet": ("a.parquet.gz", gzip.compress(parquet(DOCUMENTS)), "compressed data"),
    "arrow": ("a.arrow", written(lambda t, b: feather.write_feather(t, b, compression="uncompressed")), "Arrow file"),
    "feather": ("a.feather", written(lambda t, b: feather.write_feather(t, b)), "Arrow file"),
    "orc": ("a.orc", written(orc.write_table), "ORC file"),
    "sqlite": ("a.db", database(), "SQLite database"),
    "pickle": ("a.pkl", pickle.dumps(DOCUMENTS), "binary data"),
    "numpy": ("a.npy", (lambda b: (np.save(b, np.arange(9)), b.getvalue())[1])(io.BytesIO()), "binary data"),
    "png": ("a.png", b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR" + random_bytes(99), "binary data"),
    "pdf": ("a.pdf", b"%PDF-1.7\n" + random_bytes(99), "PDF file"),
    "elf": ("a", b"\x7fELF\2\1\1\0" + random_bytes(99), "binary data"),
    "random bytes": ("a.txt", random_bytes(100_000), "binary data"),
    "few random bytes": ("a.txt", random_bytes(99).replace(b"\0", b"\x80"), "binary data"),
    **{
        f"{encoding}{suffix}": (f"a.txt{suffix}", pack(UTF_16.encode(encoding)), "UTF-16|UTF-32|binary")
        for encoding, (suffix, pack) in product(
            ("utf-16", "utf-16-le", "utf-16-be", "utf-32"), [("", bytes), (".gz", gzip.compress)]
        )
    },
    **{
        encoding: ("a.txt", "Съешь ещё этих мягких французских булок. ".encode(encoding) * 9, "another encoding")
        for encoding in ("koi8-r", "cp1251")
    },
    "gbk": ("a.txt", "世界。这是一个测试。".encode("gbk") * 9, "another encoding"),
    "shift-jis": ("a.txt", "世界。これはテストです。".encode("shift-jis") * 9, "another encoding"),
    "null bytes": ("a.txt", TEXT.encode() + b"\0", "binary data"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_other_files_are_refused_by_name(tmp_path, case):
    name, content, kind = REFUSED[case]
    content = content if case != "null bytes" else b"text\0" + content
    (tmp_path / name).write_bytes(content)
    for column in (None, "text"):
        with pytest.raises(UserError, match=rf"/{name.replace('.', '[.]')} is .*({kind})"):
            read(tmp_path / name, column)
    with pytest.raises(UserError, match=kind):
        has_several_documents(data_config(source=str(tmp_path / name)))


DAMAGED = {
    **{
        f"truncated{suffix}": (f"a.txt{suffix}", pack(random_bytes(9000).hex().encode())[:-9])
        for suffix, pack in COMPRESSIONS.items()
        if suffix
    },
    **{f"plain text named {suffix}": (f"a.txt{suffix}", TEXT.encode()) for suffix in COMPRESSIONS if suffix},
    "truncated parquet": ("a.parquet", parquet(DOCUMENTS)[:-20]),
    "parquet without magic": ("a.parquet", TEXT.encode()),
    "damaged parquet page": (
        "a.parquet",
        parquet(
            DOCUMENTS, write_page_checksum=True, compression="none", use_dictionary=False, write_statistics=False
        ).replace(b"Second", b"Third "),
    ),
}


@pytest.mark.parametrize("case", DAMAGED)
def test_damaged_files_are_named(tmp_path, case):
    name, content = DAMAGED[case]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=rf"/{name} is damaged, or its format is not \w+: "):
        read(tmp_path / name, "text" if "parquet" in name else None)


@pytest.mark.parametrize("kind", ["jsonl", "json escape", "parquet"])
@pytest.mark.parametrize("undecodable", ["replace", "refuse"])
def test_records_that_are_not_utf8_are_replaced_and_counted_or_refused(tmp_path, kind, undecodable):
    bad = b"caf\xe9 au lait"
    path = tmp_path / ("a.parquet" if kind == "parquet" else "a.jsonl")
    if kind == "parquet":
        array = pa.Array.from_buffers(pa.string(), 2, pa.array([b"good", bad], pa.binary()).buffers())
        pq.write_table(pa.table({"text": array}), path)
    else:
        record = b'{"text": "caf\\ud800 au lait"}' if kind == "json escape" else b'{"text": "%s"}' % bad
        path.write_bytes(b'{"text": "good"}\n' + record + b"\n")
    values = {"column": "text", "undecodable": undecodable}
    if undecodable == "refuse":
        with pytest.raises(UserError, match=r"(row 1|line at byte 17).*data\.undecodable=replace"):
            read(path, **values)
        return
    assert read(path, **values) == ["good", "caf\ufffd au lait"]
    manifest = prepare_text(path, val_split="documents", val_fraction=0.5, **values).manifest
    assert sum(shard.num_replaced for shard in manifest.shards()) == 1


# --- folders


def test_a_folder_skips_other_files_and_lists_them(tmp_path, caplog):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n, text in enumerate(DOCUMENTS):
        (folder / f"{n}.txt").write_text(text)
    for case in ("png", "random bytes", "csv", "tar.gz", "utf-16"):
        (folder / f"{case}-{REFUSED[case][0]}").write_bytes(REFUSED[case][1])
    (folder / "empty.json").touch()
    (folder / "rows.jsonl").write_bytes(lines(["in a record"]))
    assert sorted(read(folder, "text")) == sorted([*DOCUMENTS, "in a record"])
    message = caplog.messages[-1]
    assert "files that are read: 5 .txt (text), 1 .jsonl (jsonl); files that are skipped: " in message
    for listed in ("1 .png (binary data", "1 .txt (binary data", "1 .csv (a CSV table)", "1 .gz (gzip-compressed"):
        assert listed in message
    (folder / "rows.jsonl").unlink()
    with pytest.raises(UserError, match=r"data\.column=text is set, but .*corpus is plain text"):
        read(folder, "text")


def test_a_folder_without_text_is_refused_with_what_it_has(tmp_path):
    for case in ("png", "zip"):
        (tmp_path / REFUSED[case][0]).write_bytes(REFUSED[case][1])
    with pytest.raises(UserError, match=r"contains no text .*1 \.png \(binary data.*1 \.zip \(a ZIP archive\)"):
        read(tmp_path, None)


def test_a_single_text_among_other_files_is_split_at_its_end(tmp_path):
    (tmp_path / "a.png").write_bytes(REFUSED["png"][1])
    (tmp_path / "b.txt").write_text(TEXT)
    assert not has_several_documents(data_config(source=str(tmp_path)))
    (tmp_path / "c.txt").write_text(TEXT)
    assert has_several_documents(data_config(source=str(tmp_path)))


def test_linked_folders_are_read_once(tmp_path):
    disk, folder = tmp_path / "disk", tmp_path / "corpus"
    (disk / "below").mkdir(parents=True)
    folder.mkdir()
    (disk / "below" / "a.txt").write_text("linked")
    (folder / "b.txt").write_text("here")
    (folder / "link").symlink_to(disk)
    (disk / "cycle").symlink_to(folder)
    assert sorted(read(folder, None)) == ["here", "linked"]


@pytest.mark.parametrize("is_reversed", [False, True])
def test_names_of_documents_do_not_depend_on_the_order_of_a_listing(tmp_path, monkeypatch, is_reversed):
    (folder := tmp_path / "corpus" / "real").mkdir(parents=True)
    (folder / "a.txt").write_text("a")
    for name in ("alias", "zoo"):
        (tmp_path / "corpus" / name).symlink_to(folder)
    scan = os.scandir

    class SortedScan(ExitStack):
        """Iterator and context manager, as the result of os.scandir."""

        def __init__(self, path):
            super().__init__()
            self.entries = iter(sorted(scan(path), key=lambda entry: entry.name, reverse=is_reversed))

        def __next__(self):
            return next(self.entries)

    monkeypatch.setattr(os, "scandir", SortedScan)
    (task,) = (corpus := open_corpus(data_config(source=str(tmp_path / "corpus")))).tasks(4000)
    assert [document.name for document in corpus.documents(task)] == ["real/a.txt"]


@pytest.mark.parametrize("compression", ["", ".gz"])
@pytest.mark.parametrize("end", [b"\0", "Text in UTF-16".encode("utf-16-le")])
def test_null_bytes_after_the_beginning_of_a_text_are_refused(tmp_path, compression, end):
    text = b"x" * 9000
    (tmp_path / f"a.txt{compression}").write_bytes(COMPRESSIONS[compression](text + end))
    position = 9000 + end.index(0)
    with pytest.raises(
        UserError, match=rf"/a\.txt{compression} has a null byte at byte {position}, so it is binary data"
    ):
        read(tmp_path / f"a.txt{compression}", None)


def test_two_columns_of_the_same_name_are_refused(tmp_path):
    pq.write_table(
        pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), tmp_path / "a.parquet"
    )
    with pytest.raises(UserError, match=r"a\.parquet has 2 columns named text"):
        read(tmp_path / "a.parquet", "text")


def test_file_names_that_are_not_utf8_are_read(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n, text in enumerate(DOCUMENTS):
        Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9%d.txt" % n)).write_text(text)
    prepared = prepare_text(folder, val_split="documents", val_fraction=0.4, separator="after").folder
    found = [one for split in ("train", "val") for one in split_at(tokens_on_disk(prepared, split))]
    assert sorted(found) == sorted(text.encode() for text in DOCUMENTS)
    path = folder / os.fsdecode(b"caf\xe90.txt")
    assert sorted(read(path, None)) == DOCUMENTS[:1]
    assert prepare_text(path).manifest.origin == f"{folder}/caf\\udce90.txt"
