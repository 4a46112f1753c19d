"""End-to-end sweeps: every trial runs once, even if trials or the sweep crash, diverge, are killed or interrupted."""

import contextlib
import json
import os
import signal
import time
from collections import Counter
from pathlib import Path

import pytest

from commands import assert_config_error, assert_success, metrics
from configs import read
from faults import break_steps
from gptlab.exit_codes import DIVERGED, DONE, INTERRUPTED, PREEMPTED

# a model that learns the letter frequencies in twenty steps, if its learning rate is right
SMALL = (
    *("data=text", "data.source=text.txt", "model=tiny", "model.block_size=32", "callbacks=checkpoint"),
    *(
        "train.max_steps=20",
        "train.eval_every=5",
        "train.eval_windows=20",
        "schedule=constant",
        "schedule.warmup_steps=0",
    ),
)
# in twenty steps, 1e-6 learns nothing and 10 diverges, so the best learning rate is known
RATES = "optimizer.lr=1e-6,1e-5,1e-2,10"
TWELVE = ("-m", "name=rates", RATES, "seed=1,2,3", *SMALL, "hydra.launcher.at_once=2")


def trials(directory: Path) -> list[dict]:
    found = [json.loads(path.read_text()) for path in directory.glob("*/trial.json")]
    return sorted(found, key=lambda trial: trial["number"])


def states(directory: Path) -> Counter:
    return Counter(trial["state"] for trial in trials(directory))


def processes_in(folder: Path) -> list[str]:
    """Returns the command lines of the processes whose working directory is in a directory."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if (path / "cwd").readlink().is_relative_to(folder) and (path / "cmdline").read_bytes():
                found.append((path / "cmdline").read_text())
    return found


@pytest.mark.slow
def test_sweep_runs_every_point_and_records_it(user):
    sweep = ("-m", "name=two", "seed=1,2", *SMALL, "train.max_steps=2", "hydra.launcher.at_once=2")
    done = user.python("gptlab.train", *sweep)
    assert_success(done)
    directory = user.only_run("two")
    assert [(trial["state"], trial["overrides"], trial["starts"]) for trial in trials(directory)] == [
        ("done", {"seed": "1"}, 1),
        ("done", {"seed": "2"}, 1),
    ]
    for trial in trials(directory):
        losses = metrics(directory / str(trial["number"]), "val/loss")
        assert trial["value"] == min(losses.values())
        assert trial["tokens"] == 2 * 12 * 32
    assert json.loads((directory / "sweep.json").read_text())["space"] == {"seed": "1,2"}
    assert "2 trials: 2 done" in done.stdout
    listed = user.python("gptlab.runs", "runs=outputs/two", "columns=[seed]", "sort=seed", "format=json")
    assert_success(listed)
    lines = json.loads(listed.stdout)
    assert [(line["run"], line["state"], line["step"], line["seed"]) for line in lines] == [
        (f"two/{directory.name}/0", "done", 2, 1),
        (f"two/{directory.name}/1", "done", 2, 2),
    ]


RANDOM = ("hydra.sweeper.search=random", "hydra.sweeper.n_trials=2")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("optimizer.lrr=1e-3,2e-3",), "Unknown config key `optimizer.lrr`. Did you mean optimizer.lr?"),
        (("model=nani,tinny",), "Unknown option model=nani. Did you mean"),
        (("seed=range(3,3)",), "seed=range(3,3) has no values"),
        (("hydra.sweeper.search=tpe", "hydra.sweeper.n_trials=3"), "No key is varied"),
        (("model.n_head=5,7",), "n_head=5 does not divide"),
        (("seed=1,2", "hydra.sweeper.search=tpe"), "search=tpe requires hydra.sweeper.n_trials"),
        (("seed=1,2", "hydra.sweeper.serch=tpe"), "hydra.sweeper.serch"),
        (("seed=1,2", "hydra.launcher.at_once=0"), "at_once=0 is not valid"),
        (("seed=interval(1,2)",), "infinitely many values"),
        (("model.n_embd=64,65", "model.n_head=4"), "model.n_embd=65: model.n_head=4 does not divide n_embd=65"),
        (("seed=range(1,3,0)",), "seed=range(1,3,0) has no end: its step is 0"),
        (("seed=range(0,1000000)",), "has more than 10,000 values"),
        (("seed=range(0,200)", "optimizer.lr=range(1,101)"), "has 20,000 points, but a grid has at most 10,000"),
        (("model=glob(gpt*,exclude=gpt2*)", "seed=1"), "model.block_size is missing"),
        (("lora=null,nothing",), "Unknown option lora=nothing"),
        (("resume=outputs/a,outputs/b",), "resume=outputs/a"),
        (("seed=1,2", "hydra.sweep.subdir=x"), "hydra.sweep.subdir=x is not supported"),
        (("data=text", "data.source=text.txt,missing.txt"), "missing.txt does not exist"),
        (
            ("hydra.sweeper.metric=val/los", "seed=1,2"),
            "metric=val/los is not one of gptlab's metrics. Did you mean val/loss",
        ),
        ((*RANDOM, "optimizer.lr=tag(log,interval(0,1))"), "an interval on a log scale starts above 0"),
        ((*RANDOM, "optimizer.lr=tag(lg,interval(1e-4,1))"), "the tag lg is unknown"),
        (("seed=1,2", "hydra.launcher.partition=gpu"), "belongs to other options of hydra/launcher="),
        (("seed=1,2", "hydra.sweeper.prune.method=asha"), "'hydra.sweeper.prune={method: <value>, ...}'"),
    ],
)
def test_invalid_sweep_is_rejected_before_anything_is_written(user, arguments, message):
    assert_config_error(user.python("gptlab.train", "-m", *arguments), message)
    assert not (user.folder / "outputs").exists()


@pytest.mark.slow
def test_sweep_of_twelve_trials_with_a_crash_and_a_nan_killed_twice(user):
    """Ten results, two failures and the right learning rate, although the sweep process is killed twice."""
    fault = "rate, seed = self.config.optimizer.lr, self.config.seed\n        "
    break_steps(user, f"{fault}if rate == 1e-5 and seed == 2 and step == 7: os._exit(9)\n        "
                f"if rate == 1e-6 and seed == 3: loss = loss * float('nan')")  # fmt: skip
    for ended in (2, 6):
        run = user.begin("gptlab.train", *TWELVE)
        run.until(lambda ended=ended: sum(len(found) for found in [ended_trials(user)]) >= ended)
        os.killpg(run.pid, signal.SIGKILL)
        run.wait()
        until = time.monotonic() + 30
        while processes_in(user.folder):
            assert time.monotonic() < until
            time.sleep(0.05)
    done = user.python("gptlab.train", *TWELVE, timeout=400)
    directory = user.only_run("rates")
    found = trials(directory)
    assert done.returncode == DIVERGED, done.stdout + done.stderr
    assert states(directory) == {"done": 10, "failed": 1, "diverged": 1}
    assert sorted(int(path.name) for path in directory.iterdir() if path.name.isdigit()) == list(range(12))
    assert [trial["number"] for trial in found] == list(range(12))
    best = min((trial for trial in found if trial["value"] is not None), key=lambda trial: trial["value"])
    assert best["overrides"]["optimizer.lr"] == "0.01"
    assert "12 trials: 10 done" in done.stdout
    assert "trial 4 failed · optimizer.lr=1e-05 seed=2" in done.stdout  # although an earlier sweep process ran it
    assert "trial 2 diverged · optimizer.lr=1e-06 seed=3: The gradient was not finite" in done.stdout
    for trial in found:
        if trial["state"] == "done":  # each evaluation once, although the trial was killed and resumed
            assert list(metrics(directory / str(trial["number"]), "val/loss")) == [5, 10, 15, 20]


def ended_trials(user) -> list[dict]:
    found = list((user.folder / "outputs").glob("rates/*"))
    return [trial for trial in trials(found[0]) if trial["state"] in ("done", "failed", "diverged")] if found else []


@pytest.mark.slow
def test_asha_finds_the_best_grid_point_with_half_of_the_tokens(user):
    rates = "optimizer.lr=1e-6,3e-6,1e-5,3e-5,1e-4,3e-4,1e-3,3e-3,1e-2,3e-2,1e-1,3e-1"
    length = ("train.max_steps=162", "train.eval_every=18", "schedule=cosine", "schedule.warmup_steps=0")
    small = (*SMALL[:4], *length, "train.eval_windows=20", "callbacks=none", "hydra.launcher.at_once=2")
    assert_success(user.python("gptlab.train", "-m", "name=grid", rates, *small, timeout=400))
    tokens = 12 * 32 * 18
    prune = f"hydra.sweeper.prune={{method:asha,min_tokens:{tokens},reduction_factor:3}}"
    done = user.python("gptlab.train", "-m", "name=asha", rates, *small, prune, timeout=400)
    assert_success(done)
    grid, asha = (trials(user.only_run(name)) for name in ("grid", "asha"))
    assert {trial["state"] for trial in grid} == {"done"}
    assert Counter(trial["state"] for trial in asha)["pruned"] >= 6

    def winner(found):
        whole = [trial for trial in found if trial["state"] == "done"]
        return min(whole, key=lambda trial: trial["value"])

    assert winner(asha)["overrides"] == winner(grid)["overrides"]
    assert winner(asha)["value"] == winner(grid)["value"]
    assert sum(trial["tokens"] for trial in asha) <= sum(trial["tokens"] for trial in grid) / 2


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, PREEMPTED), (signal.SIGINT, INTERRUPTED)])
def test_signaled_sweep_resumes_from_its_checkpoints(user, number, status):
    sweep = ("-m", "name=stopped", "seed=1,2", *SMALL, "train.max_steps=400", "hydra.launcher.at_once=2")
    run = user.begin("gptlab.train", *sweep)
    run.until(lambda: all(list(user.folder.glob(f"outputs/stopped/*/{job}/checkpoints/step_*")) for job in (0, 1)))
    run.send_signal(number)
    output = run.ended(status).stdout
    assert "Run the same command again to resume the sweep." in output
    directory = user.only_run("stopped")
    assert set(states(directory)) == {"stopped" if status == PREEMPTED else "interrupted"}
    assert not processes_in(user.folder)
    assert_success(user.python("gptlab.train", *sweep, timeout=300))
    assert directory == user.only_run("stopped")
    assert states(directory) == {"done": 2}
    assert [trial["starts"] for trial in trials(directory)] == [2, 2]
    for job in ("0", "1"):
        assert list(metrics(directory / job, "val/loss")) == list(range(5, 401, 5))
        assert (directory / job / "train.log").read_text().count("INFO model ") == 2  # it was resumed
    other = user.python("gptlab.train", *sweep, f"hydra.sweep.dir={directory}", "optimizer.lr=1")
    assert_config_error(other, "contains a different sweep")


@pytest.mark.slow
def test_every_part_of_the_recipe_can_be_omitted(user):
    short = ("train.max_steps=2", "train.eval_every=2", "train.eval_windows=4", "seed=1", "hydra.launcher.at_once=2")
    done = user.python("gptlab.train", "-m", "sweeps=ladder", "data=text", "data.source=text.txt", *short, timeout=400)
    assert_success(done)
    directory = user.only_run("ladder")
    parts = read("ladder")[1]["params"]["without"].split(",")
    assert [trial["overrides"]["without"] for trial in trials(directory)] == parts
    assert states(directory) == {"done": len(parts)}
    assert len({trial["value"] for trial in trials(directory)}) >= len(parts) - 2  # some are equal after two steps


@pytest.mark.slow
def test_tpe_searches_an_interval(user):
    sweep = ("-m", "name=tpe", "optimizer.lr=tag(log, interval(1e-6, 10))", *SMALL, "callbacks=none")
    search = ("hydra.sweeper.search=tpe", "hydra.sweeper.n_trials=6", "hydra.launcher.at_once=2")
    assert_success(user.python("gptlab.train", *sweep, *search, timeout=300))
    found = trials(user.only_run("tpe"))
    assert len({trial["overrides"]["optimizer.lr"] for trial in found}) == 6
    assert all(1e-6 <= float(trial["overrides"]["optimizer.lr"]) <= 10 for trial in found)
    assert max(trial["status"] for trial in found) == DONE
