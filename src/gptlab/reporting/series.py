"""Curves of metrics.csv over steps, tokens and time, downsampled for the page."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptlab.tracking.run_store.runs import MetricsRow

AXES = ("step", "tokens")  # columns of a row that are axes, not metrics


def downsample(steps: Sequence[int], values: Sequence[float], points: int) -> list[int]:
    """Selects the values of a curve to draw.

    Keeps the first and the last value. At most half of the others are those at multiples of a power of two, which runs
    of any length have in common, so that the page can compute means and ranges over seeds at equal steps. The others
    are the lowest and the highest value of equal segments, so that outliers remain visible. Non-finite values are kept
    only in segments without finite ones.

    Args:
        steps: Steps of the curve, ascending.
        values: Values of the curve.
        points: Maximum number of values to keep, at least 6.

    Returns:
        Indices of the selected values in ascending order; all indices if there are at most ``points`` values.
    """
    if len(values) <= points:
        return list(range(len(values)))
    stride = 1
    while sum(step % stride == 0 for step in steps) > (points - 2) // 2:
        stride *= 2
    common = [i for i, step in enumerate(steps) if step % stride == 0 and math.isfinite(values[i])]
    chosen = {0, len(values) - 1, *common}
    for segment in np.array_split(np.arange(1, len(values) - 1), (points - 2 - len(common)) // 2):
        finite = [int(place) for place in segment if math.isfinite(values[place])] or [int(segment[0])]
        chosen |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return sorted(chosen)


def training_seconds(rows: Sequence[MetricsRow]) -> list[float]:
    """Returns the seconds of training up to each row: the sum of tokens / tokens_per_second.

    As in ``tokens_per_second``, evaluations, samples and checkpoints are excluded. The times of rows without it are
    interpolated by their tokens.
    """
    tokens, seconds = [0.0], [0.0]
    for row in rows:
        speed = row.get("tokens_per_second", math.nan)
        if math.isfinite(speed) and speed > 0 and row.get("tokens", 0) > tokens[-1]:
            seconds.append(seconds[-1] + (row["tokens"] - tokens[-1]) / speed)
            tokens.append(row["tokens"])
    return np.interp([row.get("tokens", 0) for row in rows], tokens, seconds).tolist()


def curves(rows: Sequence[MetricsRow], points: int) -> dict[str, dict[str, list[Any]]]:
    """Returns every metric as {"step", "tokens", "seconds", "value"}, lists of equal length; None if not finite."""
    rows = [row for row in rows if all(axis in row for axis in AXES)]
    times = training_seconds(rows)
    recorded: dict[str, list[int]] = {}  # rows with each metric
    for place, row in enumerate(rows):
        for metric in row:
            recorded.setdefault(metric, []).append(place)
    found: dict[str, dict[str, list[Any]]] = {}
    for metric in (metric for metric in recorded if metric not in AXES):
        places = recorded[metric]
        steps, values = [int(rows[place]["step"]) for place in places], [rows[place][metric] for place in places]
        places = [places[i] for i in downsample(steps, values, points)]
        found[metric] = {
            "step": [int(rows[place]["step"]) for place in places],
            "tokens": [int(rows[place]["tokens"]) for place in places],
            "seconds": [round_number(times[place]) for place in places],
            "value": [round_number(rows[place][metric]) for place in places],
        }
    return found


def round_number(value: float) -> float | None:
    """Rounds to 7 significant digits, enough for a plot; returns None for non-finite values, which JSON lacks."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
