"""Losses of several corpora during training, compared with those of ``gptlab.evaluate``."""

import json

import pytest

from commands import assert_config_error, assert_success, metrics

pytestmark = pytest.mark.slow  # whole runs

CORPORA = (
    "callbacks=[checkpoint,eval_corpora]",
    "+callbacks.eval_corpora.corpora.songs.source=songs.txt",
    "+callbacks.eval_corpora.corpora.notes.source=notes.jsonl",
    "+callbacks.eval_corpora.corpora.notes.column=body",
    "callbacks.eval_corpora.batch_size=4",
    "train.ema_decay=0.9",  # the average is evaluated
)


@pytest.fixture
def writer(user):
    """User with two more corpora, whose numbers of batches are not even."""
    (user.folder / "songs.txt").write_text("the cow has 3 of 4\nline 7: a cat\n" * 30)
    rows = [{"body": f"line {i}: the dog has {i * 7 % 13} of it"} for i in range(40)]
    (user.folder / "notes.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return user


def evaluated(user, directory, name: str, *data: str) -> tuple[float, float]:
    assert_success(user.python("gptlab.evaluate", f"run={directory}", "data=text", *data, "split=all", f"out={name}"))
    (path,) = (user.folder / name).glob("*.json")
    found = json.loads(path.read_text())
    return found["loss"], found["bits_per_byte"]


@pytest.mark.parametrize(
    ("tokenizer", "name", "data"),
    [
        ("bytes", "songs", ("data.source=songs.txt",)),
        pytest.param("characters", "notes", ("data.source=notes.jsonl", "data.column=body"), marks=pytest.mark.slow),
    ],
)
def test_losses_are_those_of_evaluate(writer, tokenizer, name, data):
    assert_success(writer.train(*CORPORA, f"tokenizer={tokenizer}", "callbacks.eval_corpora.every=4"))
    directory = writer.only_run()
    loss, bits_per_byte = evaluated(writer, directory, name, *data)
    assert metrics(directory, f"val/{name}/loss") == {6: pytest.approx(loss, rel=1e-6)}  # the last step
    assert metrics(directory, f"val/{name}/bits_per_byte") == {6: pytest.approx(bits_per_byte, rel=1e-6)}


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_losses_on_two_processes_are_those_of_one(writer, strategy):
    assert_success(writer.train("name=one", *CORPORA))
    assert_success(writer.train("name=two", *CORPORA, f"trainer={strategy}", "trainer.devices=2"))
    for name in ("val/songs/loss", "val/notes/bits_per_byte"):
        one, two = (metrics(writer.only_run(run), name) for run in ("one", "two"))
        assert one.keys() == {3, 6}
        assert two == pytest.approx(one, abs=1e-5), name


@pytest.mark.parametrize(
    ("override", "message"),
    [
        (
            "+callbacks.eval_corpora.corpora.other.source=none.txt",
            "callbacks.eval_corpora.corpora.other.source=none.txt",
        ),
        ("+callbacks.eval_corpora.corpora.other.file=a", "corpora.other needs a source"),
        (
            "+callbacks.eval_corpora.corpora.notes.colum=a",
            "Unknown config key callbacks.eval_corpora.corpora.notes.colum",
        ),
    ],
)
def test_an_invalid_corpus_is_reported_before_anything_is_written(writer, override, message):
    assert_config_error(writer.train(*CORPORA, override), message)
    assert not (writer.folder / "outputs").exists()
