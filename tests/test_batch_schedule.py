"""Growing batches, end to end: the tokens of each step are compared with the permutation of the text."""

import hashlib
import json
from itertools import accumulate

import numpy as np
import pytest
import torch

from commands import assert_success, metrics
from gptlab.data.batches import Batch
from gptlab.data.order import WindowOrder
from gptlab.training.callbacks.determinism_trace import format_sums, hash_windows

GROWING = ("train.batch_schedule=[[2,4],[4,8]]", "schedule.decay_steps=6", "callbacks=[checkpoint,trace]")
SIZES = [4, 4, 8, 8, 12, 12]  # batch sizes of the six steps
TWO = ("trainer=ddp", "trainer.devices=2")


def traced(directory) -> list[str]:
    return [json.loads(line)["tokens"] for line in (directory / "trace.jsonl").read_text().splitlines()]


def expected(user) -> list[str]:
    """Returns the hash of the tokens of every step, computed from the text file."""
    text = (user.folder / "text.txt").read_text()
    cut = int(len(text) * 0.9)
    splits = {"train": [*text[:cut].encode()], "val": [*text[cut:].encode(), 256]}
    hashes = {name: [hashlib.sha256(np.array(ids, dtype="<u2")).hexdigest()] for name, ids in splits.items()}
    fingerprint = hashlib.sha256(json.dumps([{"name": "bytes"}, hashes], sort_keys=True).encode()).hexdigest()
    order = WindowOrder([len(splits["train"])], 32, 1337, fingerprint, "shuffled", 1, None)
    starts = np.split(order.starts(np.arange(sum(SIZES))), np.cumsum(SIZES)[:-1])
    windows = [torch.tensor([splits["train"][start : start + 33] for start in step]) for step in starts]
    return [format_sums(hash_windows(Batch(step[:, :-1], step[:, 1:], None))) for step in windows]


@pytest.fixture
def grown(user, runs):
    return runs.give(user, "grown", *GROWING)


def test_every_step_has_its_batch_size_and_the_run_records_it(user, grown):
    tokens = [32 * windows for windows in accumulate(SIZES)]
    assert traced(grown) == expected(user)
    assert metrics(grown, "tokens") == dict(enumerate(tokens, 1))
    log = (grown / "train.log").read_text()
    assert "12 sequences of 32 tokens: 1 x 1 x 12 (devices x gradient accumulation x micro-batch)" in log
    assert "4 up to step 2, 8 up to step 4" in log
    assert "6 steps, 1,536 tokens" in log
    assert "tokens seen   1,536" in log
    shown = user.python("gptlab.prepare", f"replay={grown}", "step=3")
    assert_success(shown)
    assert shown.stdout.count("starting at token") == SIZES[2]


@pytest.mark.slow
def test_two_processes_and_a_resume_between_stages_do_not_change_the_tokens(user, grown):
    assert_success(user.train("name=halted", *GROWING, "train.max_steps=4", "train.eval_every=2"))
    halted = user.only_run("halted")
    assert_success(
        user.python("gptlab.train", f"resume={halted}", "train.max_steps=6", *TWO, "train.micro_batch_size=3")
    )
    assert traced(halted) == traced(grown)
    assert metrics(halted, "tokens") == metrics(grown, "tokens")
    for name in ("train/loss", "grad_norm"):
        assert metrics(halted, name) == pytest.approx(metrics(grown, name), abs=1e-5), name


def test_a_resume_checks_that_every_batch_size_is_divisible(user, grown):
    done = user.python("gptlab.train", f"resume={grown}", "train.max_steps=9", "train.micro_batch_size=4")
    assert "train.batch_schedule: batch size=4 is not divisible by 3 " in done.stderr
    assert done.returncode == 2


@pytest.mark.slow
def test_a_token_budget_ends_with_the_first_step_that_reaches_it(user):
    assert_success(user.train("train.max_steps=null", "train.max_tokens=700", *GROWING, "callbacks=none"))
    assert max(metrics(user.only_run(), "tokens").items()) == (4, 768)  # after 128, 256, 512 and 768 tokens


@pytest.mark.slow
@pytest.mark.parametrize("overrides", [TWO, ("trainer=fsdp", "trainer.devices=2"), ("train.compile=true",)])
def test_losses_are_the_same_on_several_devices_and_compiled(user, grown, overrides):
    assert_success(user.train("name=changed", *GROWING, *overrides, timeout=600))
    directory = user.only_run("changed")
    assert traced(directory) == traced(grown)
    for name in ("train/loss", "val/loss"):
        assert metrics(directory, name) == pytest.approx(metrics(grown, name), abs=1e-5), name


@pytest.mark.slow
def test_proofs_pass_with_growing_batches(user):
    few = ("prove.ranks=[1,2,4]", "prove.workers=[0,2]", "prove.steps=6", "prove.kill_after=3")
    tiny = ("data=text", "data.source=text.txt", "model=tiny", "model.block_size=32")
    assert_success(user.python("gptlab.prove", *tiny, *few, "train.batch_schedule=[[2,4],[4,8]]", timeout=900))
    (folder,) = (user.folder / "outputs" / "prove").iterdir()
    proofs = json.loads((folder / "prove.json").read_text())["proofs"]
    assert len(proofs) == 8
    assert all(proof["passed"] for proof in proofs)
