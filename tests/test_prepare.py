"""The prepare command, end to end."""

import numpy as np
import pytest

from commands import assert_success
from gptlab.data.shards.manifest import load_manifest

TEXT = ("data=text", "data.source=text.txt")
SMALL = (*TEXT, "data.task_bytes=10000")


def prepared(user):
    (folder,) = (path for path in (user.folder / "cache").glob("*-*") if path.is_dir())
    return folder


def test_inspect_shows_the_data_of_a_run(user, halted):
    shown = user.python("gptlab.prepare", f"inspect={halted}", "verify=true")
    assert_success(shown)
    assert "Verified 2 shards" in shown.stdout
    assert f"{load_manifest(halted).tokens('train'):,}" in shown.stdout


def test_verification_accepts_written_shards_and_finds_a_flipped_bit(user):
    assert_success(user.python("gptlab.prepare", *SMALL))
    folder = prepared(user)
    tokens = len((user.folder / "text.txt").read_bytes())
    shown = user.python("gptlab.prepare", f"inspect={folder}", "verify=true")
    assert_success(shown)
    shards = len(list(folder.glob("*.bin")))
    assert shards > 5
    assert f"Verified {shards} shards" in shown.stdout
    assert f"{tokens * 9 // 10:,}" in shown.stdout  # tokens of the train split, without an end-of-text token
    assert "line 0: the cat has 0 of 0" in shown.stdout
    path = next(folder.glob("train_000002.bin"))
    content = bytearray(path.read_bytes())
    content[7] ^= 0x10
    path.write_bytes(content)
    found = user.python("gptlab.prepare", f"inspect={folder}", "verify=true")
    assert found.returncode == 2
    assert "train_000002.bin has changed" in found.stderr


@pytest.mark.slow
def test_parts_on_several_machines_are_merged(user):
    for part in (2, 0, 1):
        done = user.python("gptlab.prepare", *SMALL, f"prepare.part={part}", "prepare.parts=3")
    assert_success(done)  # the last part finds all tasks done
    assert_success(user.python("gptlab.prepare", *SMALL, "merge=true"))
    assert (prepared(user) / "manifest.json").exists()


def test_missing_parts_are_an_error(user):
    done = user.python("gptlab.prepare", *SMALL, "prepare.part=1", "prepare.parts=3")
    assert done.returncode == 2
    assert "prepare.part=1 are done" in done.stderr
    assert "merge=true" in done.stderr


@pytest.mark.slow
def test_replay_prints_the_windows_of_a_training_step(user):
    assert_success(user.train("train.max_steps=2", "train.global_batch_size=2", "trainer=cpu"))
    shown = user.python("gptlab.prepare", f"replay={user.only_run()}", "step=2")
    assert_success(shown)
    assert shown.stdout.count("window ") == 2
    assert "window 1, starting at token " in shown.stdout


@pytest.mark.slow
@pytest.mark.parametrize("form", ["llmc", pytest.param("nanogpt", marks=pytest.mark.slow)])
def test_converted_shards_have_the_original_tokens_and_can_be_trained_on(user, form):
    assert_success(user.python("gptlab.prepare", *SMALL))
    folder = prepared(user)
    assert_success(user.python("gptlab.prepare", f"convert={folder}", f"format={form}", "out=theirs"))
    files = sorted((user.folder / "theirs").glob("train*"))
    header = 1024 if form == "llmc" else 0
    theirs = np.concatenate([np.frombuffer(path.read_bytes()[header:], "<u2") for path in files])
    ours = np.concatenate([np.fromfile(path, "<u2") for path in sorted(folder.glob("train*"))])
    assert theirs.tolist() == ours.tolist()
    small = ("model=tiny", "train.max_steps=1", "train.eval_windows=2", "callbacks=none")
    assert_success(user.python("gptlab.train", "data=shards", "data.path=theirs/*.bin", *small))


@pytest.mark.slow
def test_training_and_sampling_use_a_trained_tokenizer(user):
    assert_success(user.train("tokenizer=bpe", "tokenizer.vocab_size=300", "train.max_steps=2"))
    sampled = user.python("gptlab.sample", f"run={user.only_run()}", "prompt=the cat é", "max_new_tokens=3")
    assert_success(sampled)
    assert sampled.stdout.startswith("the cat é")


@pytest.mark.slow
def test_a_run_is_not_resumed_on_other_data(user):
    assert_success(user.train())
    directory = user.only_run()
    text = user.folder / "text.txt"
    text.write_text(text.read_text().replace("cat", "cow"))
    done = user.python("gptlab.train", f"resume={directory}", "train.max_steps=9")
    assert done.returncode == 2
    assert f"differs from the training data of {directory}: its fingerprint is" in done.stderr


@pytest.mark.slow
def test_a_run_is_not_resumed_on_overwritten_or_removed_shards(user):
    assert_success(user.train("data.task_bytes=10000"))
    directory = user.only_run()
    one, other = (prepared(user) / name for name in ("train_000001.bin", "train_000002.bin"))
    content = one.read_bytes(), other.read_bytes()
    assert content[0] != content[1]
    size = min(map(len, content))

    one.write_bytes(content[1][:size] + content[0][size:])  # of unchanged size
    done = user.python("gptlab.train", f"resume={directory}", "train.max_steps=9")
    assert done.returncode == 2
    assert f"{one} has changed" in done.stderr

    one.unlink()
    done = user.python("gptlab.train", f"resume={directory}", "train.max_steps=9")
    assert done.returncode == 2
    assert f"{one} is missing, but its manifest requires {len(content[0]):,} bytes" in done.stderr
