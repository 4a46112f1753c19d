"""StepSync: reports of a step, one step later."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from gptlab.training.callbacks.health_monitor import TrainingHealthMonitor
from gptlab.training.callbacks.step_sync import StepReport, StepSync
from gptlab.training.module import GPTModule

LIMITS: Any = SimpleNamespace(max_bad_steps=3, spike_sigma=6.0, spike_window=8)


class Steps:
    """Ends micro-batches, two per step, as a Trainer with one process does."""

    def __init__(self, step_sync: StepSync) -> None:
        self.step_sync, self.module = step_sync, GPTModule.__new__(GPTModule)
        torch.nn.Module.__init__(self.module)
        self.module._device = torch.device("cpu")

    def take(self, step: int, loss: float, bad: float = 0.0) -> None:
        trainer: Any = SimpleNamespace(accumulate_grad_batches=2, world_size=1, global_step=step - 1)
        for micro in range(2):
            self.module.step_loss = torch.tensor(loss * (micro + 1))  # the sum over the micro-batches of the step
            self.module.bad_step = torch.tensor(bad)
            trainer.global_step += micro
            self.step_sync.on_train_batch_end(trainer, self.module, None, None, 2 * (step - 1) + micro)


def test_a_step_is_reported_one_step_later() -> None:
    step_sync, reports = StepSync(), list[StepReport]()
    step_sync.listeners.append(reports.append)
    steps = Steps(step_sync)
    steps.take(1, 2.5)
    assert reports == []
    steps.take(2, 1.5, bad=1.0)
    assert reports == [StepReport(1, 2.5, False)]
    step_sync.collect()
    assert reports == [StepReport(1, 2.5, False), StepReport(2, 1.5, True)]
    step_sync.collect()
    steps.take(3, 0.5)
    assert len(reports) == 2


def test_the_preemption_flag_is_agreed_on_one_step_later_and_remains_set() -> None:
    step_sync = StepSync()
    steps = Steps(step_sync)
    step_sync.stop_requested = True
    steps.take(1, 1.0)
    assert not step_sync.agreed_stop
    step_sync.stop_requested = False
    steps.take(2, float("nan"))  # does not hide the flag
    assert step_sync.agreed_stop
    steps.take(3, 1.0)
    assert step_sync.agreed_stop


def test_the_saved_state_includes_the_last_step() -> None:
    step_sync = StepSync()
    monitor, steps = TrainingHealthMonitor(step_sync, LIMITS, ""), Steps(step_sync)
    steps.take(1, 2.0)
    steps.take(2, 4.0, bad=1.0)
    state = monitor.state_dict()
    assert (state["bad_steps"], state["in_a_row"], state["spikes"]["losses"]) == (1, 1, [2.0])


def test_a_bad_step_on_the_cpu_is_summed_with_a_loss_on_another_device(monkeypatch: pytest.MonkeyPatch) -> None:
    step_sync = StepSync()
    steps, added = Steps(step_sync), list[torch.Tensor]()
    monkeypatch.setattr(step_sync._agreement, "add", added.append)
    steps.module._device = torch.device("meta")  # takes the place of a GPU; FSDP offloads the gradients
    steps.module.step_loss, steps.module.bad_step = torch.zeros((), device="meta"), torch.zeros(())
    trainer: Any = SimpleNamespace(accumulate_grad_batches=1, world_size=1, global_step=1)
    step_sync.on_train_batch_end(trainer, steps.module, None, None, 0)
    assert [(values.device.type, values.shape) for values in added] == [("meta", (3,))]
