"""Train/val split: by document or at the end of a single text."""

import gzip
import hashlib
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from conftest import defaults
from gptlab.data.prepare import prepare
from gptlab.data.prepare.splitting import check_val_split, resolve_val_split
from gptlab.data.prepare.tasks import PrepareOptions
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.errors import UserError
from preparing import ALONE, data_config, hashes, is_in_val, prepare_text, tokens_on_disk

ANSWERS = [f"{n} and {n % 7} are {n + n % 7} END" for n in range(300)]


def documents(prepared: TokenDataset, split: str) -> list[str]:
    """Returns the documents of a split of the bytes tokenizer."""
    *texts, rest = "".join(map(chr, tokens_on_disk(prepared.folder, split))).split(chr(256))
    assert rest == ""
    return texts


def write_answers(folder: Path, kind: str) -> Path:
    rows = [{"text": answer} for answer in ANSWERS]
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    (parent := folder / "source").mkdir()
    path = parent / f"answers.{kind}"
    if kind == "jsonl":
        path.write_bytes(lines)
    elif kind == "jsonl.gz":
        path.write_bytes(gzip.compress(lines))
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=50)
    else:
        for number, answer in enumerate(ANSWERS):
            (parent / f"{number}.txt").write_text(answer)
        return parent
    return path


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "folder", "datasets", "datasets, streamed"])
def test_several_documents_are_split_by_document_by_default(tmp_path, kind, monkeypatch):
    values = {}
    if kind.startswith("datasets"):
        import datasets

        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
        folder = write_answers(tmp_path, "parquet").parent
        values = {"corpus": "huggingface", "path": str(folder), "streaming": "streamed" in kind}
    source = tmp_path / "none" if values else write_answers(tmp_path, kind)
    chosen = defaults("data/text.yaml") | (defaults("data/huggingface.yaml") if values else {})
    values |= {key: chosen[key] for key in ("val_split", "val_fraction", "split_seed")}
    column = None if kind == "folder" else "text"
    prepared = prepare_text(source, column=column, task_bytes=1000, cache_dir=str(tmp_path / "cache"), **values)
    train, val = documents(prepared, "train"), documents(prepared, "val")
    assert sorted(train + val) == sorted(ANSWERS)
    assert len(val) >= 1
    assert len(train) > 200


@pytest.mark.parametrize("kind", ["plain", "gz", "folder"])
def test_single_text_is_split_at_its_end_by_default(tmp_path, kind):
    (folder := tmp_path / "source").mkdir()
    text = "".join(f"{n} words\n" for n in range(200)).encode()
    path = folder / ("a.txt.gz" if kind == "gz" else "a.txt")
    path.write_bytes(gzip.compress(text) if kind == "gz" else text)
    (folder / "empty").touch()
    source = folder if kind == "folder" else path
    prepared, cut = (prepare_text(source, val_split=split, task_bytes=10**6) for split in ("auto", "tail"))
    eot_id = len(text) * 9 // 10
    assert [*documents(prepared, "train"), *documents(prepared, "val")] == [
        text[:eot_id].decode(),
        text[eot_id:].decode(),
    ]
    assert prepared.folder == cut.folder


@pytest.mark.parametrize(
    ("option", "split"), [("shakespeare", "tail"), ("shakespeare_char", "tail"), ("shakespeare_plays", "documents")]
)
def test_val_split_of_shakespeare_is_tail_and_of_the_plays_is_documents(option, split):
    values = defaults("data/text.yaml") | defaults(f"data/{option}.yaml")
    config = data_config(corpus=values["corpus"], val_split=values["val_split"])
    assert resolve_val_split(config).val_split == split


# --- few documents


def drawn(name: str, seed: int) -> bytes:
    return hashlib.sha256(f"{seed}\0{name}".encode()).digest()[:8]


def write_few(tmp_path: Path) -> tuple[Path, dict[str, str]]:
    """Writes five texts, each of several tasks, and an empty one."""
    (folder := tmp_path / "few").mkdir()
    texts = {f"{letter}.txt": f"{letter} is here " * 100 for letter in "abcde"}
    for name, text in {**texts, "empty.txt": ""}.items():
        (folder / name).write_text(text)
    return folder, texts


def seed_where(texts, condition) -> int:
    return next(seed for seed in range(10_000) if condition([drawn(name, seed) for name in texts], seed))


@pytest.mark.parametrize("work", [ALONE, PrepareOptions(workers=2)], ids=["alone", "two workers"])
def test_document_with_the_smallest_hash_is_val_if_val_would_be_empty(tmp_path, work):
    folder, texts = write_few(tmp_path)
    seed = seed_where(
        texts,
        lambda draws, seed: min(draws) > drawn("empty.txt", seed) and not any(is_in_val(t, 0.1, seed) for t in texts),
    )
    first = min(texts, key=lambda name: drawn(name, seed))
    prepared = prepare_text(folder, val_split="auto", val_fraction=0.1, split_seed=seed, work=work)
    assert documents(prepared, "val") == [texts[first]]
    assert documents(prepared, "train") == [text for name, text in texts.items() if name != first]
    assert len(prepared.manifest.splits["val"]) > 1


def test_document_with_the_largest_hash_is_train_if_train_would_be_empty(tmp_path):
    folder, texts = write_few(tmp_path)
    seed = seed_where(texts, lambda _, seed: all(is_in_val(name, 0.9, seed) for name in texts))
    last = max(texts, key=lambda name: drawn(name, seed))
    prepared = prepare_text(folder, val_split="documents", val_fraction=0.9, split_seed=seed)
    assert documents(prepared, "train") == [texts[last]]
    assert sorted(documents(prepared, "val")) == sorted(text for name, text in texts.items() if name != last)


@pytest.fixture
def unlucky(tmp_path) -> tuple[Path, dict]:
    """Few documents, none of which has a hash below the threshold of val."""
    folder, texts = write_few(tmp_path)
    seed = seed_where(texts, lambda _, seed: not any(is_in_val(name, 0.1, seed) for name in texts))
    return folder, {"val_split": "documents", "val_fraction": 0.1, "split_seed": seed}


def test_few_documents_are_split_identically_in_several_parts(unlucky, tmp_path):
    folder, values = unlucky
    expected = hashes(prepare_text(folder, **values, cache_dir=str(tmp_path / "expected")).folder)
    for part in (1, 2):
        with pytest.raises(UserError, match=rf"prepare\.part={part} are done"):
            prepare_text(folder, **values, work=PrepareOptions(1, part, 3))
    assert hashes(prepare_text(folder, **values, work=PrepareOptions(1, 0, 3)).folder) == expected


def test_preparation_that_left_val_empty_is_completed_with_a_val_document(unlucky, tmp_path, monkeypatch):
    folder, values = unlucky
    expected = hashes(prepare_text(folder, **values, cache_dir=str(tmp_path / "expected")).folder)
    with monkeypatch.context() as patch:
        patch.setattr(prepare, "val_threshold", lambda *_: 0.1 * 2**64)  # as in earlier versions
        with pytest.raises(UserError, match="the val split has no text"):
            prepare_text(folder, **values)
    records = list((tmp_path / "cache").rglob("task_*.json"))
    for record in records[1:]:
        content = json.loads(record.read_text())
        del content["threshold"]  # earlier versions did not write it
        record.write_text(json.dumps(content))
    assert len(records) > 5
    assert hashes(prepare_text(folder, **values).folder) == expected


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "some text", r"only one document.* data\.val_split=tail"),
        ("a.jsonl", '{"text": "some text"}\n{"text": ""}\n', r"only one document.* data\.val_split=tail"),
        ("a.jsonl", '{"text": ""}\n', "no document with text"),
    ],
)
def test_a_single_document_is_rejected_for_documents_and_accepted_for_tail(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_text(content)
    column = "text" if name == "a.jsonl" else None
    with pytest.raises(UserError, match=rf"data\.val_split=documents requires .*{path} has {message}"):
        prepare_text(path, column=column, val_split="documents")
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]
    if "one" in message:
        check_val_split(data_config(source=str(path), column=column, val_split="tail"))
        assert documents(prepare_text(path, column=column, val_split="tail"), "val") == ["t"]


# --- tail


@pytest.mark.parametrize("kind", ["jsonl", "jsonl.gz", "parquet", "folder", "datasets"])
def test_tail_with_several_documents_raises(tmp_path, kind):
    source = write_answers(tmp_path, "parquet" if kind == "datasets" else kind)
    values = {"corpus": "huggingface", "path": str(source.parent)} if kind == "datasets" else {"source": str(source)}
    config = data_config(**values, column="text", val_split="tail")
    with pytest.raises(
        UserError, match=r"data\.val_split=tail requires a single document.*Use data\.val_split=documents"
    ):
        check_val_split(config)
    check_val_split(config.model_copy(update={"val_split": "auto"}))


def test_missing_source_is_reported_for_tail_and_auto(tmp_path):
    for split in ("tail", "auto"):
        check_val_split(data_config(source=str(tmp_path / "none.jsonl"), val_split=split))
        with pytest.raises(UserError, match=r"none\.jsonl does not exist"):
            prepare_text(tmp_path / "none.jsonl", val_split=split)


def test_single_record_is_split_at_its_end_by_default(tmp_path):
    (tmp_path / "one.jsonl").write_text('{"text": "0123456789"}\n{"text": ""}\n')
    prepared = prepare_text(tmp_path / "one.jsonl", column="text", val_split="auto")
    assert documents(prepared, "train") + documents(prepared, "val") == ["012345678", "9"]
