"""Training loops that alternate in one process: that of a run and a bare loop, or steps with and without health checks.

python -m gptlab.benchmarks.training_loops <task as JSON>
"""

import json
import os
import sys
from contextlib import nullcontext, suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any, cast

import lightning as L
import rich
import torch
from hydra import compose, initialize_config_dir
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from gptlab.benchmarks.config import GuardsBench
from gptlab.benchmarks.measuring import Sample, StepTime, relative_overhead, summarize_steps
from gptlab.config.resolve import resolve
from gptlab.config.schema import RunConfig
from gptlab.config.search_path import configuration_folder
from gptlab.data.batches import Batch
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.launch.launcher import preflight
from gptlab.launch.train_run import build_metrics_callback, build_module, build_trainer
from gptlab.model.config import GPTConfig
from gptlab.model.modern import build_gpt
from gptlab.tracking.logs import close_log, log_to_file, quiet_lightning
from gptlab.tracking.run_directory import LOG, STACKS
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.callbacks.health_monitor import TrainingHealthMonitor
from gptlab.training.callbacks.step_sync import StepSync
from gptlab.training.callbacks.watchdog import Watchdog
from gptlab.training.config import AdamWConfig, ConstantConfig, TrainConfig
from gptlab.training.datamodule import TokenDataModule
from gptlab.training.devices import choose_devices, prepare_kernels
from gptlab.training.distributed.strategies import compile_in_place
from gptlab.training.hardware import Hardware
from gptlab.training.module import GPTModule, TrainingConfig
from gptlab.training.optim.optimizers import build_optimizer, set_step_hyperparameters

TIMED = 10  # timed steps of a turn, after one step that refills the caches that the other loop displaced
TURN = 1 + TIMED
GUARD_TURN = 10  # steps of a turn; the first one is not timed, because it completes work of the other variant
LIMITS = SimpleNamespace(max_bad_steps=10, spike_sigma=6.0, spike_window=128)
TIMEOUT = 600.0  # seconds of the watchdog


class _TurnsDone(Exception):  # noqa: N818
    """Ends the training after the last turn."""


class _BareLoop:
    """Minimal training loop with the same steps as a run: no checks, no metrics, no signal handling."""

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
        """Runs the steps of a turn; returns the mean time of the timed steps."""
        self._step()
        start = _now(self.device)
        for _ in range(TIMED):
            self._step()
        return _mean(start, _now(self.device))

    def _step(self) -> None:
        config, size = self.config, self.plan.accumulation
        set_step_hyperparameters(self.optimizer, self.done, config.optimizer, config.schedule, max_steps=config.steps)
        self.loss = torch.zeros((), device=self.device)
        for number in range(self.done * size, (self.done + 1) * size):
            loss = self._loss(self.batches[number])
            if number % size == 0:
                self.optimizer.zero_grad()  # at the same point as Lightning: it affects the speed
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
    """Alternates turns of the run with turns of the bare loop, and measures both.

    Attributes:
        whole: Mean step time of each turn of the run.
        bare: Mean step time of each turn of the bare loop.
    """

    def __init__(self, loop: _BareLoop, turns: int) -> None:
        self.loop, self.turns = loop, turns
        self.whole: list[StepTime] = []
        self.bare: list[StepTime] = []
        self._start = StepTime.now()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends a turn and starts the next one. A turn includes everything that Lightning does between two steps."""
        place = batch_idx % (TURN * self.loop.plan.accumulation)
        if place == 0:
            if batch_idx:
                self.whole.append(_mean(self._start, _now(pl_module.device)))
            if len(self.whole) == self.turns:
                raise _TurnsDone
            self.bare.append(self.loop.turn())
        elif place == self.loop.plan.accumulation:
            self._start = _now(pl_module.device)


def _now(device: torch.device) -> StepTime:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return StepTime.now()


def _mean(start: StepTime, end: StepTime) -> StepTime:
    return StepTime((end.wall - start.wall) / TIMED, (end.cpu - start.cpu) / TIMED)


def compose_config(arguments: list[str], turns: int) -> RunConfig:
    """Returns the configuration of ``gptlab.train`` with these arguments, with the length of the turns."""
    length = turns * TURN + 1  # the last step, with its evaluation, is never run
    overrides = [*arguments, f"train.max_steps={length}", f"train.eval_every={length}", f"train.log_every={TIMED}"]
    with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
        return resolve(compose("train", overrides), overrides)


def measure_loops(config: RunConfig, turns: int, folder: Path) -> tuple[Sample, Sample]:
    """Trains with both loops on one device; returns the samples of the bare loop and of the run."""
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
    return bare | {"loss": losses[0]}, whole | relative_overhead(whole, bare) | {"loss": losses[1]}


class _Module(GPTModule):
    """Module whose guard against non-finite gradients can be disabled."""

    guarded = True

    def skip_if_bad(self, optimizer: Optimizer) -> None:
        if self.guarded:
            super().skip_if_bad(optimizer)
        else:
            optimizer.found_inf = None  # type: ignore[attr-defined]


class _AlternatingGuards(L.Callback):
    """Alternates between training with and without health checks, and measures every step.

    Attributes:
        times: Times of the steps without health checks, and of the steps with them.
    """

    def __init__(self) -> None:
        self.guards: list[L.Callback] = []
        self.times: tuple[list[StepTime], list[StepTime]] = ([], [])
        self._start = StepTime.now()

    def on_train_batch_start(
        self, trainer: L.Trainer, pl_module: L.LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Ends a step and starts the next one. A step includes everything that Lightning does between two steps."""
        now = _now(pl_module.device)
        assert isinstance(pl_module, _Module)  # noqa: S101
        if batch_idx % GUARD_TURN > 1 or (batch_idx % GUARD_TURN == 0 and batch_idx > 0):
            self.times[pl_module.guarded].append(StepTime(now.wall - self._start.wall, now.cpu - self._start.cpu))
        if batch_idx % GUARD_TURN == 0:
            pl_module.guarded = batch_idx // GUARD_TURN % 2 == 1
            trainer.callbacks = [self, *self.guards] if pl_module.guarded else [self]  # type: ignore[attr-defined]
        self._start = StepTime.now()


def measure_guards(bench: GuardsBench) -> tuple[Sample, Sample]:
    """Trains on random tokens; returns the samples of the steps without and with health checks."""
    quiet_lightning()
    torch.manual_seed(0)
    turns, step_sync = _AlternatingGuards(), StepSync()
    turns.guards = [step_sync, TrainingHealthMonitor(step_sync, cast(TrainConfig, LIMITS), "")]
    module = _module(bench.model, bench.optimizer)
    trainer = L.Trainer(
        accelerator="auto",
        devices=1,
        max_steps=(2 * -(-bench.steps // (GUARD_TURN - 1)) + 1) * GUARD_TURN,
        max_epochs=-1,
        callbacks=[turns],
        precision="bf16-mixed" if torch.cuda.is_available() else "32-true",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    with TemporaryDirectory() as folder, Watchdog(trainer, TIMEOUT, Path(folder) / STACKS) as watchdog:
        turns.guards.append(watchdog)
        trainer.fit(module, _batches(bench.model, bench.batch_size))
    plain, guarded = (summarize_steps(times[: bench.steps]) for times in turns.times)
    return plain, guarded | relative_overhead(guarded, plain)


def _module(model: GPTConfig, optimizer: AdamWConfig) -> _Module:
    train = SimpleNamespace(grad_clip=1.0, ema_decay=None, compile_mode="default", loss_chunk=None)
    schedule = ConstantConfig(name="constant", warmup_steps=0)
    config = SimpleNamespace(
        seed=0, model=model, loss=None, optimizer=optimizer, schedule=schedule, train=train, steps=10**9
    )
    token_bytes = torch.ones(model.vocab_size or 0)
    gpt = build_gpt(model)
    return _Module(gpt, cast(TrainingConfig, config), token_bytes=token_bytes, compile=False, loss_chunk=None)


def _batches(model: GPTConfig, batch_size: int) -> DataLoader[Batch]:
    assert model.vocab_size is not None  # noqa: S101  (set in conf/bench.yaml)
    tokens = torch.randint(model.vocab_size, (batch_size, model.block_size + 1))
    batch = Batch(tokens[:, :-1], tokens[:, 1:], None)
    return DataLoader(cast(Any, [batch] * 10**6), batch_size=None)


def main(task: dict[str, Any]) -> tuple[Sample, Sample]:
    """Runs the measurement that ``task`` describes."""
    if task["loop"] == "guards":
        return measure_guards(GuardsBench.model_validate(task["bench"]))
    with TemporaryDirectory() as folder, Path(os.devnull).open("w") as nowhere:
        rich.reconfigure(file=nowhere, force_terminal=True)  # renders the progress bar without showing it
        return measure_loops(compose_config(task["arguments"], task["turns"]), task["turns"], Path(folder))


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
