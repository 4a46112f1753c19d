"""Values that a new run chooses and records, data.val_split and padding; earlier runs keep theirs."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import yaml
from hydra import compose, initialize_config_dir

from commands import assert_config_error, assert_success
from gptlab.config.command import configuration_folder
from gptlab.config.resolve import resolve
from gptlab.config.resume import PADDING, identity_changes
from gptlab.config.schema import RunConfig
from gptlab.data.prepare.prepare import prepare
from gptlab.data.shards.manifest import load_manifest
from gptlab.errors import UserError
from gptlab.launch.launcher import preflight
from gptlab.launch.requeue import find_resumable_run
from gptlab.tracking.run_directory import create_run_dir, load_config
from gptlab.tracking.run_lock import RunLock

REFUSED = "data.val_split=tail requires a single document"
RECORDS = ("data=text", "data.source=docs.jsonl", "data.column=text")
SMALL = ("model=tiny", "model.block_size=32", "train.max_steps=6", "trainer=cpu")


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("GPTLAB_CACHE", str(tmp_path / "cache"))
    write_records(tmp_path)
    (tmp_path / "book.txt").write_text("it was a dark and stormy night\n" * 200)
    return tmp_path


def write_records(folder: Path) -> None:
    texts = [f"{n}: the {['cat', 'dog'][n % 2]} has a fish END" for n in range(400)]
    (folder / "docs.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def composed(*arguments: str) -> RunConfig:
    """Returns the configuration of gptlab.train with these arguments."""
    overrides = list(arguments)
    with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
        return resolve(compose("train", overrides), overrides)


def run_of(config: RunConfig, directory: Path) -> Path:
    """Creates a run directory with a checkpoint, without checking the configuration."""
    config = config.with_absolute_paths()
    prepared = prepare(config.data, config.tokenizer)
    with RunLock() as lock:
        create_run_dir(config.with_vocabulary(prepared.manifest.vocab_size), prepared.manifest, directory, lock)
    checkpoint = directory / "checkpoints" / "step_000006"
    checkpoint.mkdir(parents=True)
    (checkpoint / "state.pt").write_bytes(bytes(10**6))
    return directory


@pytest.mark.parametrize(
    ("arguments", "split"),
    [(RECORDS, "documents"), (("data=text", "data.source=book.txt"), "tail"), (("data=python_stdlib",), "documents")],
)
def test_a_run_records_the_split_that_the_default_resolves_to(folder, arguments, split):
    config = composed(*SMALL, *arguments)
    assert preflight(config).config.data.val_split == split
    earlier = run_of(composed(*SMALL, *arguments, f"data.val_split={split}"), folder / "run")
    assert identity_changes(config, load_config(earlier)) == []
    assert find_resumable_run(config, earlier)[0].resume == str(earlier)


def test_an_earlier_run_that_splits_every_document_is_resumed_unchanged(folder):
    new = (*SMALL, *RECORDS)
    earlier = run_of(composed(*new, "data.val_split=tail"), folder / "outputs" / "run")
    shutil.rmtree(folder / "cache")
    for arguments in (
        (f"resume={earlier}",),
        (f"resume={earlier}", "data.val_split=auto"),
        new,  # as for a trial or a requeued job
        (*new, "data.val_split=tail"),
    ):
        config, prepared, _ = preflight(find_resumable_run(composed(*arguments), earlier)[0])
        assert (config.resume, config.data.val_split) == (str(earlier), "tail")
        assert prepared.manifest == load_manifest(earlier)
    assert identity_changes(composed(*new, "data.val_split=documents"), load_config(earlier)) == ["data.val_split"]


def test_padding_of_the_vocabulary_is_chosen_for_a_new_run_only(folder, monkeypatch):
    new = (*SMALL, *RECORDS, "tokenizer=bytes", "trainer=auto")
    on_cpu = preflight(composed(*new)).config
    run = run_of(on_cpu, folder / "outputs" / "run")
    monkeypatch.setattr("gptlab.config.resolve.list_gpus", lambda: ("NVIDIA L4",))

    def padding(*arguments: str) -> int | str:
        return preflight(composed(*arguments)).config.model.pad_vocab_to_multiple_of

    assert on_cpu.model.pad_vocab_to_multiple_of == 1
    assert padding(*new) == 64
    assert padding(*new, "trainer=cpu") == 1
    assert padding(*new, "model.pad_vocab_to_multiple_of=8") == 8
    for start in (f"resume={run}", f"init_from={run}"):  # the shapes of the weights
        assert padding(*new, start) == 1
    assert identity_changes(composed(*new), load_config(run)) == []
    assert identity_changes(composed(*new, "model.pad_vocab_to_multiple_of=8"), load_config(run)) == [PADDING]


@pytest.mark.parametrize("extra", [(), ("init_from",)], ids=["", "init_from"])
def test_a_new_run_cannot_split_every_document(folder, extra):
    tail = (*SMALL, *RECORDS, "data.val_split=tail", "model.pad_vocab_to_multiple_of=1")
    extra = [f"init_from={run_of(composed(*tail), folder / 'run')}" for _ in extra]
    config = composed(*tail, "data.cache_dir=unwritten", *extra)
    with pytest.raises(UserError, match=REFUSED):
        preflight(config)
    assert not (folder / "unwritten").exists()
    assert preflight(composed(*SMALL, "data=text", "data.source=book.txt", *tail[-2:], *extra))


@pytest.mark.parametrize("module", ["prepare", pytest.param("plan", marks=pytest.mark.slow), "train"])
def test_a_command_that_would_split_every_document_writes_nothing(user, module):
    write_records(user.folder)
    assert_config_error(user.python(f"gptlab.{module}", *RECORDS, "data.val_split=tail"), REFUSED)
    assert not list(user.folder.glob("cache")) + list(user.folder.glob("outputs"))


# gptlab.train of an earlier version, without the check
EARLIER_VERSION = """
import runpy
from gptlab.launch import launcher
launcher.check_val_split = lambda config: None
runpy.run_module("gptlab.train", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
def test_resume_and_evaluate_keep_the_split_of_an_earlier_run_but_init_from_does_not(user):
    write_records(user.folder)
    old = (*SMALL, *RECORDS, "callbacks=checkpoint", "train.eval_every=3", "train.eval_windows=4")
    assert_success(user.run(sys.executable, "-c", EARLIER_VERSION, *old, "data.val_split=tail"))
    run = user.only_run()
    shutil.rmtree(user.folder / "cache")
    done = user.python("gptlab.evaluate", f"run={run}")
    assert_success(done)
    assert "has changed since" not in done.stdout + done.stderr
    assert_success(user.python("gptlab.train", f"resume={run}", "train.max_steps=9"))
    assert_success(user.python("gptlab.train", *old, "resume=auto", "train.max_steps=12"))
    assert run == user.only_run()
    assert yaml.safe_load((run / "config.yaml").read_text())["data"]["val_split"] == "tail"
    assert_config_error(user.python("gptlab.evaluate", f"run={run}", *RECORDS, "data.val_split=tail"), REFUSED)
    assert_success(user.python("gptlab.train", *old, f"init_from={run}", "name=new"))
    assert yaml.safe_load((user.only_run("new") / "config.yaml").read_text())["data"]["val_split"] == "documents"
    assert_config_error(
        user.python("gptlab.train", "-m", *old, "data.val_split=tail", "seed=1,2", "name=swept"), REFUSED
    )
    assert not (user.folder / "outputs" / "swept").exists()
