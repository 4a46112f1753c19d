import hashlib
import json
import logging
import os
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from gptlab.data.prepare.prepare import prepare
from gptlab.data.shards.manifest import ShardWriter
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.data.sources.files import FileCorpus
from gptlab.errors import UserError
from preparing import data_config, hashes, prepare_text, state, tokenizer_config, tokens_on_disk

TEXTS = {f"{n:02d}.txt": f"Document {n}: " + "naïve 👍 text. " * (n % 7) for n in range(40)} | {"empty.txt": ""}


@pytest.fixture(autouse=True)
def _temporary_working_directory(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # the default data.cache_dir is relative to the working directory


@pytest.fixture
def source(tmp_path) -> Path:
    folder = tmp_path / "source"
    folder.mkdir()
    write(folder, TEXTS)
    return folder


def write(folder: Path, texts: dict[str, str]) -> None:
    for name, text in texts.items():
        (folder / name).write_bytes(text.encode())


def prepare_shards(path: Path | None, tokenizer: str = "bytes") -> TokenDataset:
    config = data_config(corpus="shards", path=path if path is None else str(path))
    return prepare(config, tokenizer_config(tokenizer))


def documents_on_disk(folder: Path, split: str) -> set[str]:
    """Returns the documents of a split of the bytes tokenizer."""
    assert tokens_on_disk(folder, split)[-1] == 256
    return set("".join(chr(i) for i in tokens_on_disk(folder, split)).split(chr(256))[:-1])


def test_tail_split_encodes_every_document_with_an_end_of_text_token(source):
    folder = prepare_text(source, "bytes", val_fraction=0.25).folder
    train, val = [], []
    for _, text in sorted(TEXTS.items()):
        cut = len(text) * 3 // 4
        train += [*text[:cut].encode(), 256] if text else []
        val += [*text[cut:].encode(), 256] if text else []
    assert tokens_on_disk(folder, "train") == train
    assert tokens_on_disk(folder, "val") == val
    assert len(list(folder.glob("train_*.bin"))) > 5


def test_characters_share_one_vocabulary_and_have_no_separator(source):
    write(source, {"99.txt": "abcdefghi" + "ß"})  # ß only occurs in val
    prepared = prepare_text(source, "characters")
    texts = [text for _, text in sorted({**TEXTS, "99.txt": "abcdefghiß"}.items())]
    alphabet = sorted(set("".join(texts)))
    train = "".join(text[: len(text) * 9 // 10] for text in texts)
    val = "".join(text[len(text) * 9 // 10 :] for text in texts)
    assert prepared.tokenizer.vocab_size == prepared.manifest.vocab_size == len(alphabet)
    assert tokens_on_disk(prepared.folder, "train") == [alphabet.index(character) for character in train]
    assert tokens_on_disk(prepared.folder, "val") == [alphabet.index(character) for character in val]


def test_gpt2_tokens_end_with_the_end_of_text_token(tmp_path, monkeypatch):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    write(tmp_path, {"a.txt": "hello worldhello world"})
    folder = prepare_text(tmp_path / "a.txt", "gpt2", val_fraction=0.5).folder
    assert tokens_on_disk(folder, "train") == tokens_on_disk(folder, "val") == [31373, 995, 50256]


def test_manifest_matches_the_content_of_the_files(source):
    folder = prepare_text(source, "bytes", val_split="documents", val_fraction=0.3).folder
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["origin"] == str(source)
    assert (manifest["tokenizer"], manifest["vocab_size"], manifest["dtype"]) == ({"name": "bytes"}, 257, "uint16")
    counted = 0
    for split in ("train", "val"):
        assert {shard["file"] for shard in manifest["splits"][split]} == {p.name for p in folder.glob(f"{split}_*")}
        for shard in manifest["splits"][split]:
            data = (folder / shard["file"]).read_bytes()
            ids = np.frombuffer(data, "<u2")
            assert shard["sha256"] == hashlib.sha256(data).hexdigest()
            assert shard["tokens"] == len(ids)
            assert shard["documents"] == (ids == 256).sum()
            assert shard["bytes"] == (ids != 256).sum()
            counted += shard["bytes"]
    assert counted == sum(len(text.encode()) for text in TEXTS.values())


@pytest.mark.parametrize("task_bytes", [7, 100, 10**9])
def test_task_bytes_does_not_change_the_tokens(source, task_bytes):
    by_documents = {"val_split": "documents", "val_fraction": 0.3}
    prepared = prepare_text(source, task_bytes=task_bytes, **by_documents)
    whole = prepare_text(source, task_bytes=2 * 10**9, **by_documents)
    assert [len(whole.manifest.splits[split]) for split in ("train", "val")] == [1, 1]
    for split in ("train", "val"):
        stream = prepared.stream(split)
        assert stream.read([0], len(stream))[0].tolist() == tokens_on_disk(whole.folder, split)


@pytest.mark.parametrize(("characters", "dtype"), [(2**16, "uint16"), (2**16 + 1, "uint32")])
def test_token_ids_are_stored_as_uint16_if_they_fit(tmp_path, characters, dtype):
    alphabet = "".join(chr(c) for c in range(0xE000, 0xE000 + characters))
    write(tmp_path, {"a.txt": alphabet})
    prepared = prepare_text(tmp_path / "a.txt", "characters")
    assert prepared.manifest.dtype == dtype
    cut = int(characters * 0.9)
    assert tokens_on_disk(prepared.folder, "train", {"uint16": "<u2", "uint32": "<u4"}[dtype]) == list(range(cut))
    stream = prepared.stream("val")
    assert stream.read([0], len(stream))[0].tolist() == list(range(cut, characters))


# --- documents of val


def named(folder: Path, split: str) -> set[str]:
    """Returns the document numbers, which are part of the texts."""
    return {text.split(":")[0].removeprefix("Document ") for text in documents_on_disk(folder, split)}


def test_documents_are_assigned_to_val_by_their_names_only(source):
    settings = {"val_split": "documents", "val_fraction": 0.3}
    first = prepare_text(source, **settings).folder
    train, val = named(first, "train"), named(first, "val")
    assert train | val == {str(n) for n in range(40)}
    assert not train & val

    write(source, {f"{n:02d}.txt": f"Document {n}: new" for n in range(40, 400)})
    (source / "00.txt").unlink()
    write(source, {f"{n:02d}.txt": f"Document {n}: changed" for n in range(1, 30)})
    second = prepare_text(source, **settings).folder
    assert named(second, "train") & {str(n) for n in range(40)} == train - {"0"}
    assert named(second, "val") & {str(n) for n in range(40)} == val - {"0"}
    assert len(named(second, "val")) == pytest.approx(0.3 * 399, abs=37)  # four standard deviations

    moved = source.parent / "elsewhere"
    shutil.copytree(source, moved)
    assert named(prepare_text(moved, **settings).folder, "val") == named(second, "val")
    assert named(prepare_text(source, **settings, split_seed=2).folder, "val") != named(second, "val")


def test_text_that_is_too_short_for_both_splits_raises(tmp_path):
    write(tmp_path, {"b.txt": "1"})
    for _ in range(2):
        with pytest.raises(UserError, match=r"b\.txt is empty or too short: the train split has no text"):
            prepare_text(tmp_path / "b.txt")
    assert not list((tmp_path / "cache").rglob("manifest.json"))


# --- the cache


def test_prepared_data_is_reused(source, caplog):
    caplog.set_level(logging.INFO, "gptlab")
    first = prepare_text(source)
    number = len(caplog.records)
    assert number > 0
    before = state(first.folder)
    second = prepare_text(source, limit_windows=3, num_workers=2)
    assert len(caplog.records) == number
    assert second.folder == first.folder
    assert second.manifest == first.manifest
    assert state(second.folder) == before


@pytest.mark.parametrize("change", ["longer", "touched", "added", "removed"])
def test_changed_source_is_prepared_again_and_old_data_is_kept(source, change):
    first = prepare_text(source)
    before = state(first.folder)
    if change == "longer":
        write(source, {"01.txt": TEXTS["01.txt"] + "!"})
    elif change == "touched":
        write(source, {"01.txt": TEXTS["01.txt"].replace("1", "!")})
        os.utime(source / "01.txt", ns=(0, (source / "01.txt").stat().st_mtime_ns + 1))
    elif change == "added":
        write(source, {"new.txt": "new"})
    else:
        (source / "01.txt").unlink()
    second = prepare_text(source)
    assert second.folder != first.folder
    assert second.manifest.fingerprint() != first.manifest.fingerprint()
    assert state(first.folder) == before


def test_every_config_key_that_changes_the_tokens_changes_the_directory(source):
    changes = [{}, {"tokenizer": "characters"}, {"val_fraction": 0.2}, {"task_bytes": 500}]
    changes += [
        {"separator": "before"},
        {"tokenizer": "bpe", "vocab_size": 260, "train_mb": 1.0},
        {"tokenizer": "bpe", "vocab_size": 270, "train_mb": 1.0},
    ]
    by_documents = {"val_split": "documents", "val_fraction": 0.3}
    changes += [by_documents, by_documents | {"split_seed": 2}]
    prepared = [prepare_text(source, **change) for change in changes]
    assert (
        len({one.folder for one in prepared}) == len({one.manifest.fingerprint() for one in prepared}) == len(changes)
    )


@pytest.mark.parametrize("where", ["corpus", "shard"])
def test_preparation_resumes_after_an_error_with_the_remaining_tasks(source, monkeypatch, where):
    def documents(self, task, read=FileCorpus.documents):
        for document in read(self, task):
            if document.name == "20.txt":
                raise OSError("the disk is gone")
            yield document

    def add(self, ids, text_bytes, documents, num_replaced, add=ShardWriter.add):
        if self.path.name == "val_000003.bin":
            raise OSError("the disk is gone")
        add(self, ids, text_bytes, documents, num_replaced)

    expected = hashes(prepare_text(source, cache_dir=str(source.parent / "other")).folder)
    with monkeypatch.context() as patch:
        if where == "corpus":
            patch.setattr(FileCorpus, "documents", documents)
        else:
            patch.setattr(ShardWriter, "add", add)
        with pytest.raises(OSError, match="the disk is gone"):
            prepare_text(source)
    (folder,) = [path for path in (source.parent / "cache").glob("*-*") if path.is_dir()]
    kept = {name: when for name, when in state(folder).items() if name.endswith(".bin")}
    assert "train_000000.bin" in kept
    assert len(kept) < len(expected) - 1
    assert {name: expected[name] for name in kept} == {name: hashes(folder)[name] for name in kept}
    assert not [name for name in state(folder) if name.startswith(".") or name == "manifest.json"]

    assert prepare_text(source).folder == folder
    assert hashes(folder) == expected
    assert {name: state(folder)[name] for name in kept} == kept


def test_directory_without_a_manifest_is_completed_and_stale_files_are_deleted(source):
    folder = prepare_text(source).folder
    expected = hashes(folder)
    (folder / "manifest.json").unlink()
    (folder / "train_000002.bin").unlink()
    (folder / "train_000099.bin").write_bytes(b"what a killed process left")
    (folder / ".val_000001.bin.123").write_bytes(b"what a killed process left")
    assert prepare_text(source).folder == folder
    assert hashes(folder) == expected


def test_concurrent_calls_prepare_the_data_once(source, caplog):
    caplog.set_level(logging.INFO, "gptlab")
    together = threading.Barrier(4)

    def ask(_):
        together.wait()
        return prepare_text(source)

    with ThreadPoolExecutor(4) as threads:
        prepared = list(threads.map(ask, range(4)))
    assert sum(message.startswith("Preparing ") for message in caplog.messages) == 1
    assert [one.manifest for one in prepared] == [prepared[0].manifest] * 4


def test_truncated_shard_in_the_cache_is_reported(source):
    path = prepare_text(source).folder / "train_000001.bin"
    size = path.stat().st_size
    os.truncate(path, size - 1)
    with pytest.raises(UserError, match=rf"{path} has {size - 1:,} bytes, but its manifest requires {size:,} bytes"):
        prepare_text(source)


def test_cache_dir_that_cannot_be_created_is_reported(source, tmp_path):
    write(tmp_path, {"file": "x"})
    for cache_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match=rf"data\.cache_dir={cache_dir} cannot be created"):
            prepare_text(source, cache_dir=str(cache_dir))


# --- data=shards


@pytest.mark.parametrize("pattern", ["", "*", "*.bin", "train_*.bin", "manifest.json"])
def test_shards_are_found_by_directory_or_glob(source, pattern):
    prepared = prepare_text(source)
    found = prepare_shards(prepared.folder / pattern)
    assert (found.folder, found.manifest) == (prepared.folder, prepared.manifest)
    assert found.tokenizer.record() == {"name": "bytes"}


def test_shards_include_their_characters(source):
    prepared = prepare_text(source, "characters")
    moved = prepared.folder.rename(source.parent / "moved")
    shutil.rmtree(source)
    ids = tokens_on_disk(moved, "train")
    assert prepare_shards(moved, "characters").tokenizer.decode(ids[:10]) == "Document 0"


def test_directory_name_with_glob_characters_is_accepted(source):
    moved = prepare_text(source).folder.rename(source.parent / "run [1]*")
    assert prepare_shards(moved).folder == moved


def test_unusable_shards_raise(source, tmp_path):
    folder = prepare_text(source).folder
    for copy in ("copy", "copy2"):
        shutil.copytree(folder, tmp_path / copy)
    with pytest.raises(UserError, match=r"data=shards requires data\.path="):
        prepare_shards(None)
    with pytest.raises(UserError, match=r"data\.path=.*/none/\*\.bin matches nothing"):
        prepare_shards(tmp_path / "none" / "*.bin")
    with pytest.raises(UserError, match=r"data\.path=.* matches files in 2 directories"):
        prepare_shards(tmp_path / "copy*" / "*.bin")
    with pytest.raises(UserError, match=rf"data\.path={source} has neither a manifest.json nor token files"):
        prepare_shards(source)
    with pytest.raises(UserError, match=rf"{folder} was prepared with tokenizer=bytes, not with tokenizer=gpt2"):
        prepare_shards(folder, "gpt2")
    os.truncate(tmp_path / "copy" / "val_000000.bin", 2)
    with pytest.raises(UserError, match=r"copy/val_000000\.bin has 2 bytes"):
        prepare_shards(tmp_path / "copy")


# --- tinyshakespeare, whose counts nanoGPT publishes (data/shakespeare and data/shakespeare_char)


@pytest.mark.skipif(
    "GPTLAB_TINYSHAKESPEARE" not in os.environ,
    reason="GPTLAB_TINYSHAKESPEARE is not set to the path of tinyshakespeare's input.txt (1.1 MB, a public download)",
)
@pytest.mark.parametrize(
    ("tokenizer", "vocab_size", "train", "val"),
    [("characters", 65, 1_003_854, 111_540), ("gpt2", 50_257, 301_966 + 1, 36_059 + 1)],
)
def test_tinyshakespeare_has_the_published_token_counts(tmp_path, monkeypatch, tokenizer, vocab_size, train, val):
    monkeypatch.setenv("TIKTOKEN_CACHE_DIR", str(tmp_path / "tiktoken"))
    path = Path(os.environ["GPTLAB_TINYSHAKESPEARE"])
    prepared = prepare_text(path, tokenizer, corpus="shakespeare", cache_dir=str(tmp_path), task_bytes=10**8)
    assert prepared.manifest.vocab_size == vocab_size
    for split, tokens in (("train", train), ("val", val)):
        assert prepared.manifest.tokens(split) == tokens
        (file,) = prepared.folder.glob(f"{split}_*.bin")
        assert file.stat().st_size == 2 * tokens
    text = path.read_text()
    assert [shard.bytes for shard in prepared.manifest.splits["train"]] == [1_003_854]
    train_ids = tokens_on_disk(prepared.folder, "train")
    assert prepared.tokenizer.decode(train_ids).removesuffix("<|endoftext|>") == text[:1_003_854]


@pytest.mark.parametrize("broken", [0, 2])
def test_invalid_utf8_is_counted_and_logged(tmp_path, caplog, broken):
    folder = tmp_path / "source"
    folder.mkdir()
    for number in range(4):
        (folder / f"{number}.txt").write_bytes(b"good text " * 9 + b"\xff" * (number < broken))
    prepared = prepare_text(folder)
    assert sum(shard.num_replaced for shard in prepared.manifest.shards()) == broken
    assert ("U+FFFD (number of documents: 2)" in caplog.text) == bool(broken)


def test_cache_dir_inside_the_source_raises(source):
    with pytest.raises(UserError, match=r"is inside data\.source=.*Choose a directory outside"):
        prepare_text(source, cache_dir=str(source / "cache"))
    assert not (source / "cache").exists()


def test_glob_of_prepared_directories_ignores_lock_files(source):
    folder = prepare_text(source).folder
    assert prepare_shards(folder.parent / "text-bytes-*").folder == folder
