"""What callbacks log with Lightning's ``log`` is in every logger, once and at its step."""

import csv
from pathlib import Path

import pytest

from commands import assert_success, metrics

pytestmark = pytest.mark.slow  # whole runs

CALLBACKS = """
import lightning as L

class Logs(L.Callback):
    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        if (trainer.global_step + 1) % 2 == 0:
            pl_module.log("mine/before", trainer.global_step + 1.0)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        if batch_idx // 3 == 3:  # every micro-batch of step 4
            pl_module.log("mine/end", float(batch_idx))
        if trainer.global_step == 5:
            trainer.logger.log_metrics({"mine/no_step": 5.0})

    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("mine/val", trainer.global_step / 2)

    def on_train_epoch_end(self, trainer, pl_module):
        pl_module.log("mine/run", 7.0)
"""
LOGS = ("+callbacks.logs._target_=mine.Logs", "train.log_every=3", "train.micro_batch_size=4")  # three micro-batches


@pytest.fixture
def mine(user):
    (user.folder / "mine.py").write_text(CALLBACKS)
    return user


def recorded(directory: Path, name: str) -> dict[int, float]:
    """Returns a metric by step; fails if a step has it twice."""
    with (directory / "metrics.csv").open(newline="") as file:
        rows = [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row.get(name)]
    assert len(rows) == len(dict(rows)), rows
    return dict(rows)


def test_logged_values_are_recorded_once_at_their_step(mine):
    assert_success(mine.train(*LOGS, "logger=tensorboard"))
    directory = mine.only_run()
    expected = {
        "mine/before": {2: 2.0, 4: 4.0, 6: 6.0},
        "mine/end": {4: 11.0},  # micro-batch 11 is the last one of step 4
        "mine/val": {3: 1.5, 6: 3.0},
        "mine/run": {6: 7.0},
        "train/loss": dict.fromkeys((1, 3, 6)),
    }
    for name, values in expected.items():
        found = recorded(directory, name)
        assert found.keys() == values.keys(), name
        assert name == "train/loss" or found == values
    assert set(metrics(directory, "tokens")) == {1, 2, 3, 4, 6}
    assert "epoch" not in (directory / "metrics.csv").read_text().splitlines()[0]
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = events.EventAccumulator(str(directory / "tensorboard")).Reload()
    for name in ("mine/before", "mine/end", "mine/val", "mine/run"):
        assert {event.step: event.value for event in shown.Scalars(name)} == expected[name], name


def test_a_resumed_run_records_values_at_their_steps(mine):
    assert_success(mine.train(*LOGS, "train.max_steps=3"))
    directory = mine.only_run()
    assert_success(mine.python("gptlab.train", f"resume={directory}", "train.max_steps=6", "trust=[mine]"))
    assert recorded(directory, "mine/before") == {2: 2.0, 4: 4.0, 6: 6.0}
    assert recorded(directory, "mine/val") == {3: 1.5, 6: 3.0}


PREEMPTED = """
import signal
import lightning as L

class Logs(L.Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("mine/each", float(trainer.global_step))
        if trainer.global_step == 2:
            signal.raise_signal(signal.SIGTERM)
"""


def test_the_values_of_the_last_step_before_preemption_are_recorded(user):
    (user.folder / "mine.py").write_text(PREEMPTED)
    done = user.train("+callbacks.logs._target_=mine.Logs")
    assert done.returncode == 75, done.stderr
    (saved,) = (user.only_run() / "checkpoints").iterdir()
    last = int(saved.name.removeprefix("step_"))
    assert last < 6
    assert recorded(user.only_run(), "mine/each") == {step: float(step) for step in range(1, last + 1)}


MONITOR = "lightning.pytorch.callbacks.DeviceStatsMonitor"


def test_lightnings_monitors_log_at_the_steps_of_rows(user):
    done = user.train(
        f"+callbacks.devices._target_={MONITOR}", "+callbacks.devices.cpu_stats=true", "train.log_every=2"
    )
    assert_success(done)
    directory = user.only_run()
    with (directory / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    names = {name for name in rows[0] if name.startswith(MONITOR.rpartition(".")[2])}
    (name,) = (name for name in names if name.endswith("on_train_batch_end/cpu_percent"))
    assert recorded(directory, name).keys() == {1, 2, 4, 6}
