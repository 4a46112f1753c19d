"""Comparison of two determinism traces. Imports no torch."""

import json
import math
from itertools import zip_longest
from pathlib import Path
from typing import NamedTuple


class TraceStep(NamedTuple):
    """Step of a trace, as written by ``gptlab.training.callbacks.determinism_trace``.

    Attributes:
        step: Optimizer step, from 1.
        tokens: Hash of the tokens of the step, on all ranks.
        loss: Exact loss of the step over all ranks, as ``repr``.
        grad_norm: Exact gradient norm of the step, as ``repr``.
        tensors: Hash of each parameter and of each tensor of the optimizer state after the step, by name.
    """

    step: int
    tokens: str
    loss: str
    grad_norm: str
    tensors: dict[str, str]


class TraceDifference(NamedTuple):
    """First difference between two traces.

    Attributes:
        step: First step that is not bit-identical.
        values: Differences of its tokens, loss and gradient norm, in words.
        tensors: Names of the parameters and optimizer states that differ after the step, in the order of the model.
        of: Number of all parameters and optimizer states.
    """

    step: int
    values: list[str]
    tensors: list[str]
    of: int

    def __str__(self) -> str:
        parts = list(self.values)
        if self.tensors:
            parts.append(f"{len(self.tensors)} of {self.of} tensors differ, first {self.tensors[0]}")
        return f"first difference at step {self.step}: {'; '.join(parts)}"


def read_trace(path: Path) -> list[TraceStep]:
    """Reads a trace; returns an empty list if the file does not exist."""
    if not path.exists():
        return []
    return [TraceStep(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]


def first_difference(expected: list[TraceStep], found: list[TraceStep]) -> TraceDifference | None:
    """Returns the first step at which two traces are not bit-identical, or None."""
    for ours, theirs in zip_longest(expected, found):
        if ours == theirs:
            continue
        if ours is None or theirs is None:
            return TraceDifference((ours or theirs).step, ["missing in one of the runs"], [], 0)
        values = [
            f"{name} {getattr(theirs, name)} instead of {getattr(ours, name)}"
            for name in ("step", "tokens", "loss", "grad_norm")
            if getattr(ours, name) != getattr(theirs, name)
        ]
        names = list(ours.tensors | theirs.tensors)
        tensors = [name for name in names if ours.tensors.get(name) != theirs.tensors.get(name)]
        return TraceDifference(ours.step, values, tensors, len(names))
    return None


def largest_difference(expected: list[TraceStep], found: list[TraceStep]) -> tuple[float, int]:
    """Returns the largest difference between the losses of two traces, and its step.

    The difference is infinite if a loss is NaN or if a step is missing in one of the traces.
    """
    differences = []
    for step, (ours, theirs) in enumerate(zip_longest(expected, found), 1):
        distance = math.inf if ours is None or theirs is None else abs(float(ours.loss) - float(theirs.loss))
        differences.append((math.inf if math.isnan(distance) else distance, step))
    return max(differences, key=lambda found: found[0], default=(math.inf, 1))
