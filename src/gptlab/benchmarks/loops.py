"""The loop of a training run and a bare loop of the same steps, in turns, in one process.

python -m gptlab.benchmarks.loops <what to do, in JSON>
"""

import json
import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning as L
import rich
import torch
from hydra import compose, initialize_config_dir

from gptlab.benchmarks.measuring import StepTime, relative_overhead, summarize_steps
from gptlab.config.command import configuration_folder
from gptlab.config.resume import resolve
from gptlab.config.schema import RunConfig
from gptlab.data.batches import Batch
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.launch.launcher import preflight
from gptlab.launch.train_run import build_metrics_callback, build_module, build_trainer
from gptlab.tracking.logs import close_log, log_to_file, quiet_lightning
from gptlab.tracking.run_directory import LOG, STACKS
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.callbacks.watchdog import Watchdog
from gptlab.training.datamodule import TokenDataModule
from gptlab.training.devices import choose_devices, prepare_kernels
from gptlab.training.distributed.strategies import compile_in_place
from gptlab.training.hardware import Hardware
from gptlab.training.optim.optimizers import build_optimizer, set_step_hyperparameters

TIMED = 10  # steps of a turn; one more comes before them, as it pays for what the other loop has displaced
TURN = 1 + TIMED


class _TurnsDone(Exception):  # noqa: N818
    """All turns have been taken."""


class _BareLoop:
    """What anyone would write around the steps of a run: no checks, no records, no one who could stop it."""

    def __init__(
        self, config: RunConfig, prepared: TokenDataset, devices: Hardware, data: TokenDataModule, plan: BatchPlan
    ) -> None:
        module = build_module(config, prepared, devices)
        self.config, self.plan, self.chunk = config, plan, module.loss_chunk
        self.device = torch.device(devices.accelerator)
        self.model = module.model.to(self.device)
        self.parameters = list(self.model.parameters())
        if devices.compile:
            compile_in_place(self.model, devices.compile, config.train.compile_mode, shapes=1)
        self.optimizer = build_optimizer(self.model, config.optimizer, fused=True)
        self.mixed = devices.precision == "bf16-mixed"
        self.batches = data.micro_batches(0, first_step=0).dataset
        self.done, self.loss = 0, torch.zeros(())

    def turn(self) -> StepTime:
        """Make the steps of a turn; return the mean of those that are timed."""
        self._step()
        begun = _now(self.device)
        for _ in range(TIMED):
            self._step()
        return _mean(begun, _now(self.device))

    def _step(self) -> None:
        config, size = self.config, self.plan.accumulation
        set_step_hyperparameters(self.optimizer, self.done, config.optimizer, config.schedule, max_steps=config.steps)
        self.loss = torch.zeros((), device=self.device)
        for number in range(self.done * size, (self.done + 1) * size):
            loss = self._loss(self.batches[number])
            if number % size == 0:
                self.optimizer.zero_grad()  # where Lightning does it: when memory is freed decides what a step takes
            (loss / size).backward()
            self.loss += loss.detach()
        if config.train.grad_clip > 0:
            torch.nn.utils.clip_grad_norm_(self.parameters, config.train.grad_clip)
        self.optimizer.step()
        self.done += 1

    def _loss(self, batch: Batch) -> torch.Tensor:
        idx, targets = batch.idx.to(self.device), batch.targets.to(self.device)
        documents = None if batch.documents is None else batch.documents.to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16) if self.mixed else nullcontext():
            return self.model.loss(idx, targets, documents, self.chunk)


class _AlternatingLoops(L.Callback):
    """Has the bare loop make its steps between those of the run, and takes the time of both.

    Attributes:
        whole: Mean seconds of a step of every turn of the run.
        bare: The same of the bare loop.
    """

    def __init__(self, loop: _BareLoop, turns: int) -> None:
        self.loop, self.turns = loop, turns
        self.whole: list[StepTime] = []
        self.bare: list[StepTime] = []
        self._begun = StepTime.now()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Between two turns, end the one before: all that Lightning does between two steps is in it."""
        place = batch_idx % (TURN * self.loop.plan.accumulation)
        if place == 0:
            if batch_idx:
                self.whole.append(_mean(self._begun, _now(pl_module.device)))
            if len(self.whole) == self.turns:
                raise _TurnsDone
            self.bare.append(self.loop.turn())
        elif place == self.loop.plan.accumulation:
            self._begun = _now(pl_module.device)


def _now(device: torch.device) -> StepTime:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return StepTime.now()


def _mean(begun: StepTime, ended: StepTime) -> StepTime:
    return StepTime((ended.wall - begun.wall) / TIMED, (ended.cpu - begun.cpu) / TIMED)


def compose_config(arguments: list[str], turns: int) -> RunConfig:
    """Return the configuration that ``gptlab.train`` makes of these arguments, as long as it takes."""
    length = turns * TURN + 1  # the last step, which would be evaluated, is not made
    overrides = [*arguments, f"train.max_steps={length}", f"train.eval_every={length}", f"train.log_every={TIMED}"]
    with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
        return resolve(compose("train", overrides), overrides)


def measure_loops(config: RunConfig, turns: int, folder: Path) -> dict[str, dict[str, float]]:
    """Train in both loops, on one device; return what ``overhead`` shows of each."""
    quiet_lightning()
    config, prepared, _ = preflight(config)
    devices = choose_devices(config.trainer, config.train, config.model)
    prepare_kernels(devices)
    plan = config.train.plan(1)
    block_size = config.model.block_size
    data = TokenDataModule(prepared, config.data, plan=plan, block_size=block_size, seed=config.seed, eval_windows=None)
    loop = _BareLoop(config, prepared, devices, data, plan)
    module, turns_taken = build_module(config, prepared, devices), _AlternatingLoops(loop, turns)
    recorder = build_metrics_callback(config, devices)
    trainer = build_trainer(config, prepared, devices, plan, folder, recorder, None)
    trainer.callbacks.insert(0, turns_taken)  # type: ignore[attr-defined]
    handler, timeout = log_to_file(folder / LOG), config.trainer.hang_timeout
    with suppress(_TurnsDone), Watchdog(trainer, timeout, folder / STACKS) if timeout else nullcontext():
        trainer.fit(module, data)
    close_log(handler)
    bare, whole = summarize_steps(turns_taken.bare), summarize_steps(turns_taken.whole)
    losses = [loss.item() / plan.accumulation for loss in (loop.loss, module.step_loss)]
    return {
        "bare": bare | {"loss": losses[0]},
        "whole": whole | relative_overhead(whole, bare) | {"loss": losses[1]},
    }


def main() -> None:
    """Measure, and print what came out as JSON."""
    todo = json.loads(sys.argv[1])
    with TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        rich.reconfigure(file=nowhere, force_terminal=True)  # the bar is drawn, where nobody sees it
        print(json.dumps(measure_loops(compose_config(todo["arguments"], todo["turns"]), todo["turns"], Path(folder))))


if __name__ == "__main__":
    main()
