"""forecast.json in a run directory: expected and measured memory and time of the run. Imports no torch."""

import json
from pathlib import Path
from time import strftime
from typing import Any

import yaml

from gptlab.config.schema import RunConfig
from gptlab.config.search_path import configuration_folder
from gptlab.data.shards.manifest import Manifest
from gptlab.files import write_durably
from gptlab.planning.calibration import find_measurement, measure_run, save_measurement
from gptlab.planning.costs import TimeEstimate, estimate_from_measurement, run_length
from gptlab.planning.memory import count_shares
from gptlab.planning.plans import estimate_peak_memory, estimate_times
from gptlab.planning.report import format_bytes, format_duration, time_source
from gptlab.tracking.run_store.runs import FORECAST, Run
from gptlab.training.hardware import Hardware

UNKNOWN = "no time forecast: no similar run has been measured on this machine"


def write_forecast(directory: Path, config: RunConfig, manifest: Manifest, hardware: Hardware) -> None:
    """Writes the forecast of a run at its start."""
    time = _time(config, manifest, hardware)
    expected = estimate_peak_memory(config, hardware)
    record = {
        "parameters": count_shares(config.model, lora=config.lora).all,
        "peak_memory_bytes": expected.total,
        "memory": {**expected._asdict()},
        "seconds": time and time.seconds,
        "tokens_per_second": time and time.tokens_per_second,
        "why": time_source(time) if time else UNKNOWN,
    }
    write_durably(directory / FORECAST, json.dumps(record, indent=2) + "\n")


def score_forecast(
    directory: Path, config: RunConfig, manifest: Manifest, hardware: Hardware, measured: dict[str, float | None]
) -> dict[str, str]:
    """Adds the measured values to forecast.json, and saves the measurement of the run for later forecasts.

    Args:
        directory: Run directory of a finished run.
        config: Configuration of the run.
        manifest: Manifest of its data.
        hardware: Hardware that it ran on.
        measured: Values of "parameters", "peak_memory_bytes" and "seconds", which is None if the run ended early.

    Returns:
        Rows for the summary table of the run.
    """
    run = Run(directory)
    _save_speed(run, config, manifest, hardware, measured)
    expected = run.forecast
    score = {name: _scored(expected.get(name), value) for name, value in measured.items()}
    write_durably(directory / FORECAST, json.dumps(expected | {"score": score}, indent=2) + "\n")
    return _rows(score, expected)


def _save_speed(
    run: Run, config: RunConfig, manifest: Manifest, hardware: Hardware, measured: dict[str, float | None]
) -> None:
    """Saves the measurement of a run, if it ran to the end."""
    seconds, memory = measured["seconds"], measured["peak_memory_bytes"]
    if seconds is None or memory is None:
        return
    done = run_length(config, manifest.tokens("val"))
    found = measure_run(
        run.rows,
        seconds=seconds,
        evaluations=done.evaluations,
        evaluated=done.evaluated or 0,
        peak_memory=memory,
        source=f"{config.steps} steps of {config.name} on {strftime('%Y-%m-%d')}",
    )
    if found is not None and config.callbacks.hellaswag is None:  # its memory and time are those of an evaluation
        save_measurement(config, hardware, found)


def _time(config: RunConfig, manifest: Manifest, hardware: Hardware) -> TimeEstimate | None:
    done = run_length(config, manifest.tokens("val"))
    if (measured := find_measurement(config, hardware)) is not None:
        return estimate_from_measurement(config, done, hardware, measured)
    if hardware.peak_flops() is not None:
        mfu = yaml.safe_load((configuration_folder() / "plan.yaml").read_text())["mfu"]
        return estimate_times(config, done, hardware, mfu, bandwidth=None)[0]  # overlapped, if there are two
    return None


def _scored(forecast: Any, measured: float | None) -> dict[str, float | None]:
    ratio = measured / forecast if forecast and measured is not None else None
    return {"forecast": forecast, "measured": measured, "ratio": ratio}


def _rows(score: dict[str, dict[str, float | None]], expected: dict[str, Any]) -> dict[str, str]:
    memory, seconds, parameters = score["peak_memory_bytes"], score["seconds"], score["parameters"]
    peak, parts = format_bytes(memory["measured"] or 0), []
    if memory["ratio"]:
        peak = f"{peak}; forecast {format_bytes(memory['forecast'] or 0)} (measured / forecast {memory['ratio']:.2f})"
    if parameters["ratio"]:
        exact = parameters["ratio"] == 1
        parts.append("parameters exact" if exact else f"parameters measured / forecast {parameters['ratio']:.3f}")
    if seconds["ratio"]:
        parts.append(f"time {format_duration(seconds['forecast'] or 0)} (measured / forecast {seconds['ratio']:.2f})")
    elif not seconds["forecast"]:
        parts.append(expected.get("why", UNKNOWN))
    return {"peak memory": peak, "forecast": "; ".join(parts)}
