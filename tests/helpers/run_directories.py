"""Writes run directories and sweep directories like those of gptlab.train, without training."""

import csv
import functools
import json
import math
import time
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir

from gptlab.config.command import configuration_folder
from gptlab.config.resolve import resolve
from gptlab.tracking.run_store.state import RunState
from gptlab.tracking.run_store.sweeps import Sweep, Trial

TOKENS = 12 * 64  # per step
ENVIRONMENT: dict[str, Any] = {
    "time": "2026-11-25T03:00:00+0000",
    "command": "python -m gptlab.train",
    "folder": "/home/someone",
    "git": {"commit": "0123456789abcdef", "uncommitted": [" M src/gptlab/model/gpt.py"]},
    "machine": {"host": "somewhere", "system": "Linux", "processor": "Some CPU", "cores": 2, "memory_bytes": 2**33},
    "slurm_job": None,
    "python": "3.11.7",
    "packages": {"torch": "2.13.0", "lightning": "2.6.5"},
}


@functools.cache
def _composed(*overrides: str) -> str:
    with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
        config = resolve(compose("train", overrides=list(overrides)), list(overrides)).with_vocabulary(257)
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def rows_of(steps: int, *, lr: float = 1e-3, seed: int = 1, eval_every: int = 5) -> list[dict[str, float]]:
    """Returns rows of metrics.csv, with a loss that falls to a floor that depends on ``lr``, and noise by ``seed``."""
    rows: list[dict[str, float]] = []
    floor = 1.6 + 0.12 * math.log(lr / 2e-3) ** 2
    for step in range(1, steps + 1):
        loss = floor + 4.0 * math.exp(-8 * step / steps) + 0.02 * math.sin(9 * seed + step * 1.7)
        rows.append(
            {
                "step": step,
                "tokens": step * TOKENS,
                "train/loss": loss,
                "lr": lr * min(1, step / 5),
                "grad_norm": 1 + 1 / step,
                "tokens_per_second": 30_000 + 100 * seed + 500 * math.sin(step),
                "data_wait": 0.01,
                "peak_memory_gb": 0.7,
            }
        )
        if step % eval_every == 0 or step == steps:
            val = loss + 0.05 + 0.01 * math.cos(5 * seed)
            rows.append(
                {"step": step, "tokens": step * TOKENS, "val/loss": val, "val/bits_per_byte": val / math.log(2)}
            )
    return rows


def write_metrics(directory: Path, rows: list[dict[str, float]]) -> None:
    """Overwrites metrics.csv."""
    columns = dict.fromkeys(key for row in rows for key in row)
    with (directory / "metrics.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def write_run(
    directory: Path,
    *overrides: str,
    rows: list[dict[str, float]] | None = None,
    settings: dict[str, Any] | None = None,
    environment: dict[str, Any] | None = None,
    samples: dict[int, str] | None = None,
    **state: Any,
) -> Path:
    """Creates a run directory.

    Args:
        directory: Run directory.
        overrides: Overrides of the command line.
        rows: Rows of metrics.csv; None for those of ``rows_of(20)``.
        settings: Changes of the configuration, by dotted name.
        environment: Changes of environment.json.
        samples: Texts by step.
        state: Changes of state.json.
    """
    directory.mkdir(parents=True)
    config = yaml.safe_load(_composed(*overrides))
    for key, value in (settings or {}).items():
        *groups, name = key.split(".")
        functools.reduce(lambda part, group: part[group], groups, config)[name] = value
    (directory / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    rows = rows_of(20) if rows is None else rows
    write_metrics(directory, rows)
    (directory / "environment.json").write_text(json.dumps(ENVIRONMENT | (environment or {})))
    last = max((int(row["step"]) for row in rows), default=0)
    about = {"state": "done", "status": 0, "step": last, "max_steps": last, "tokens": last * TOKENS, "seconds": 12.5}
    when = {"began": 1_795_500_000.0, "updated": 1_795_500_012.5, "host": "somewhere"}
    RunState(**{**about, **when, **state}).save(directory)
    for step, text in (samples or {}).items():
        (directory / "samples").mkdir(exist_ok=True)
        (directory / "samples" / f"step_{step:06d}.txt").write_text(text)
    return directory


def write_sweep(
    directory: Path, rates: tuple[float, ...] = (1e-3, 2e-3, 4e-3), seeds: tuple[int, ...] = (1, 2, 3)
) -> Path:
    """Creates the directory of a sweep over the learning rate and the seed, with samples in every trial."""
    space = {"optimizer.lr": ",".join(map(str, rates)), "seed": ",".join(map(str, seeds))}
    count = len(rates) * len(seeds)
    about = {"fixed": [], "search": "grid", "n_trials": count, "baseline": {}, "wandb_group": "x"}
    Sweep.model_validate({"question": "Which learning rate is best?", "space": space, **about}).save(directory)
    for number, (rate, seed) in enumerate((rate, seed) for rate in rates for seed in seeds):
        rows = rows_of(20, lr=rate, seed=seed)
        samples = {step: f"--- sample 1 ---\nat {rate} with {seed}, step {step}\n" for step in (5, 10, 15, 20)}
        write_run(directory / str(number), settings={"optimizer.lr": rate, "seed": seed}, rows=rows, samples=samples)
        value = min(row["val/loss"] for row in rows if "val/loss" in row)
        overrides = {"optimizer.lr": str(rate), "seed": str(seed)}
        Trial(number=number, overrides=overrides, config_hash=str(number), state="done", status=0, value=value).save(
            directory
        )
    return directory


def running(**state: Any) -> dict[str, Any]:
    """Returns the state of a run in progress on another host."""
    return {"state": "running", "status": None, "updated": time.time(), "host": "elsewhere", **state}
