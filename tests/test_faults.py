"""Killed and preempted runs, and damaged checkpoints: a resumed run ends with bit-identical weights."""

import contextlib
import json
import os
import random
import re
import shutil
import signal
import sys
import time
from pathlib import Path

import pytest

from commands import assert_same_run, assert_success, metrics, newest_state
from gptlab.exit_codes import DONE, FAILED, PREEMPTED

TINY = ("data=text", "data.source=text.txt", "model=tiny", "model.block_size=32", "train.log_every=1")
EVALUATIONS = ("train.eval_every=3", "train.eval_windows=10", "callbacks=checkpoint", "model.dropout=0.1")
TWO = ("trainer=ddp", "trainer.devices=2")


def last_step(user, name: str) -> int:
    """Returns the last step in the metrics of the only run of this name, or 0."""
    for path in user.folder.glob(f"outputs/{name}/*/metrics.csv"):
        with contextlib.suppress(FileNotFoundError, KeyError, ValueError):  # a resumed run is rewriting it
            return max(metrics(path.parent, "tokens"), default=0)
    return 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "extra", [(), ("callbacks.checkpoint.asynchronous=true",)], ids=["synchronous", "asynchronous"]
)
def test_a_run_killed_twenty_times_ends_with_bit_identical_weights(user, extra):
    kills = 20 if not extra else 5
    steps = f"train.max_steps={15 * kills}"  # more than a killed run reaches
    assert_success(user.python("gptlab.train", *TINY, *EVALUATIONS, "name=whole", steps))
    rng = random.Random(0)  # noqa: S311
    for _ in range(kills):
        often = ("resume=auto", "callbacks.checkpoint.every=1")
        run = user.begin("gptlab.train", *TINY, *EVALUATIONS, "name=killed", steps, *often, *extra)
        reached = last_step(user, "killed")
        # one to three steps beyond the last one, then at a random time within a step or the saving of a checkpoint
        goal = reached + rng.randint(1, 3)
        run.until(lambda: last_step(user, "killed") >= goal)  # noqa: B023
        time.sleep(rng.uniform(0, 0.05))
        os.killpg(run.pid, signal.SIGKILL)
        run.ended(-signal.SIGKILL)
    assert_success(user.python("gptlab.train", *TINY, *EVALUATIONS, "name=killed", steps, "resume=auto"))
    assert_same_run(user.only_run("whole"), user.only_run("killed"))


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size - 1)


def flip(path: Path) -> None:
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_CUR)
        file.write(bytes([byte ^ 1]))


@pytest.mark.slow
@pytest.mark.parametrize("damage", [truncate, flip])
def test_a_damaged_last_checkpoint_is_reported_and_the_previous_one_used(user, halted, damage):
    damage(halted / "checkpoints" / "step_000006" / "state.pt")
    unfinished = halted / "checkpoints" / ".unfinished-step_000009"
    unfinished.mkdir()
    (unfinished / "state.pt").write_bytes(b"half")
    done = user.python("gptlab.train", f"resume={halted}", "train.max_steps=9")
    assert_success(done)
    output = done.stdout.replace("\n", " ")
    assert output.count("step_000006 is damaged and is not used") == 1
    assert output.count("Removed the unfinished checkpoint step_000009") == 1
    assert_same_run(user.only_run("whole"), halted)


@pytest.mark.slow
def test_an_error_of_the_checkpoint_thread_ends_the_run_and_removes_no_checkpoint(user):
    (user.folder / "sitecustomize.py").write_text(
        "import gptlab.training.checkpoints.writing as writing\n"
        "write = writing._write_state\n"
        "def failing(folder, state):\n"
        "    if state['global_step'] >= 6:\n"
        "        raise RuntimeError('the writer fails')\n"
        "    return write(folder, state)\n"
        "writing._write_state = failing\n"
    )
    user.environment["PYTHONPATH"] = os.pathsep.join((str(user.folder), user.environment.get("PYTHONPATH", "")))
    thread = ("callbacks.checkpoint.asynchronous=true", "callbacks.checkpoint.keep_last=1")
    slow = "train.micro_batch_size=1"  # so that the thread fails within a step
    done = user.python("gptlab.train", *TINY, *EVALUATIONS, *thread, slow, "train.max_steps=1000")
    assert done.returncode not in (DONE, PREEMPTED)
    assert "the writer fails" in done.stderr
    assert last_step(user, "quickstart") <= 8
    assert [path.name for path in user.only_run().glob("checkpoints/step_*")] == ["step_000003"]


FILLED_DISK = """
mkdir outputs
mount -t tmpfs -o size=9m none outputs || exit 99
"$@" >outputs/output.txt 2>errors.txt &
until [ "$(cat outputs/*/*/metrics.csv 2>/dev/null | wc -l)" -gt "$ROWS" ]; do sleep 0.01; done
head -c 20m /dev/zero >outputs/filler 2>/dev/null
wait $!
echo $? >status.txt
rm outputs/filler
python -m gptlab.train resume=$(echo outputs/*/*) || exit 98
cp -r outputs kept
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("unshare") is None, reason="requires unshare, which mounts a small disk")
@pytest.mark.parametrize("rows", [7, 20])
def test_training_continues_on_a_full_disk_and_the_resume_is_bit_identical(user, rows):
    command = ("gptlab.train", *TINY, *EVALUATIONS, "train.max_steps=60", "callbacks=[checkpoint,samples]")
    assert_success(user.python(*command, "name=whole"))
    user.environment |= {"ROWS": str(rows), "PATH": f"{Path(sys.executable).parent}:{user.environment['PATH']}"}
    shutil.move(user.folder / "outputs", user.folder / "other")
    done = user.run("unshare", "-rm", "sh", "-c", FILLED_DISK, "sh", sys.executable, "-m", *command, "name=full")
    if done.returncode == 99:
        pytest.skip(f"unshare cannot mount a disk: {done.stderr}")
    assert_success(done)
    errors, resumed = (user.folder / "errors.txt").read_text(), user.folder / "kept" / "full"
    assert (user.folder / "status.txt").read_text() == f"{FAILED}\n"
    assert re.fullmatch(r"gptlab: The disk is full, so \S+/checkpoints/step_000060 could not be written\.\n", errors)
    (resumed,) = resumed.iterdir()
    (whole,) = (user.folder / "other" / "whole").iterdir()
    assert_same_run(whole, resumed)
    assert list(metrics(resumed, "tokens")) == list(range(1, 61))


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_signal_to_one_rank_preempts_all_and_the_resume_is_bit_identical(user, strategy):
    # with three ranks, the rounding of a sum depends on the order of its terms
    steps = (f"trainer={strategy}", "trainer.devices=3", "train.max_steps=60")
    assert_success(user.python("gptlab.train", *TINY, *EVALUATIONS, *steps, "name=whole"))
    run = user.begin("gptlab.train", *TINY, *EVALUATIONS, *steps, "name=stopped")
    run.until(lambda: last_step(user, "stopped") >= 4)
    os.kill(run.workers()[1], signal.SIGTERM)
    output = run.ended(PREEMPTED, seconds=120).stdout
    stopped = user.only_run("stopped")
    step = newest_state(stopped)["global_step"]
    assert step == last_step(user, "stopped") == json.loads((stopped / "state.json").read_text())["step"] < 60
    assert f"Preempted by a signal at step {step}. To resume: python -m gptlab.train resume=" in output
    assert_success(user.python("gptlab.train", f"resume={stopped}"))
    assert_same_run(user.only_run("whole"), stopped)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("extra", "number"), [((), signal.SIGUSR1), (("train.ema_decay=0.9",), signal.SIGHUP)], ids=["weights", "average"]
)
def test_an_evaluation_interrupted_by_a_signal_is_repeated_on_resume(user, extra, number):
    long = ("data.val_split=tail", "data.val_fraction=0.5", "train.eval_windows=null", "train.micro_batch_size=1")
    evaluations = ("train.eval_every=3", "callbacks=checkpoint", *long, "train.max_steps=6", *extra)
    assert_success(user.python("gptlab.train", *TINY, *evaluations, "name=whole"))
    ignored = signal.signal(number, signal.SIG_DFL)  # under nohup, which the command would inherit
    run = user.begin("gptlab.train", *TINY, *evaluations, "name=stopped")
    signal.signal(number, ignored)
    run.until(lambda: last_step(user, "stopped") == 3)
    time.sleep(0.2)
    run.send_signal(number)
    run.ended(PREEMPTED)
    stopped = user.only_run("stopped")
    assert "val/loss" not in (stopped / "metrics.csv").read_text()
    assert newest_state(stopped)["global_step"] == 3
    assert_success(user.python("gptlab.train", f"resume={stopped}"))
    assert list(metrics(stopped, "val/loss")) == [3, 6]
    assert_same_run(user.only_run("whole"), stopped)


@pytest.mark.slow
def test_the_tokens_do_not_depend_on_ranks_and_data_workers(user):
    small = (*TINY, "train.eval_every=3", "train.eval_windows=10", "callbacks=[checkpoint,trace]", "schedule=constant")
    assert_success(user.python("gptlab.train", *small, "name=whole", "train.max_steps=9"))
    assert_success(user.python("gptlab.train", *small, "name=moved", "train.max_steps=3"))
    moved = user.only_run("moved")
    for steps, ranks, workers in ((6, 2, 3), (9, 4, 1)):
        devices = ("trainer=ddp", f"trainer.devices={ranks}", f"data.num_workers={workers}")
        assert_success(
            user.python("gptlab.train", f"resume={moved}", f"train.max_steps={steps}", *devices, timeout=300)
        )
    tokens = [
        {line["step"]: line["tokens"] for line in map(json.loads, (directory / "trace.jsonl").read_text().splitlines())}
        for directory in (user.only_run("whole"), moved)
    ]
    assert tokens[0] == tokens[1]
    assert len(set(tokens[0].values())) == 9
    losses = [metrics(directory, "train/loss") for directory in (user.only_run("whole"), moved)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
