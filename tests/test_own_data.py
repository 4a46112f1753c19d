"""Runs with a reader and a tokenizer of one's own, and commands that are given a stranger's."""

import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from commands import metrics, weights
from gptlab.exit_codes import CONFIG_ERROR, DONE
from own_parts import write_package, write_pages
from processes import TWO

OPTIONS = {
    "data/pages.yaml": {
        "defaults": ["component"],
        "reader": {"_target_": "mylab.readers.Pages", "path": "pages.txt"},
    },
    "tokenizer/utf8.yaml": {"_target_": "mylab.tokenizers.Utf8", "shift": 3},
}
OWN = ("data=pages", "tokenizer=utf8")
LENGTH = ("model=tiny", "model.block_size=32", "train.eval_every=3", "train.eval_windows=4", "schedule.decay_steps=6")


@pytest.fixture
def lab(user):
    """User with a package, options that name its parts, and pages."""
    write_package(user.folder)
    write_pages(user.folder / "pages.txt")
    for name, values in OPTIONS.items():
        path = user.folder / "conf" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(yaml.safe_dump(values))
    return user


def train(lab, *arguments: str, status: int = DONE):
    done = lab.python("gptlab.train", *OWN, *LENGTH, *arguments)
    assert done.returncode == status, done.stdout + done.stderr
    return done


@pytest.mark.slow
def test_a_resumed_run_is_bit_identical(lab):
    train(lab, "name=whole", "train.max_steps=6")
    train(lab, "name=halted", "train.max_steps=3", "callbacks=checkpoint")
    whole, halted = lab.only_run("whole"), lab.only_run("halted")
    done = lab.python("gptlab.train", f"resume={halted}", "train.max_steps=6", "trust=mylab")
    assert done.returncode == DONE, done.stdout + done.stderr
    assert metrics(halted, "val/loss")[6] == metrics(whole, "val/loss")[6]
    theirs = weights(whole)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(halted).items())


@pytest.mark.slow
def test_two_processes_train_with_own_data(lab):
    train(lab, *TWO, "name=two", "train.max_steps=3")
    train(lab, "name=one", "train.max_steps=3")
    two, one = (metrics(lab.only_run(name), "train/loss") for name in ("two", "one"))
    assert two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
def test_a_sweep_trains_with_own_data(lab):
    done = lab.python("gptlab.train", "-m", *OWN, *LENGTH, "train.max_steps=3", "seed=1,2")
    assert done.returncode == DONE, done.stdout + done.stderr
    assert len(list(lab.folder.glob("outputs/*/*/*/metrics.csv"))) == 2


def test_the_examples_of_the_docs_work(user):
    page = (Path(__file__).parents[1] / "docs" / "data.md").read_text()
    for name, content in re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", page, re.DOTALL):
        path = user.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    write_pages(user.folder / "pages.txt")
    (user.folder / "words.txt").write_text("Page\ntext\nnaïve")
    done = user.python("gptlab.prepare", "data=pages", "tokenizer=words")
    assert done.returncode == DONE, done.stdout + done.stderr
    (named,) = user.folder.glob("cache/component-*/")
    commands = re.findall(r"python -m gptlab.prepare (.*mylab.*)", page)
    assert len(commands) == 2
    done = user.python("gptlab.prepare", *(word for command in commands for word in command.split()))
    assert done.returncode == DONE, done.stdout + done.stderr
    assert list(user.folder.glob("cache/component-*/")) == [named]  # both are the same configuration


def test_a_mistake_is_one_sentence_and_nothing_is_written(lab):
    before = set(lab.folder.rglob("*"))
    done = train(lab, "+data.reader.seperator=x", status=CONFIG_ERROR)
    assert "data.reader.seperator" in done.stderr
    assert "Traceback" not in done.stderr
    assert {path for path in set(lab.folder.rglob("*")) - before if "__pycache__" not in path.parts} == set()


def test_an_exception_of_the_reader_has_a_traceback(lab):
    done = lab.python(
        "gptlab.prepare", "data=component", "data.reader._target_=mylab.readers.Failing", "tokenizer=bytes"
    )
    assert done.returncode not in (DONE, CONFIG_ERROR)
    assert "a bug in the reader" in done.stderr
    assert "mylab/readers.py" in done.stderr
    assert not list(lab.folder.glob("cache/*/manifest.json"))


# --- a stranger's run directory and prepared data


@pytest.fixture
def stranger(lab):
    """Run directory and prepared data of a stranger, whose package creates a file when it is imported."""
    theirs = write_package(lab.folder, "stranger")
    (theirs / "__init__.py").write_text("from pathlib import Path\n\nPath('attacked').touch()\n")
    arguments = ("data.reader._target_=stranger.readers.Pages", "tokenizer._target_=stranger.tokenizers.Utf8")
    train(lab, "name=stranger", "train.max_steps=3", *arguments)
    attacked = lab.folder / "attacked"
    attacked.unlink()  # the payload works
    (folder,) = (lab.folder / "cache").glob("component-stranger*/")
    shutil.move(folder, lab.folder / "shards")
    return lab, attacked


def commands(lab) -> dict[str, tuple[str, ...]]:
    """Returns the commands that read a run directory or prepared data, each with its arguments."""
    run, shards = lab.only_run("stranger"), "shards"
    return {
        "resume": ("gptlab.train", f"resume={run}", "train.max_steps=4"),
        "shards": ("gptlab.train", "data=shards", f"data.path={shards}", "tokenizer=bytes", *LENGTH),
        "plan": ("gptlab.plan", f"resume={run}"),
        "sample": ("gptlab.sample", f"run={run}", "max_new_tokens=4"),
        "evaluate": ("gptlab.evaluate", f"run={run}", "windows=1"),
        "other text": ("gptlab.evaluate", f"run={run}", "data=text", "data.source=text.txt", "windows=1"),
        "export": ("gptlab.export", f"run={run}", "format=hf", "out=hf"),
        "inspect": ("gptlab.prepare", f"inspect={shards}"),
        "replay": ("gptlab.prepare", f"replay={run}"),
    }


@pytest.mark.slow
def test_a_strangers_parts_are_not_imported(stranger):
    lab, attacked = stranger
    for name, command in commands(lab).items():
        done = lab.python(*command)
        assert done.returncode == CONFIG_ERROR, f"{name}: {done.stdout}{done.stderr}"
        assert "stranger" in done.stderr, name
        assert "Traceback" not in done.stderr, name
        assert not attacked.exists(), name


@pytest.mark.slow
def test_a_strangers_parts_are_used_if_they_are_trusted(stranger):
    lab, attacked = stranger
    for name, command in commands(lab).items():
        if name == "shards":  # the message names the tokenizer of the shards
            command = (*command[:3], "tokenizer=component", "tokenizer._target_=stranger.tokenizers.Utf8", *LENGTH)
            command = (*command, "+tokenizer.shift=3", "train.max_steps=3")
        done = lab.python(*command, "trust=[stranger]")
        assert done.returncode == DONE, f"{name}: {done.stdout}{done.stderr}"
        assert attacked.exists(), name
        attacked.unlink()


@pytest.mark.slow
def test_a_strangers_reader_is_not_imported(lab):
    theirs = write_package(lab.folder, "stranger")
    (theirs / "__init__.py").write_text("from pathlib import Path\n\nPath('attacked').touch()\n")
    train(lab, "name=stranger", "train.max_steps=3", "data.reader._target_=stranger.readers.Pages", "tokenizer=bytes")
    attacked = lab.folder / "attacked"
    attacked.unlink()  # the payload works
    for name in ("resume", "plan", "evaluate", "replay"):
        done = lab.python(*commands(lab)[name])
        assert done.returncode == CONFIG_ERROR, f"{name}: {done.stdout}{done.stderr}"
        assert "data.reader._target_=stranger.readers.Pages" in done.stderr, name
        assert not attacked.exists(), name


def test_prepared_data_is_verified_and_converted_without_its_tokenizer(stranger):
    lab, attacked = stranger
    done = lab.python("gptlab.prepare", "convert=shards", "format=nanogpt", "out=converted")
    assert done.returncode == DONE, done.stdout + done.stderr
    written = (lab.folder / "converted" / "train.bin").read_bytes()
    assert written == b"".join(path.read_bytes() for path in sorted((lab.folder / "shards").glob("train_*.bin")))
    done = lab.python("gptlab.prepare", "inspect=shards", "verify=true")
    assert "the SHA-256 of each is unchanged" in done.stdout
    assert "stranger.tokenizers.Utf8 in shards would run code" in done.stderr
    assert not attacked.exists()


@pytest.mark.slow
def test_an_export_without_its_tokenizer_says_so(lab):
    train(lab, "name=own", "train.max_steps=3")
    run = lab.only_run("own")
    lab.environment["GPTLAB_TRUST"] = "mylab"
    done = lab.python("gptlab.export", f"run={run}", "format=hf", "out=hf")
    assert done.returncode == DONE, done.stdout + done.stderr
    assert "tokenizer, which was not exported" in (Path(lab.folder) / "hf" / "README.md").read_text()
    assert not (lab.folder / "hf" / "tokenizer.json").exists()
    done = lab.python("gptlab.export", f"run={run}", "format=gguf", "out=gguf", "dtype=float32")
    assert done.returncode == CONFIG_ERROR
    assert "Traceback" not in done.stderr
