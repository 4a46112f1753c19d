"""One training run, from a complete configuration to its run directory."""

import contextlib
import logging
from pathlib import Path

import lightning as L
import torch
from lightning.pytorch.callbacks import EarlyStopping
from lightning.pytorch.profilers import Profiler, PyTorchProfiler, SimpleProfiler

from gptlab.config.schema import Config
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.evaluation.hellaswag import read_examples_cached
from gptlab.exit_codes import DONE, PREEMPTED, PRUNED
from gptlab.launch.run_forecast import Expectation
from gptlab.model.config import flops_per_token
from gptlab.model.gpt import GPT
from gptlab.model.lora import add_lora
from gptlab.model.modern import build_gpt
from gptlab.pretrained.nanogpt import import_nanogpt_checkpoint
from gptlab.pretrained.source import resolve_path
from gptlab.pretrained.weights import load_weights
from gptlab.sweeps.sweep_store import is_prunable
from gptlab.tracking.console import print_start, print_stopped, print_summary, replay_command
from gptlab.tracking.loggers import build_loggers
from gptlab.tracking.logs import close_log, log_to_file, quiet_lightning
from gptlab.tracking.run_directory import (
    CHECKPOINTS,
    LOG,
    STACKS,
    TRACE,
    create_run_dir,
    newest_checkpoint,
    record_config,
)
from gptlab.tracking.run_lock import RunLock
from gptlab.tracking.run_store.runs import SAMPLES
from gptlab.tracking.run_store.state import end_state, status_of
from gptlab.tracking.wandb.attach import attach_wandb
from gptlab.training.auto import resolve_loss_chunk
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.callbacks.determinism_trace import DeterminismTrace
from gptlab.training.callbacks.garbage_collection import GarbageCollection
from gptlab.training.callbacks.health_monitor import TrainingHealthMonitor
from gptlab.training.callbacks.hellaswag import HellaSwag
from gptlab.training.callbacks.metrics import MetricsCallback
from gptlab.training.callbacks.preemption import Preempted, Preemption
from gptlab.training.callbacks.run_checkpoint import RunCheckpoint
from gptlab.training.callbacks.samples import Samples
from gptlab.training.callbacks.step_sync import StepSync
from gptlab.training.callbacks.watchdog import Watchdog
from gptlab.training.checkpoints.records import CheckpointMetadata, checkpoint_path, checkpoint_step, clean_up
from gptlab.training.checkpoints.writing import AtomicCheckpointIO
from gptlab.training.config import CheckpointConfig
from gptlab.training.datamodule import TokenData
from gptlab.training.devices import Devices, choose_devices, prepare_kernels
from gptlab.training.distributed.clusters import cluster_environment
from gptlab.training.distributed.process_group import join_group, run_on_first_rank
from gptlab.training.distributed.processes import is_first_rank
from gptlab.training.distributed.strategies import build_strategy
from gptlab.training.module import GPTModule
from gptlab.training.null_profiler import NullProfiler


def run(config: Config, prepared: TokenDataset, place: Path | None) -> int:
    """Train, and leave a run directory behind.

    Every rank calls this. Nothing is written before everything that can be checked has been.

    Args:
        config: Complete, with the vocabulary.
        prepared: The data.
        place: The run directory, where a sweep has set one apart.

    Returns:
        The exit status.

    Raises:
        UserError: Devices, a checkpoint or a login are missing, or another process writes the run.
    """
    with RunLock() as lock:
        return _run(config, prepared, place, lock)


def _run(config: Config, prepared: TokenDataset, place: Path | None, lock: RunLock) -> int:
    quiet_lightning()
    devices = choose_devices(config.trainer, config.train, config.model)
    prepare_kernels(devices)
    shares = config.trainer.data_parallel(devices.devices, devices.num_nodes)
    plan = config.train.plan(shares)
    join_group(devices)
    checkpoint = run_on_first_rank(lambda: _checkpoint(config, lock))
    module = build_module(config, prepared, devices)
    directory = run_on_first_rank(lambda: _directory(config, prepared, place, module.model, lock))
    if config.resume_from_nanogpt:
        checkpoint = run_on_first_rank(lambda: newest_checkpoint(directory))
    is_first = is_first_rank()
    handler = log_to_file(directory / LOG) if is_first else logging.NullHandler()
    try:
        print_start(config, prepared.manifest, devices, plan, directory)
        expected = Expectation(directory, config, prepared.manifest, devices) if is_first else None
        recorder = build_recorder(config, devices)
        trainer = build_trainer(config, prepared, devices, plan, directory, recorder, checkpoint)
        data = TokenData(
            prepared,
            config.data,
            plan=plan,
            block_size=config.model.block_size,
            seed=config.seed,
            eval_windows=config.train.eval_windows,
        )
        timeout = config.trainer.hang_timeout
        with Watchdog(trainer, timeout, directory / STACKS) if timeout else contextlib.nullcontext():
            attach_wandb(trainer, recorder)
            _fit(trainer, module, data, checkpoint, directory)
        status = PRUNED if _was_pruned(trainer) else DONE
        if expected:
            print_summary(config, directory, recorder, trainer, expected.outcome(recorder, trainer))
            end_state(directory, status)
        return status
    except Preempted:
        print_stopped("Stopped by a signal", directory, trainer.global_step)
        if is_first:
            end_state(directory, PREEMPTED)
        return PREEMPTED
    except BaseException as error:
        if is_first:
            end_state(directory, status_of(error), str(error) or type(error).__name__)
        raise
    finally:
        close_log(handler)


def _fit(trainer: L.Trainer, module: GPTModule, data: TokenData, checkpoint: Path | None, directory: Path) -> None:
    """Train; an interrupt stays one, which Lightning would turn into exit status 1."""
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except (SystemExit, KeyboardInterrupt):
        if trainer.interrupted:
            print_stopped("Interrupted", directory, trainer.global_step)
            raise KeyboardInterrupt from None
        raise


def build_module(config: Config, prepared: TokenDataset, devices: Devices) -> GPTModule:
    """Build the network, the same on every rank, and what trains it."""
    torch.manual_seed(config.seed)
    model = build_gpt(config.model)
    if config.init_from:
        load_weights(model, resolve_path(config.init_from))
    if config.lora:
        add_lora(model, config.lora)
    return GPTModule(
        model,
        optimizer=config.optimizer,
        schedule=config.schedule,
        max_steps=config.steps,
        grad_clip=config.train.grad_clip,
        ema_decay=config.train.ema_decay,
        seed=config.seed,
        token_bytes=torch.from_numpy(prepared.tokenizer.token_bytes()),
        compile=devices.compile,
        compile_mode=config.train.compile_mode,
        micro_batch_sizes=len(config.train.stages.sizes),
        loss_chunk=resolve_loss_chunk(config.train.loss_chunk, config.model),
    )


def build_trainer(
    config: Config,
    prepared: TokenDataset,
    devices: Devices,
    plan: BatchPlan,
    directory: Path,
    recorder: MetricsCallback,
    checkpoint: Path | None,
) -> L.Trainer:
    """Build Lightning's Trainer with the run's callbacks and loggers."""
    wanted = config.callbacks.checkpoint
    files = _checkpoint_files(wanted)
    return L.Trainer(
        accelerator=devices.accelerator,
        devices=devices.devices,
        num_nodes=devices.num_nodes,
        strategy=build_strategy(config.trainer, plan, devices, sharded_checkpoints=_is_sharded(wanted)),
        precision=devices.precision,  # type: ignore[arg-type]  # one of Lightning's names, checked by the schema
        plugins=[cluster_environment(), files],
        default_root_dir=directory,
        max_steps=config.steps,
        max_epochs=-1,
        accumulate_grad_batches=plan.accumulation,
        val_check_interval=config.train.eval_every * plan.accumulation,  # Lightning counts micro-batches here
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        callbacks=_callbacks(config, prepared, directory, recorder, files),
        logger=build_loggers(config, directory, checkpoint_step(checkpoint) if checkpoint else None),
        profiler=_profiler(config, directory),
        enable_checkpointing=wanted is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
    )


def _callbacks(
    config: Config, prepared: TokenDataset, directory: Path, recorder: MetricsCallback, files: AtomicCheckpointIO
) -> list[L.Callback]:
    """Build what happens around the steps, in the order in which it does."""
    pulse, wanted = StepSync(), config.callbacks
    guard = TrainingHealthMonitor(pulse, config.train, replay_command(directory))
    recorder.counts.append(guard.counts)
    callbacks: list[L.Callback] = [pulse, recorder, guard]
    if wanted.trace:  # before the checkpoints: each has its line
        callbacks.append(DeterminismTrace(directory / TRACE, wanted.trace.every))
    if wanted.samples:
        callbacks.append(Samples(wanted.samples, prepared.tokenizer, directory / SAMPLES, config.seed))
    if wanted.hellaswag:
        examples = read_examples_cached(Path(wanted.hellaswag.path), prepared.tokenizer, wanted.hellaswag.limit)
        callbacks.append(HellaSwag(wanted.hellaswag, examples, config.train.eval_every, config.steps, recorder.tokens))
    if wanted.early_stopping:
        patience, min_delta = wanted.early_stopping.patience, wanted.early_stopping.min_delta
        callbacks.append(EarlyStopping("val/loss", patience=patience, min_delta=min_delta, mode="min"))
    checkpoints = None
    if wanted.checkpoint:
        every, eval_every = wanted.checkpoint.every, config.train.eval_every
        checkpoints = RunCheckpoint(files, directory / CHECKPOINTS, every=every, eval_every=eval_every)
        callbacks.append(checkpoints)
    if is_prunable(directory):
        from gptlab.sweeps.pruning import PruningCallback  # with Optuna

        callbacks.append(PruningCallback(directory, recorder))
    return [*callbacks, Preemption(pulse, checkpoints), GarbageCollection()]


def _was_pruned(trainer: L.Trainer) -> bool:
    """Whether its sweep has ended the run."""
    return any(getattr(callback, "pruned", False) for callback in trainer.callbacks)  # type: ignore[attr-defined]


def _directory(config: Config, prepared: TokenDataset, place: Path | None, model: GPT, lock: RunLock) -> Path:
    """Create and lock the run directory, or record the configuration with which an earlier run is resumed."""
    if config.resume:
        record_config(config, Path(config.resume))
        return Path(config.resume)
    if config.resume_from_nanogpt is None:
        return create_run_dir(config, prepared.manifest, place, lock)
    checkpoint = import_nanogpt_checkpoint(Path(config.resume_from_nanogpt), config, model)
    directory = create_run_dir(config, prepared.manifest, place, lock)
    facts = CheckpointMetadata(step=checkpoint["global_step"], val_loss=None, evaluation_due=False)
    _checkpoint_files(None).save_checkpoint(checkpoint, checkpoint_path(directory / CHECKPOINTS, facts.step), facts)
    return directory


def _checkpoint(config: Config, lock: RunLock) -> Path | None:
    """Lock an earlier run and find its newest checkpoint; None for a new run."""
    if config.resume is None:
        return None
    lock.acquire(Path(config.resume))
    clean_up(Path(config.resume) / CHECKPOINTS)
    return newest_checkpoint(Path(config.resume))


def _checkpoint_files(config: CheckpointConfig | None) -> AtomicCheckpointIO:
    """Build what reads checkpoints and, where the run is saved, writes them."""
    if config is None:
        return AtomicCheckpointIO(keep_last=1, keep_best=False, asynchronous=False)
    return AtomicCheckpointIO(keep_last=config.keep_last, keep_best=config.keep_best, asynchronous=config.asynchronous)


def _is_sharded(config: CheckpointConfig | None) -> bool:
    """Whether a sharded run writes shards: it does where nobody says otherwise."""
    return config is not None and config.sharded in (True, "auto")


def build_recorder(config: Config, devices: Devices) -> MetricsCallback:
    """Build what records the run."""
    # adapted, a network has no gradients of its weights, and the formula of the FLOPs does not hold
    peak = devices.peak_flops() if config.lora is None else None
    return MetricsCallback(
        log_every=config.train.log_every,
        max_steps=config.steps,
        stages=config.train.stages,
        block_size=config.model.block_size,
        flops_per_token=flops_per_token(config.model),
        peak_flops=peak * devices.world_size if peak else None,
    )


def _profiler(config: Config, directory: Path) -> Profiler:
    folder = directory / "profile"
    match config.trainer.profiler if is_first_rank() else None:
        case "simple":
            return SimpleProfiler(dirpath=folder, filename="times")
        case "pytorch":
            return PyTorchProfiler(dirpath=folder, filename="trace", emit_nvtx=False, export_to_chrome=True)
        case _:
            return NullProfiler()
