"""What metrics.csv says, made small enough for a page: curves over steps, tokens and time, thinned out."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptlab.tracking.run_store.runs import MetricsRow

AXES = ("step", "tokens")  # that a row has itself, and so are no metrics


def downsample(values: Sequence[float], points: int) -> list[int]:
    """Choose which values of a curve are drawn.

    The first and the last are, and of as many equal stretches as there is room for the lowest and the highest: what
    stands out stays. Values that are not finite count only where a stretch has no others.

    Args:
        values: Of the curve.
        points: How many there may be, at least 4.

    Returns:
        Their places, in order; all of them where there are not too many.
    """
    if len(values) <= points:
        return list(range(len(values)))
    chosen = {0, len(values) - 1}
    for stretch in np.array_split(np.arange(1, len(values) - 1), (points - 2) // 2):
        finite = [int(place) for place in stretch if math.isfinite(values[place])] or [int(stretch[0])]
        chosen |= {min(finite, key=values.__getitem__), max(finite, key=values.__getitem__)}
    return sorted(chosen)


def training_seconds(rows: Sequence[MetricsRow]) -> list[float]:
    """Say for every row how long had been trained: the sum of tokens / tokens_per_second up to it.

    Evaluations, samples and checkpoints do not count, as they do not in ``tokens_per_second``. A row without it is
    placed by its tokens among those that have it.
    """
    tokens, seconds = [0.0], [0.0]
    for row in rows:
        speed = row.get("tokens_per_second", math.nan)
        if math.isfinite(speed) and speed > 0 and row.get("tokens", 0) > tokens[-1]:
            seconds.append(seconds[-1] + (row["tokens"] - tokens[-1]) / speed)
            tokens.append(row["tokens"])
    return np.interp([row.get("tokens", 0) for row in rows], tokens, seconds).tolist()


def curves(rows: Sequence[MetricsRow], points: int) -> dict[str, dict[str, list[Any]]]:
    """Return every metric as {"step", "tokens", "seconds", "value"}: lists of one length; no number is None."""
    rows = [row for row in rows if all(axis in row for axis in AXES)]
    times = training_seconds(rows)
    found: dict[str, dict[str, list[Any]]] = {}
    for metric in dict.fromkeys(key for row in rows for key in row if key not in AXES):
        places = [i for i, row in enumerate(rows) if metric in row]
        places = [places[i] for i in downsample([rows[place][metric] for place in places], points)]
        found[metric] = {
            "step": [int(rows[place]["step"]) for place in places],
            "tokens": [int(rows[place]["tokens"]) for place in places],
            "seconds": [round_number(times[place]) for place in places],
            "value": [round_number(rows[place][metric]) for place in places],
        }
    return found


def round_number(value: float) -> float | None:
    """Keep 7 digits, which no eye can tell from more; None for what is no number in JSON."""
    return float(f"{value:.7g}") if math.isfinite(value) else None
