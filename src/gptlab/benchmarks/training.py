"""suite=train: training steps, from the loop that anyone would write to what gptlab does. Imports no torch."""

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from pydantic import PositiveInt

from gptlab.benchmarks.measuring import ResultTable, Sample, Variant, measure_in_turns, run_timed
from gptlab.config.base import FrozenConfig
from gptlab.model.config import GPTConfig

STEPS = "gptlab.benchmarks.steps"


class StepsOfModel(FrozenConfig):
    """A model to train for some steps; see conf/bench.yaml.

    Attributes:
        model: Its network.
        batch_size: Sequences of a step.
        steps: Of which the median is taken; some more come before.
    """

    model: GPTConfig
    batch_size: PositiveInt
    steps: PositiveInt


class TrainBench(FrozenConfig):
    """The models to train."""

    characters: StepsOfModel
    characters_large: StepsOfModel
    gpt2: StepsOfModel
    memory: StepsOfModel


class Levers(NamedTuple):
    """How a step is computed; the defaults are the plain loop's.

    Attributes:
        fused: AdamW as one kernel.
        float32_matmul: See ``gptlab.training.hardware.Hardware``.
        precision: "32-true" or "bf16-mixed".
        compile: The loss and its gradient compiled.
        chunked: The logits in chunks.
        own: All of it as gptlab chooses.
    """

    fused: bool = False
    float32_matmul: str = "default"
    precision: str = "32-true"
    compile: bool = False
    chunked: bool = False
    own: bool = False


IN_FLOAT32 = {
    "plain loop: eager, float32": Levers(),
    "+ fused AdamW": Levers(fused=True),
    "+ oneDNN's products": Levers(fused=True, float32_matmul="onednn"),
    "+ compiled": Levers(fused=True, float32_matmul="onednn", compile=True),
    "gptlab, by itself": Levers(own=True),
}
IN_BFLOAT16 = {
    "plain loop: eager, float32": Levers(),
    "+ oneDNN's products": Levers(float32_matmul="onednn"),
    "+ bfloat16": Levers(precision="bf16-mixed"),
    "+ fused AdamW": Levers(precision="bf16-mixed", fused=True),
    "+ compiled": Levers(precision="bf16-mixed", fused=True, compile=True),
    "gptlab, by itself": Levers(own=True),
}
EAGER = Levers(precision="bf16-mixed", fused=True)
WITH_CHUNKS = {
    "logits at once": EAGER,
    "logits in chunks": EAGER._replace(chunked=True),
    "compiled, at once": EAGER._replace(compile=True),
    "compiled, in chunks": EAGER._replace(compile=True, chunked=True),
}


def measure(bench: TrainBench, rounds: int) -> Iterator[ResultTable]:
    """Measure one model after the other; every sample is a process of its own."""
    for title, shape, levers in (
        ("Small character model", bench.characters, IN_FLOAT32),
        ("Character model", bench.characters_large, IN_BFLOAT16),
        ("GPT-2", bench.gpt2, IN_BFLOAT16),
    ):
        yield _steps(title, shape, levers, rounds)
    yield _memory(bench.memory, rounds)


def _steps(title: str, shape: StepsOfModel, levers: dict[str, Levers], rounds: int) -> ResultTable:
    caption = (
        f"{_shape(shape)} Tokens/s by the median of {shape.steps} steps. The ceiling is that of matrix products in the "
        "precision of the row, measured by the same process; beside it what the row reaches of it (6 N + 12 L C T "
        "operations a token). Loss after the steps, on random tokens; peak: of the process' memory."
    )
    columns = ("% of ceiling", "loss", "peak MB")
    return ResultTable(f"{title}: training", caption, "tokens/s", columns, _rows(shape, levers, rounds))


def _memory(shape: StepsOfModel, rounds: int) -> ResultTable:
    caption = f"{_shape(shape)} Memory that the process has at most, weights, gradients and moments included."
    rows = _rows(shape, WITH_CHUNKS, rounds)
    for row in rows:
        for sample, whole in zip(row.samples, rows[0].samples, strict=True):
            sample["% less"] = 100 * (1 - sample["peak MB"] / whole["peak MB"])
    return ResultTable("GPT-2: memory of a step", caption, "tokens/s", ("peak MB", "% less", "loss"), rows)


def _rows(shape: StepsOfModel, levers: dict[str, Levers], rounds: int) -> Any:
    def way(name: str, chosen: Levers) -> Variant:
        todo = {"levers": chosen._asdict(), **shape.model_dump(mode="json")}

        def run(_: int) -> Sample:
            return json.loads(run_timed("-m", STEPS, json.dumps(todo)).printed.splitlines()[-1])

        return Variant("", name, run)

    return measure_in_turns([way(name, chosen) for name, chosen in levers.items()], rounds)


def _shape(shape: StepsOfModel) -> str:
    model = shape.model
    return (
        f"{model.n_layer} layers of {model.n_embd}, {shape.batch_size} sequences of {model.block_size} tokens, "
        f"{model.vocab_size:,} ids."
    )
