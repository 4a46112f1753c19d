"""Console output at the start and the end of a run."""

import logging
from datetime import timedelta
from pathlib import Path

import lightning as L
from rich import box
from rich.panel import Panel
from rich.text import Text

from gptlab.config.schema import RunConfig
from gptlab.config.trust import trust_override
from gptlab.data.repetition import repetition_warning
from gptlab.data.shards.manifest import Manifest
from gptlab.model.config import describe_lora, parameter_count
from gptlab.tables import key_value_table, print_table
from gptlab.terminal import get_console
from gptlab.tracking.logs import FILE_ONLY
from gptlab.tracking.run_directory import has_checkpoint
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.callbacks.metrics import MetricsCallback
from gptlab.training.callbacks.samples import Samples
from gptlab.training.hardware import Hardware

log = logging.getLogger(__name__)

MATMULS = {"onednn": " by oneDNN", "tf32": " with matmuls in TF32"}
COMPILED = {False: "not compiled", "whole": "compiled", "blocks": "compiled block by block"}


def print_start(config: RunConfig, manifest: Manifest, devices: Hardware, plan: BatchPlan, directory: Path) -> None:
    """Logs model, data, devices and batch size at the start of a run."""
    block_size, stages = config.model.block_size, config.train.stages
    matmuls = MATMULS.get(devices.float32_matmul, "") if devices.precision == "32-true" else ""
    precision = f"{devices.precision}{matmuls}, {COMPILED[devices.compile]}"
    parts = config.trainer.tensor_parallel
    over = "devices" if parts == 1 else f"groups of {parts} devices"
    factors = f"{plan.world_size} x {plan.accumulation} x {plan.micro_batch_size}"
    meaning = f"({over} x gradient accumulation x micro-batch)"
    steps, tokens = f"{config.steps:,} step{'' if config.steps == 1 else 's'}", stages.first(config.steps) * block_size
    train, val = manifest.tokens("train"), manifest.tokens("val")
    lines = {
        "model": f"{parameter_count(config.model):,} parameters{describe_lora(config.model, config.lora)}",
        "data": f"{manifest.origin}: {train:,} / {val:,} tokens train / val",
        "tokenizer": f"{config.tokenizer.name}, {manifest.vocab_size:,} token IDs",
        "device": f"{devices.accelerator}, {devices.name}; {precision}",
        "batch": f"{config.train.global_batch_size} sequences of {block_size} tokens: {factors} {meaning}",
        **({"before": ", ".join(f"{size} up to step {end:,}" for end, size in plan.earlier)} if plan.earlier else {}),
        "length": f"{steps}, {tokens:,} tokens",
        "run": str(_display_path(directory)),
    }
    for name, value in lines.items():
        log.info("%-9s %s", name, value)
    if warning := repetition_warning(tokens, manifest):
        log.warning("%s", warning)


def print_summary(
    config: RunConfig,
    directory: Path,
    recorder: MetricsCallback,
    trainer: L.Trainer,
    further: dict[str, str],
    blow_up: str | None,
) -> None:
    """Prints the last sample and the summary table at the end of a run.

    Args:
        config: Configuration of the run.
        directory: Run directory.
        recorder: Metrics callback of the run.
        trainer: Trainer of the run.
        further: Additional rows of the table, as name and value.
        blow_up: Message of ``describe_blow_up``; None if the run has not blown up.
    """
    console = get_console()
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if isinstance(callback, Samples) and callback.latest:
            title = f"sample at step {trainer.global_step:,}"
            console.print(Panel(Text(callback.latest[0]), title=title, title_align="left", box=box.ROUNDED))
    rows = {
        "parameters": f"{parameter_count(config.model):,}{describe_lora(config.model, config.lora)}",
        "tokens seen": f"{recorder.tokens(trainer.global_step):,}",
        **({"stopped early": f"at step {trainer.global_step:,}"} if trainer.global_step < config.steps else {}),
        **_best(recorder.best),
        "wall time": str(timedelta(seconds=round(recorder.seconds))),
        "run directory": str(_display_path(directory)),
        "mfu": _mfu(recorder),
        **further,
    }
    for name, value in rows.items():
        log.info("%-13s %s", name, value, extra=FILE_ONLY)
    print_table(key_value_table(rows.items()))
    if blow_up:
        log.warning("%s", blow_up)
    trust = trust_override({"model": config.model.model_dump(mode="json"), "tokenizer": config.tokenizer.model_dump()})
    following = f"python -m gptlab.sample run={_display_path(directory)}{trust}"
    log.info("Next: %s", following)


def print_stopped(why: str, directory: Path, step: int, config: RunConfig) -> None:
    """Logs why and at which step a run stopped, and the command that resumes it."""
    if has_checkpoint(directory):
        resume = f"resume={_display_path(directory)}{trust_override(config.model_dump(mode='json'))}"
        log.info("%s at step %d. To resume: python -m gptlab.train %s", why, step, resume)
    else:
        log.info("%s at step %d, before the first checkpoint: there is nothing to resume.", why, step)


def replay_command(directory: Path) -> str:
    """Returns the command that prints the batch of a step of a run; the caller appends step=<step>."""
    return f"python -m gptlab.prepare replay={_display_path(directory)}"


def _best(best: dict[str, float]) -> dict[str, str]:
    if not best:
        return {"best val loss": "none: no evaluation had a finite loss"}
    return {
        "best val loss": f"{best['val/loss']:.4f} at step {best['step']:,}",
        "bits per byte": f"{best['val/bits_per_byte']:.4f}",
    }


def _mfu(recorder: MetricsCallback) -> str:
    """Formats the model FLOPs utilization of the last record, or the reason why it is unknown."""
    return f"{recorder.mfu:.1%}" if recorder.mfu is not None else "unknown (no published peak for this device)"


def _display_path(directory: Path) -> Path:
    """Returns the path relative to the working directory if it is inside, otherwise unchanged."""
    return directory.relative_to(Path.cwd()) if directory.is_relative_to(Path.cwd()) else directory
