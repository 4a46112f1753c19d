"""Readers of one's own: their documents become shards, their mistakes become messages."""

import json
from pathlib import Path

import pytest

from gptlab.data.prepare import prepare as preparation
from gptlab.data.prepare.prepare import find_prepared, prepare
from gptlab.data.prepare.tasks import PrepareOptions
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.errors import UserError
from own_parts import forget, write_package, write_pages
from preparing import ALONE, data_config, prepare_text, tokenizer_config, tokens_on_disk


@pytest.fixture(autouse=True)
def package(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    forget()
    yield write_package(tmp_path)
    forget()


def reader_config(name: str, values: dict | None = None, **arguments):
    component = {"_target_": f"mylab.readers.{name}", **arguments}
    settings = {"corpus": "component", "reader": component, "val_split": "documents", "cache_dir": "cache"}
    return data_config(**settings | (values or {}))


def prepare_reader(name: str, work: PrepareOptions = ALONE, values: dict | None = None, **arguments) -> TokenDataset:
    return prepare(reader_config(name, values, **arguments), tokenizer_config("bytes"), work)


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.glob("*.bin")}


@pytest.fixture
def records(tmp_path) -> Path:
    path = tmp_path / "docs.jsonl"
    lines = (json.dumps({"text": f"Document {n}: " + "naïve 👍 text. " * (n % 7)}) for n in range(300))
    path.write_text("".join(f"{line}\n" for line in lines))
    return path


WHOLE = {"val_split": "documents", "task_bytes": 10**9}


def test_shards_are_those_of_a_file_with_the_same_documents(records):
    own = prepare_reader("Named", values=WHOLE, path="docs.jsonl")
    by_text = prepare_text(records, column="text", **WHOLE)
    assert contents(own.folder) == contents(by_text.folder)
    assert own.manifest.fingerprint() == by_text.manifest.fingerprint()
    assert own.manifest.splits == by_text.manifest.splits


def test_tasks_and_workers_do_not_change_the_tokens(records):
    by_text = prepare_text(records, column="text", **WHOLE)
    own = prepare_reader("Named", PrepareOptions(workers=2), {"task_bytes": 2000}, path="docs.jsonl")
    assert len(own.manifest.splits["train"]) > 5
    for split in ("train", "val"):
        assert tokens_on_disk(own.folder, split) == tokens_on_disk(by_text.folder, split)


def test_parts_of_several_machines_give_the_same_shards(records):
    whole = prepare_reader("Named", values={"task_bytes": 2000, "cache_dir": "one"}, path="docs.jsonl")
    for part in (1, 0):
        work, values = PrepareOptions(1, part, 2), {"task_bytes": 2000}
        if part:
            with pytest.raises(UserError, match="merge=true"):
                prepare_reader("Named", work, values, path="docs.jsonl")
        else:
            parts = prepare_reader("Named", work, values, path="docs.jsonl")
    assert contents(parts.folder) == contents(whole.folder)


def test_only_shards_and_manifest_remain(tmp_path):
    write_pages(tmp_path / "pages.txt")
    folder = prepare_reader("Pages", path="pages.txt").folder
    assert {path.suffix for path in folder.iterdir()} == {".bin", ".json"}
    assert [path.name for path in folder.glob("*.json")] == ["manifest.json"]


def test_a_single_document_can_be_split_by_tail(tmp_path):
    (tmp_path / "pages.txt").write_text("0123456789")
    prepared = prepare_reader("Pages", values={"val_split": "tail", "val_fraction": 0.2}, path="pages.txt")
    assert bytes(tokens_on_disk(prepared.folder, "val")[:-1]) == b"89"


# --- cache


def test_prepared_data_is_found_without_running_the_reader(tmp_path):
    write_pages(tmp_path / "pages.txt")
    first = prepare_reader("Pages", path="pages.txt")
    (tmp_path / "pages.txt").unlink()
    assert prepare_reader("Pages", path="pages.txt").folder == first.folder
    assert find_prepared(reader_config("Pages", path="pages.txt"), tokenizer_config("bytes")) == first.manifest


def test_editing_the_reader_prepares_the_data_again(tmp_path, package):
    write_pages(tmp_path / "pages.txt")
    first = prepare_reader("Pages", path="pages.txt")
    source = package / "readers.py"
    source.write_text(source.read_text().replace("yield from self.path", "yield 'new'\n        yield from self.path"))
    forget()
    second = prepare_reader("Pages", path="pages.txt")
    assert second.folder != first.folder
    assert second.manifest.fingerprint() != first.manifest.fingerprint()


def test_arguments_and_the_fingerprint_of_the_reader_are_in_the_key(tmp_path):
    path = write_pages(tmp_path / "pages.txt")
    path.write_text(path.read_text() + "\n===\nlast page")
    folders = {prepare_reader("Watched", path="pages.txt").folder}
    folders.add(prepare_reader("Watched", path="pages.txt", separator="===").folder)
    assert prepare_reader("Watched", path="pages.txt").folder in folders
    path.write_text(path.read_text() + "!")
    folders.add(prepare_reader("Watched", path="pages.txt").folder)
    assert len(folders) == 3


def test_an_interrupted_preparation_resumes_without_running_the_reader_again(tmp_path, monkeypatch):
    path = write_pages(tmp_path / "pages.txt")
    expected = contents(prepare_reader("Pages", values={"cache_dir": "other"}, path="pages.txt").folder)
    with monkeypatch.context() as patch:
        patch.setattr(preparation, "run_tasks", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            prepare_reader("Pages", path="pages.txt")
    path.unlink()
    assert contents(prepare_reader("Pages", path="pages.txt").folder) == expected


# --- mistakes


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Page", {}, r"data\.reader\._target_=mylab\.readers\.Page cannot be imported"),
        ("Unrelated", {}, r"not a subclass of .*DocumentReader"),
        ("Unfinished", {}, r"has no method documents\(\)"),
        ("Pages", {}, r"data\.reader\.path is missing"),
        ("Pages", {"path": "x", "seperator": "-"}, r"Unknown argument data\.reader\.seperator.*separator"),
        ("Pages", {"path": 3}, r"data\.reader\.path=3 is not valid: it should be a string"),
        ("Numbers", {}, r"yields 3 as document 1, which is neither a text nor a pair"),
        ("Empty", {}, r"mylab\.readers\.Empty yields no documents"),
    ],
)
def test_a_mistake_is_an_error_and_leaves_no_data(tmp_path, name, arguments, message):
    with pytest.raises(UserError, match=message):
        prepare_reader(name, **arguments)
    assert not [path for path in tmp_path.glob("cache/*") if path.is_dir()]


@pytest.mark.parametrize("name", ["Page", "Unrelated", "Unfinished", "Pages"])
def test_mistakes_in_the_configuration_are_found_before_anything_is_written(tmp_path, name):
    with pytest.raises(UserError, match=r"data\.reader"):
        prepare_reader(name)
    assert not (tmp_path / "cache").exists()


def test_an_exception_of_the_reader_is_raised_and_leaves_no_data(tmp_path):
    with pytest.raises(ZeroDivisionError, match="a bug in the reader") as raised:
        prepare_reader("Failing")
    assert raised.traceback[-1].path.name == "readers.py"
    assert not [path for path in tmp_path.glob("cache/*") if path.is_dir()]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"corpus": "component"}, "corpus=component requires data.reader"),
        ({"reader": {"_target_": "x"}}, "only used with data=component"),
    ],
)
def test_corpus_and_reader_belong_together(values, message):
    with pytest.raises(ValueError, match=message):
        data_config(**values)
