"""Calibration: measured speed and memory of runs on this machine, for forecasts of similar runs. Imports no torch.

Every run saves its measurement in the cache directory at the end, under a hash of the machine and of all config keys
but those in ``EXCLUDED``. Of the measurements with one hash, that with the most steps is kept.
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
from gptlab.data.config import DataConfig
from gptlab.data.prepare.tasks import usable_cores
from gptlab.errors import UserError
from gptlab.files import write_durably
from gptlab.launch.supervisor import Job, start_worker
from gptlab.tracking.run_store.runs import MetricsRow
from gptlab.training.config import (
    AdamWConfig,
    CallbacksConfig,
    ComponentOptimizerConfig,
    MuonConfig,
    TrainConfig,
    TrainerConfig,
)
from gptlab.training.hardware import Hardware

log = logging.getLogger(__name__)

FOLDER = "measured"
STEPS = 24  # length of a calibration run
EVAL_WINDOWS = 32

# Fields that change neither the time nor the memory of a step, with the reason. A measurement applies to all runs whose
# other fields are equal, so a new field separates them until it is listed here.
_VALUE = "the same computation for each value"
_PREPARATION = "only read when the data is prepared"
_LENGTH = "the number of steps or evaluations; the time of a run is computed from it"
_HARDWARE = "resolved, and part of the hardware"
EXCLUDED: dict[type[FrozenConfig], dict[str, str]] = {
    RunConfig: {
        **{"name": "a label", "seed": _VALUE, "schedule": "one number per step", "logger": "rows of metrics only"},
        **dict.fromkeys(("resume", "force_resume", "init_from", "resume_from_nanogpt"), "only read at the start"),
        "tokenizer": "of its values, only the number of tokens matters, which is model.vocab_size",
    },
    DataConfig: {
        **dict.fromkeys(("corpus", "reader", "source", "subset", "streaming", "column", "cache_dir"), _PREPARATION),
        **dict.fromkeys(("val_split", "val_fraction", "split_seed", "separator", "end_at_cut"), _PREPARATION),
        **dict.fromkeys(("undecodable", "max_expansion", "task_bytes"), _PREPARATION),
    },
    AdamWConfig: dict.fromkeys(("lr", "betas", "eps", "weight_decay"), _VALUE),
    MuonConfig: {
        **dict.fromkeys(("lr", "embedding_lr", "head_lr", "vector_lr", "momentum", "betas", "eps"), _VALUE),
        **dict.fromkeys(("momentum_warmup_from", "momentum_warmup_steps", "adjust_lr"), _VALUE),
        **dict.fromkeys(("weight_decay", "adamw_weight_decay"), _VALUE),
    },
    ComponentOptimizerConfig: {"lr": _VALUE},
    TrainConfig: {
        **dict.fromkeys(("max_steps", "max_tokens", "eval_every", "eval_windows"), _LENGTH),
        "log_every": "a row of metrics takes less than a millisecond",
        "max_bad_steps": _VALUE,
        "past_batches": "steps before the run was resumed, and a resumed run is not measured",
        "compile": _HARDWARE,
        "loss_chunk": "resolved, and in the key",
    },
    TrainerConfig: {
        **dict.fromkeys(("accelerator", "devices", "num_nodes", "precision"), _HARDWARE),
        "hang_timeout": _VALUE,
    },
    CallbacksConfig: {
        "hellaswag": "an evaluation of its own, which is not forecast; runs with it are not saved",
        "early_stopping": "one comparison per evaluation",
    },
}


class Measurement(FrozenConfig):
    """Measured speed and memory of a run.

    Attributes:
        tokens_per_second: Training throughput of all devices, without the first step.
        first_step_seconds: Duration of the first step, including compilation and allocation.
        evaluation_seconds: Duration of an evaluation, including the sample and the checkpoint that follow it.
        evaluated: Number of tokens per evaluation.
        peak_memory_bytes: Peak memory of the device of rank 0.
        steps: Number of measured steps.
        source: Description of the measured run.
    """

    tokens_per_second: PositiveFloat
    first_step_seconds: NonNegativeFloat
    evaluation_seconds: NonNegativeFloat
    evaluated: int
    peak_memory_bytes: PositiveFloat
    steps: PositiveInt
    source: str


def find_measurement(config: RunConfig, hardware: Hardware) -> Measurement | None:
    """Returns the measurement of a similar run on this machine, or None.

    The runs are similar if all config keys that affect the speed or memory of a step are equal.
    """
    if not hardware.is_local:
        return None
    try:
        return Measurement.model_validate_json(_path(config, hardware).read_text(encoding="utf-8"))
    except (OSError, ValidationError, UnicodeDecodeError):
        return None


def save_measurement(config: RunConfig, hardware: Hardware, measured: Measurement) -> None:
    """Saves a measurement, unless there is one of more steps; logs a warning if that fails."""
    path = _path(config, hardware)
    if (known := find_measurement(config, hardware)) is not None and known.steps > measured.steps:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(path, measured.model_dump_json(indent=1) + "\n")
    except (OSError, UserError) as error:
        log.warning("The measured speed and memory could not be saved for later forecasts: %s", error)


def measure_run(
    rows: list[MetricsRow], *, seconds: float, evaluations: int, evaluated: int, peak_memory: float, source: str
) -> Measurement | None:
    """Returns the measurement of a run, or None if the run was too short or was resumed.

    Args:
        rows: Rows of metrics.csv.
        seconds: Duration of the whole run.
        evaluations: Number of evaluations.
        evaluated: Number of tokens per evaluation.
        peak_memory: Peak memory of the device of rank 0, in bytes.
        source: Description of the run.
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
    """Runs the first steps of a configuration in a new process, which saves its measurement.

    Raises:
        UserError: The calibration run failed, or would not reach the largest batches.
    """
    if config.train.batch_schedule:
        stages = [list(stage) for stage in config.train.batch_schedule]
        raise UserError(
            f"calibrate=true does not support train.batch_schedule={stages}, "
            "because the first steps have smaller batches than the others. Use train.batch_schedule=[]."
        )
    with tempfile.TemporaryDirectory(prefix="gptlab-plan-") as folder:
        job, run_dir, log_file = (Path(folder) / name for name in ("job.json", "run", "output.log"))
        Job(_shortened(config), run_dir).write(job)
        with log_file.open("wb") as output, start_worker(job, stdout=output, stderr=subprocess.STDOUT) as worker:
            status = worker.wait()
        if status:
            lines = log_file.read_text(encoding="utf-8", errors="replace").splitlines()
            raise UserError(
                f"calibrate=true: the calibration run failed with exit code {status}. The last lines of its output:\n"
                + "\n".join(lines[-5:])
            )


def _shortened(config: RunConfig) -> RunConfig:
    """Returns the configuration of a calibration run: a few steps, with the same key."""
    steps = min(STEPS, config.steps)
    windows = min(config.train.eval_windows or EVAL_WINDOWS, EVAL_WINDOWS)
    changes = {"max_steps": steps, "max_tokens": None, "eval_every": steps, "eval_windows": windows, "log_every": 1}
    return config.model_copy(
        update={
            "resume": None,
            "force_resume": False,
            "train": config.train.model_copy(update=changes),
            "logger": LoggerConfig(),
            "callbacks": config.callbacks.model_copy(update={"hellaswag": None, "early_stopping": None}),
        }
    )


def _path(config: RunConfig, hardware: Hardware) -> Path:
    folder = Path(config.data.cache_dir).expanduser() / FOLDER
    key = json.dumps(_key(config, hardware), sort_keys=True)
    return folder / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _key(config: RunConfig, hardware: Hardware) -> dict[str, Any]:
    """Returns all values that affect the speed and memory of a step."""
    chosen = hardware._asdict()
    del chosen["is_local"], chosen["float32_matmul"]  # a plan cannot resolve the latter; trainer.float32_matmul has it
    return {
        "hardware": [chosen, _threads(), os.environ.get("MALLOC_MMAP_THRESHOLD_")],
        "torch": version("torch"),
        "loss_chunk": config.loss_chunk(hardware),
        # a shorter run may not reach the larger batches
        "steps": config.steps if config.train.batch_schedule else None,
        "config": key_values(config.with_absolute_paths()),
    }


def key_values(config: FrozenConfig) -> dict[str, Any]:
    """Returns the values of a configuration that affect the speed and memory of a step, as nested plain data."""
    unused, values = EXCLUDED.get(type(config), {}), config.model_dump(mode="json")
    return {
        name: key_values(value) if isinstance(value, FrozenConfig) else values[name]
        for name, value in config
        if name not in unused
    }


def _threads() -> int:
    """Returns the number of CPU threads that torch will use."""
    named = os.environ.get("OMP_NUM_THREADS", "")
    return int(named) if named.isdigit() else usable_cores()
