"""A measurement with round numbers."""

from gptlab.planning.calibration import Measurement

TAKEN = Measurement(
    tokens_per_second=400 / 6,
    first_step_seconds=10,
    evaluation_seconds=2,
    evaluated=64,
    peak_memory_bytes=7,
    steps=4,
    source="me",
)
