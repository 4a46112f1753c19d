"""Trains one run in this process: builds the module, run directory, callbacks and Trainer, and calls ``fit``."""

import contextlib
import json
import logging
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import lightning as L
import torch
import torch.distributed as dist
from lightning.pytorch.profilers import Profiler, PyTorchProfiler, SimpleProfiler

from gptlab.config.resume import START_KEYS
from gptlab.config.schema import RunConfig
from gptlab.data.shards.manifest import Manifest
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.errors import OutOfMemory, UserError, failure_reason, first_line, hide_passwords, mismatch_reason
from gptlab.evaluation.hellaswag import read_examples_cached
from gptlab.exit_codes import DONE, PREEMPTED, PRUNED, RUN_DIR, report_result
from gptlab.launch.components import build_callbacks, build_component_loggers, count_components
from gptlab.launch.signals import StoppedEarly
from gptlab.model.config import flops_per_token
from gptlab.model.gpt import GPT
from gptlab.model.lora import add_lora
from gptlab.model.modern import build_gpt
from gptlab.pretrained.nanogpt import import_nanogpt_checkpoint
from gptlab.pretrained.source import resolve_path
from gptlab.pretrained.weights import load_weights
from gptlab.tracking.console import print_start, print_stopped, print_summary, replay_command
from gptlab.tracking.environment import read_threads
from gptlab.tracking.loggers import build_loggers, check_metrics
from gptlab.tracking.logs import close_log, log_to_file, quiet_lightning
from gptlab.tracking.run_directory import (
    LOG,
    STACKS,
    TRACE,
    check_writable,
    create_run_dir,
    newest_checkpoint,
    record_config,
)
from gptlab.tracking.run_lock import RunLock
from gptlab.tracking.run_store.blow_up import describe_blow_up
from gptlab.tracking.run_store.runs import CHECKPOINTS, SAMPLES, Run
from gptlab.tracking.run_store.state import end_state, status_of
from gptlab.tracking.wandb.logger import attach_wandb
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.callbacks.determinism_trace import DeterminismTrace
from gptlab.training.callbacks.early_stopping import EarlyStopping
from gptlab.training.callbacks.health_monitor import TrainingHealthMonitor
from gptlab.training.callbacks.hellaswag import HellaSwag
from gptlab.training.callbacks.metrics import MetricsCallback
from gptlab.training.callbacks.overhead import GarbageCollection, NullProfiler
from gptlab.training.callbacks.preemption import Preempted, Preemption
from gptlab.training.callbacks.run_checkpoint import RunCheckpoint
from gptlab.training.callbacks.samples import Samples
from gptlab.training.callbacks.step_sync import StepSync
from gptlab.training.callbacks.watchdog import Watchdog
from gptlab.training.checkpoints.records import CheckpointMetadata, checkpoint_path, checkpoint_step, clean_up
from gptlab.training.checkpoints.writing import AtomicCheckpointIO
from gptlab.training.config import CheckpointConfig
from gptlab.training.datamodule import TokenDataModule
from gptlab.training.devices import choose_devices, is_out_of_memory, prepare_kernels, use_deterministic_algorithms
from gptlab.training.distributed.process_group import (
    abort_group_on_error,
    accelerator_for,
    cluster_environment,
    join_group,
    run_on_first_rank,
)
from gptlab.training.distributed.processes import global_rank, is_first_rank
from gptlab.training.distributed.strategies import build_strategy
from gptlab.training.hardware import Hardware, resolve_loss_chunk
from gptlab.training.module import GPTModule

log = logging.getLogger(__name__)

# packages that raise the errors of a damaged checkpoint; Lightning compares its version with packaging
CHECKPOINT_READERS = {"gptlab", "lightning", "torch", "packaging", *sys.stdlib_module_names}


class RunContext(NamedTuple):
    """Arguments of the function that builds extra callbacks.

    Attributes:
        config: Completed configuration.
        manifest: Manifest of the data.
        devices: Devices of the run.
        run_dir: Run directory.
        recorder: Metrics callback of the run, which knows the tokens seen.
    """

    config: RunConfig
    manifest: Manifest
    devices: Hardware
    run_dir: Path
    recorder: MetricsCallback


class ExtraCallback(L.Callback):
    """Base class of callbacks that packages above ``launch`` add to a run.

    Attributes:
        pruned: Whether the callback ended the run early, which then exits with ``PRUNED``.
    """

    pruned = False

    def summary(self, trainer: L.Trainer) -> dict[str, str]:
        """Returns additional rows of the final summary table; called on every rank when training is done."""
        return {}

    def memory_advice(self) -> str:
        """Returns a sentence for the error of a run that is out of memory; called on the rank that is."""
        return ""


ExtraCallbacks = Callable[[RunContext], Sequence[ExtraCallback]]


def train_run(
    config: RunConfig,
    prepared: TokenDataset,
    plan: BatchPlan | None,
    run_dir: Path | None,
    *,
    extra_callbacks: ExtraCallbacks,
) -> int:
    """Trains a run; called on every rank. All checks run before anything is written.

    Args:
        config: Configuration completed by ``gptlab.launch.launcher.preflight``.
        prepared: Prepared data.
        plan: Batch plan; None if it depends on the number of devices of this machine.
        run_dir: Run directory assigned by a sweep; None creates ``outputs/<name>/<time>``.
        extra_callbacks: Returns the callbacks of packages above this one, on each rank.

    Returns:
        The exit code: DONE, PRUNED or PREEMPTED.

    Raises:
        UserError: Devices are not available, there is no intact checkpoint or no W&B login, or another process writes
            to the run directory.
        Diverged: The gradient was not finite for ``train.max_bad_steps`` steps in a row, or the loss of the last
            evaluation is not finite.
    """
    try:
        with RunLock() as lock, abort_group_on_error():
            return _train(config, prepared, plan, run_dir, lock, extra_callbacks)
    except (IsADirectoryError, NotADirectoryError, FileExistsError) as error:  # in a resumed run
        path = error.filename2 or error.filename
        raise UserError(f"{path} cannot be written: {failure_reason(error)}. Remove it.") from error


def _train(
    config: RunConfig,
    prepared: TokenDataset,
    plan: BatchPlan | None,
    assigned_dir: Path | None,
    lock: RunLock,
    extra_callbacks: ExtraCallbacks,
) -> int:
    quiet_lightning()
    config = count_components(config)
    if config.trainer.deterministic:
        use_deterministic_algorithms()  # before CUDA is initialized
    devices = choose_devices(config.trainer, config.train, config.model)
    prepare_kernels(devices)
    if plan is None:
        plan = config.train.plan(config.trainer.data_parallel(devices.devices, devices.num_nodes))
    _check_graphs(config, devices, plan)
    join_group(devices)
    checkpoint = run_on_first_rank(lambda: _find_checkpoint(config, lock))
    if checkpoint is not None and checkpoint_step(checkpoint) < config.train.past_steps:  # a newer one is damaged
        train = config.train.model_copy(
            update={"past_batches": config.train.batches_until(checkpoint_step(checkpoint))}
        )
        config, plan = config.model_copy(update={"train": train}), train.plan(plan.world_size)
    module = build_module(config, prepared, devices)
    run_dir = run_on_first_rank(
        lambda: _open_run_dir(config, prepared, assigned_dir, module.model, lock, devices.accelerator)
    )
    report_result(RUN_DIR, str(run_dir))
    if config.resume_from_nanogpt:
        checkpoint = run_on_first_rank(lambda: newest_checkpoint(run_dir))
    is_first = is_first_rank()
    handler = log_to_file(run_dir / LOG) if is_first else logging.NullHandler()
    try:
        print_start(config, prepared.manifest, devices, plan, run_dir)
        recorder = build_metrics_callback(config, devices)
        extra = extra_callbacks(RunContext(config, prepared.manifest, devices, run_dir, recorder))
        trainer = build_trainer(config, prepared, devices, plan, run_dir, recorder, checkpoint, extra)
        data = _build_data(config, prepared, plan)
        timeout = config.trainer.hang_timeout
        with Watchdog(trainer, timeout, run_dir / STACKS) if timeout else contextlib.nullcontext():
            attach_wandb(trainer, recorder)
            with _explaining_memory(plan, extra), _restoring(checkpoint, recorder):
                _fit(trainer, module, data, checkpoint, run_dir, config)
        status = PRUNED if any(callback.pruned for callback in extra) else DONE
        summary = {name: value for callback in extra for name, value in callback.summary(trainer).items()}
        if is_first:
            blow_up = describe_blow_up(Run(run_dir))
            print_summary(config, run_dir, recorder, trainer, summary, blow_up)
    except Preempted:
        print_stopped("Preempted by a signal", run_dir, trainer.global_step, config)
        if is_first:
            step = trainer.global_step
            end_state(run_dir, PREEMPTED, step=step, tokens=recorder.tokens(step))
        return PREEMPTED
    except StoppedEarly:
        if is_first:
            end_state(run_dir, PREEMPTED)
        raise
    except BaseException as error:
        if is_first:
            end_state(run_dir, status_of(error), hide_passwords(str(error)) or type(error).__name__)
        raise
    else:  # an interrupt from here on does not change the record
        if is_first:
            end_state(run_dir, status, blew_up=blow_up)
        return status
    finally:
        close_log(handler)


def _check_graphs(config: RunConfig, devices: Hardware, plan: BatchPlan) -> None:
    """Checks that the gradients of a sharded model do not accumulate in the memory of CUDA graphs.

    Raises:
        UserError: They would: FSDP keeps the tensors that the graphs of the blocks return.
    """
    is_on_graphs = devices.accelerator == "cuda" and devices.compile and config.train.uses_cuda_graphs
    if is_on_graphs and config.trainer.strategy in ("fsdp", "fsdp_tp") and plan.accumulation > 1:
        raise UserError(
            f"train.compile_mode={config.train.compile_mode}: CUDA graphs would overwrite the gradients that "
            f"trainer.strategy={config.trainer.strategy} accumulates over {plan.accumulation} micro-batches. Use "
            "train.compile_mode=default or max-autotune-no-cudagraphs, trainer=ddp, or a larger train.micro_batch_size."
        )


def _fit(
    trainer: L.Trainer,
    module: GPTModule,
    data: TokenDataModule,
    checkpoint: Path | None,
    run_dir: Path,
    config: RunConfig,
) -> None:
    """Calls ``Trainer.fit``; re-raises KeyboardInterrupt, which Lightning would turn into exit code 1."""
    try:
        trainer.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    except (SystemExit, KeyboardInterrupt):
        if trainer.interrupted:
            print_stopped("Interrupted", run_dir, trainer.global_step, config)
            raise KeyboardInterrupt from None
        raise


@contextlib.contextmanager
def _restoring(checkpoint: Path | None, recorder: MetricsCallback) -> Iterator[None]:
    """Converts the errors of Lightning and torch for a checkpoint that does not fit the run to a UserError."""
    try:
        yield
    except (KeyError, IndexError, TypeError, AttributeError, ValueError, OverflowError, RuntimeError) as error:
        *_, (frame, _) = traceback.walk_tb(error.__traceback__)
        is_of_component = frame.f_globals["__name__"].partition(".")[0] not in CHECKPOINT_READERS
        is_other = is_of_component or isinstance(error, dist.DistError) or is_out_of_memory(error)
        if checkpoint is None or recorder.has_started or is_other:
            raise
        reason = mismatch_reason(error).rstrip(".")
        raise UserError(f"{checkpoint} cannot be resumed, because it does not fit this run: {reason}.") from error


@contextlib.contextmanager
def _explaining_memory(plan: BatchPlan, extra_callbacks: Sequence[ExtraCallback]) -> Iterator[None]:
    """Converts an error for lack of memory to OutOfMemory, with the advice of the callbacks."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        what, _, _ = first_line(error).partition(". GPU ")  # "CUDA out of memory. Tried to allocate 2.00 GiB"
        is_on_host = isinstance(error, MemoryError) or "CPUAllocator" in what
        advice = " ".join(filter(None, (callback.memory_advice() for callback in extra_callbacks)))
        raise OutOfMemory(
            f"train.micro_batch_size={plan.micro_batch_size} needs more memory than the "
            f"{'machine' if is_on_host else 'GPU'} of rank {global_rank()} "
            f"has ({what.rstrip('.')}). {advice or 'Use a smaller train.micro_batch_size.'}"
        ) from error


def _build_data(config: RunConfig, prepared: TokenDataset, plan: BatchPlan) -> TokenDataModule:
    return TokenDataModule(
        prepared,
        config.data,
        plan=plan,
        block_size=config.model.block_size,
        seed=config.seed,
        eval_windows=config.train.eval_windows,
    )


def build_module(config: RunConfig, prepared: TokenDataset, devices: Hardware) -> GPTModule:
    """Builds the LightningModule; its initial weights are identical on every rank.

    Raises:
        UserError: The weights of ``init_from`` cannot be loaded.
    """
    torch.manual_seed(config.seed)
    model = build_gpt(config.model)
    if config.init_from:
        load_weights(model, resolve_path(config.init_from))
    if config.lora:
        add_lora(model, config.lora)
    token_bytes = torch.from_numpy(prepared.tokenizer.token_bytes())
    chunk = resolve_loss_chunk(config.train.loss_chunk, config.model, devices)
    return GPTModule(model, config, token_bytes=token_bytes, compile=devices.compile, loss_chunk=chunk)


def build_trainer(
    config: RunConfig,
    prepared: TokenDataset,
    devices: Hardware,
    plan: BatchPlan,
    run_dir: Path,
    recorder: MetricsCallback,
    checkpoint: Path | None,
    extra_callbacks: Sequence[L.Callback] = (),
) -> L.Trainer:
    """Builds the Trainer with the run's callbacks and loggers."""
    checkpointing = config.callbacks.checkpoint
    checkpoint_io = _build_checkpoint_io(checkpointing)
    return L.Trainer(
        accelerator=accelerator_for(devices),
        devices=devices.devices,
        num_nodes=devices.num_nodes,
        strategy=build_strategy(config.trainer, plan, devices, sharded_checkpoints=_is_sharded(checkpointing)),
        precision=devices.precision,  # type: ignore[arg-type]  # one of Lightning's names, checked by the schema
        plugins=[cluster_environment(), checkpoint_io],
        default_root_dir=run_dir,
        max_steps=config.steps,
        max_epochs=-1,
        accumulate_grad_batches=plan.accumulation,
        val_check_interval=config.train.eval_every * plan.accumulation,  # Lightning counts micro-batches here
        check_val_every_n_epoch=None,
        num_sanity_val_steps=0,
        log_every_n_steps=config.train.log_every,
        callbacks=_build_callbacks(config, prepared, run_dir, recorder, checkpoint_io, extra_callbacks),
        logger=[
            *build_component_loggers(config, run_dir),
            *build_loggers(config, run_dir, checkpoint_step(checkpoint) if checkpoint else None),
        ],
        profiler=_build_profiler(config, run_dir),
        enable_checkpointing=checkpointing is not None,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        inference_mode=False,
        **config.trainer.flags,
    )


def _build_callbacks(
    config: RunConfig,
    prepared: TokenDataset,
    run_dir: Path,
    recorder: MetricsCallback,
    checkpoint_io: AtomicCheckpointIO,
    extra_callbacks: Sequence[L.Callback],
) -> list[L.Callback]:
    """Returns the callbacks in the order in which Lightning calls them."""
    step_sync, wanted = StepSync(), config.callbacks
    health_monitor = TrainingHealthMonitor(step_sync, config.train, replay_command(run_dir))
    recorder.counts.append(health_monitor.counts)
    callbacks: list[L.Callback] = [step_sync, recorder, health_monitor]
    if wanted.trace:  # before the checkpoints, so that each checkpointed step has its line
        callbacks.append(DeterminismTrace(run_dir / TRACE, wanted.trace.every))
    if wanted.samples:
        callbacks.append(Samples(wanted.samples, prepared.tokenizer, run_dir / SAMPLES, config.seed))
    if wanted.hellaswag:
        examples = read_examples_cached(Path(wanted.hellaswag.path), prepared.tokenizer, wanted.hellaswag.limit)
        callbacks.append(HellaSwag(wanted.hellaswag, examples, config.train.eval_every, config.steps, recorder.tokens))
    callbacks += build_callbacks(config)
    if wanted.early_stopping:  # after the callbacks whose metrics it may monitor
        callbacks.append(EarlyStopping(wanted.early_stopping))
    checkpoints = None
    if wanted.checkpoint:
        every, eval_every = wanted.checkpoint.every, config.train.eval_every
        checkpoints = RunCheckpoint(
            checkpoint_io, run_dir / CHECKPOINTS, every=every, eval_every=eval_every, end_rules=_end_rules(config)
        )
        callbacks.append(checkpoints)
    return [*callbacks, *extra_callbacks, Preemption(step_sync, checkpoints), GarbageCollection()]


def _end_rules(config: RunConfig) -> str:
    """Returns the length of the run and the configuration of the callbacks that may end it early, as JSON."""
    others = {"checkpoint", "samples", "hellaswag", "trace"}
    return json.dumps({"steps": config.steps, **config.callbacks.model_dump(mode="json", exclude=others)})


def _open_run_dir(
    config: RunConfig, prepared: TokenDataset, assigned_dir: Path | None, model: GPT, lock: RunLock, accelerator: str
) -> Path:
    """Creates and locks the run directory; on a resume, records the configuration in the existing one."""
    if config.resume:
        if accelerator == "cpu":
            _warn_about_threads(Path(config.resume))
        earlier = Run(Path(config.resume)).config
        record_config(config.model_copy(update={key: earlier.get(key) for key in START_KEYS}), Path(config.resume))
        return Path(config.resume)
    if config.resume_from_nanogpt is None:
        return create_run_dir(config, prepared.manifest, assigned_dir, lock)
    checkpoint = import_nanogpt_checkpoint(Path(config.resume_from_nanogpt), config, model)
    run_dir = create_run_dir(config, prepared.manifest, assigned_dir, lock)
    facts = CheckpointMetadata(step=checkpoint["global_step"], val_loss=None, evaluation_due=False)
    _build_checkpoint_io(None).save_checkpoint(checkpoint, checkpoint_path(run_dir / CHECKPOINTS, facts.step), facts)
    return run_dir


def _warn_about_threads(run_dir: Path) -> None:
    """Logs a warning if a run on the CPU is resumed with another number of threads, which rounds sums differently."""
    earlier, now = read_threads(run_dir), torch.get_num_threads()
    if earlier not in (None, now):
        log.warning(
            "The number of threads per process is %d, but was %d: sums are rounded differently, so the run is not "
            "bit-identical to an uninterrupted one. To use as many as before: OMP_NUM_THREADS=%d",
            now,
            earlier,
            earlier,
        )


def _find_checkpoint(config: RunConfig, lock: RunLock) -> Path | None:
    """Locks the run to resume and returns its newest checkpoint; None for a new run."""
    if config.resume is None:
        return None
    run_dir = Path(config.resume)
    lock.acquire(run_dir)
    check_writable(run_dir)
    check_metrics(run_dir)
    clean_up(run_dir / CHECKPOINTS)
    return newest_checkpoint(run_dir)


def _build_checkpoint_io(config: CheckpointConfig | None) -> AtomicCheckpointIO:
    """Builds the CheckpointIO that reads checkpoints and, if the run is saved, writes them."""
    if config is None:
        return AtomicCheckpointIO(keep_last=1, keep_best=False, asynchronous=False)
    return AtomicCheckpointIO(keep_last=config.keep_last, keep_best=config.keep_best, asynchronous=config.asynchronous)


def _is_sharded(config: CheckpointConfig | None) -> bool:
    """Whether a sharded model is saved as sharded checkpoints, which is the default."""
    return config is not None and config.sharded in (True, "auto")


def build_metrics_callback(config: RunConfig, devices: Hardware) -> MetricsCallback:
    """Builds the callback that records metrics."""
    peak = devices.peak_flops()
    return MetricsCallback(
        log_every=config.train.log_every,
        max_steps=config.steps,
        stages=config.train.stages,
        block_size=config.model.block_size,
        flops_per_token=flops_per_token(config.model, config.lora),
        peak_flops=peak * devices.world_size if peak else None,
    )


def _build_profiler(config: RunConfig, run_dir: Path) -> Profiler:
    folder = run_dir / "profile"
    match config.trainer.profiler if is_first_rank() else None:
        case "simple":
            return SimpleProfiler(dirpath=folder, filename="times")
        case "pytorch":
            return PyTorchProfiler(dirpath=folder, filename="trace", emit_nvtx=False, export_to_chrome=True)
        case _:
            return NullProfiler()
