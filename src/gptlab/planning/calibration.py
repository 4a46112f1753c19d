"""Measured speed and memory of runs on this machine, for plans of runs of the same shape. Imports no torch.

Every run saves them in the cache when it ends, under a hash of the machine and of everything that decides how fast a
step is.
"""

import hashlib
import json
import logging
import os
import subprocess
import tempfile
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path
from typing import Any

from pydantic import NonNegativeFloat, PositiveFloat, PositiveInt, ValidationError

from gptlab.config.base import FrozenConfig
from gptlab.config.schema import LoggerConfig, RunConfig
from gptlab.data.shards.manifest import write_durably
from gptlab.errors import UserError
from gptlab.launch.supervisor import Job, start_worker
from gptlab.tracking.run_store.runs import MetricsRow
from gptlab.training.config import CallbacksConfig
from gptlab.training.hardware import Hardware, resolve_loss_chunk

log = logging.getLogger(__name__)

FOLDER = "measured"
STEPS = 24  # of a run that is only measured
EVAL_WINDOWS = 32


class Measurement(FrozenConfig):
    """Measured speed and memory of a run.

    Attributes:
        tokens_per_second: Training throughput of all devices together, without the first step.
        first_step_seconds: Duration of the first step, with compilation and allocation.
        evaluation_seconds: Duration of an evaluation, with the sample and the checkpoint that follow it.
        evaluated: Tokens of each evaluation.
        peak_memory_bytes: Peak memory of the first rank's device.
        steps: Measured steps.
        source: Describes the run.
    """

    tokens_per_second: PositiveFloat
    first_step_seconds: NonNegativeFloat
    evaluation_seconds: NonNegativeFloat
    evaluated: int
    peak_memory_bytes: PositiveFloat
    steps: PositiveInt
    source: str


def find_measurement(config: RunConfig, hardware: Hardware) -> Measurement | None:
    """Returns the measurement of a run of this shape on this machine, or None."""
    if not hardware.is_local:
        return None
    try:
        return Measurement.model_validate_json(_path(config, hardware).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None


def save_measurement(config: RunConfig, hardware: Hardware, measured: Measurement) -> None:
    """Saves a measurement; logs a warning if that fails."""
    path = _path(config, hardware)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, measured.model_dump_json(indent=1) + "\n")
    except OSError as error:
        log.warning("What the run took is not kept for plans: %s", error)


def measure_run(
    rows: list[MetricsRow], *, seconds: float, evaluations: int, evaluated: int, peak_memory: float, source: str
) -> Measurement | None:
    """Returns a run's speed by its metrics, or None if it was too short to measure.

    Args:
        rows: The rows of metrics.csv.
        seconds: Duration of the whole run.
        evaluations: Number of evaluations.
        evaluated: Tokens of each.
        peak_memory: Bytes.
        source: Describes the run.
    """
    speeds = [row for row in rows if row.get("tokens_per_second")]
    if len(speeds) < 2 or speeds[0]["step"] != 1:
        return None
    first = speeds[0]["tokens"] / speeds[0]["tokens_per_second"]
    spans = [(b["tokens"] - a["tokens"], b["tokens_per_second"]) for a, b in pairwise(speeds)]
    trained = sum(tokens / speed for tokens, speed in spans)
    others = max(0.0, seconds - first - trained)
    return Measurement(
        tokens_per_second=sum(tokens for tokens, _ in spans) / trained,
        first_step_seconds=first,
        evaluation_seconds=others / max(1, evaluations),
        evaluated=evaluated,
        peak_memory_bytes=peak_memory,
        steps=round(speeds[-1]["step"]) - 1,
        source=source,
    )


def calibrate(config: RunConfig) -> None:
    """Runs the first steps of a configuration in a process of its own, which saves its measurement.

    Raises:
        UserError: The run fails.
    """
    with tempfile.TemporaryDirectory(prefix="gptlab-plan-") as folder:
        job, place, said = (Path(folder) / name for name in ("job.json", "run", "said.txt"))
        Job(_shortened(config), place).write(job)
        with said.open("wb") as output, start_worker(job, stdout=output, stderr=subprocess.STDOUT) as worker:
            status = worker.wait()
        if status:
            lines = said.read_text(encoding="utf-8", errors="replace").splitlines()
            raise UserError(
                f"calibrate=true: the run that was to be measured ended with status {status}. It said: "
                + "\n".join(lines[-5:])
            )


def _shortened(config: RunConfig) -> RunConfig:
    """Returns a run that is long enough to be measured, and writes to its own directory only."""
    steps = min(STEPS, config.steps)
    windows = min(config.train.eval_windows or EVAL_WINDOWS, EVAL_WINDOWS)
    changes = {"max_steps": steps, "max_tokens": None, "eval_every": steps, "eval_windows": windows, "log_every": 1}
    return config.model_copy(
        update={
            "resume": None,
            "force_resume": False,
            "train": config.train.model_copy(update=changes),
            "logger": LoggerConfig(),
            "callbacks": CallbacksConfig(checkpoint=config.callbacks.checkpoint, samples=config.callbacks.samples),
        }
    )


def _path(config: RunConfig, hardware: Hardware) -> Path:
    folder = Path(config.data.cache_dir).expanduser() / FOLDER
    key = json.dumps(_key(config, hardware), sort_keys=True)
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _key(config: RunConfig, hardware: Hardware) -> dict[str, Any]:
    """Returns everything that decides how fast a step is, and how much memory it needs."""
    train, trainer = config.train, config.trainer
    loss_chunk = resolve_loss_chunk(train.loss_chunk, config.model)
    return {
        "machine": [hardware.accelerator, hardware.name, hardware.devices, hardware.num_nodes, _threads()],
        "torch": version("torch"),
        "model": config.model.model_dump(mode="json"),
        "precision": [hardware.precision, hardware.compile, trainer.float32_matmul],
        "batch": [train.global_batch_size, train.micro_batch_size, train.batch_schedule, loss_chunk],
        "spread": [trainer.strategy, trainer.tensor_parallel, trainer.reshard_after_forward, trainer.cpu_offload],
        "optimizer": [config.optimizer.name, train.ema_decay],
        "data": [config.data.num_workers, config.data.documents],
        "compile_mode": train.compile_mode,
    }


def _threads() -> int:
    """Returns the number of threads that torch will use on a CPU."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    return int(named) if named.isdigit() else len(os.sched_getaffinity(0))
