"""What each suite measures; see conf/bench.yaml for the values. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from gptlab.config.base import FrozenConfig
from gptlab.model.config import GPTConfig
from gptlab.training.config import AdamWConfig


class PreparationBench(FrozenConfig):
    """The corpus to prepare, of suite=data."""

    corpus_mb: PositiveInt
    val_fraction: Annotated[float, Field(gt=0, lt=1)]


class LoaderBench(FrozenConfig):
    """The batches to load, of suite=data."""

    block_size: PositiveInt
    micro_batch_sizes: list[PositiveInt]
    batches: PositiveInt
    many_tokens: Annotated[int, Field(ge=2**20)]


class GenerateBench(FrozenConfig):
    """The texts to generate, of suite=generate."""

    model: GPTConfig
    prompt_tokens: PositiveInt
    tokens: PositiveInt
    batch_size: PositiveInt
    recomputed_every: PositiveInt
    compiled: bool


class LoopsOfRun(FrozenConfig):
    """A run whose loop is compared with a bare one.

    Attributes:
        arguments: Command-line arguments of ``gptlab.train``.
        turns: Turns of each of the two loops, of ten steps.
    """

    arguments: list[str]
    turns: PositiveInt


class OverheadBench(FrozenConfig):
    """The runs of suite=overhead."""

    characters: LoopsOfRun
    characters_large: LoopsOfRun


class GuardsBench(FrozenConfig):
    """The steps of suite=guards."""

    model: GPTConfig
    optimizer: AdamWConfig
    batch_size: PositiveInt
    steps: PositiveInt


class StepsOfModel(FrozenConfig):
    """A model to train for some steps.

    Attributes:
        model: The model.
        batch_size: Sequences per step.
        steps: Timed steps, after some for warm-up.
    """

    model: GPTConfig
    batch_size: PositiveInt
    steps: PositiveInt


class TrainBench(FrozenConfig):
    """The models of suite=train."""

    characters: StepsOfModel
    characters_large: StepsOfModel
    gpt2: StepsOfModel
    memory: StepsOfModel


class SpeedrunBench(FrozenConfig):
    """The runs of suite=speedrun and suite=ladder.

    Attributes:
        source: The file with tinyshakespeare; None downloads it.
        nanogpt: A checkout of nanoGPT in which data/shakespeare_char/prepare.py was run; None omits nanoGPT.
        target: Val loss, in nats per token.
        parts: Parts of the recipe to leave out, one at a time; None takes those of sweeps=ladder.
    """

    source: str | None
    nanogpt: str | None
    target: PositiveFloat
    parts: list[str] | None


class BenchCommand(FrozenConfig):
    """What to measure, and how often."""

    suite: Literal["train", "generate", "data", "overhead", "guards", "speedrun", "ladder", "all"]
    rounds: PositiveInt
    out: str | None
    cache_dir: str
    preparation: PreparationBench
    loader: LoaderBench
    generate: GenerateBench
    overhead: OverheadBench
    guards: GuardsBench
    speedrun: SpeedrunBench
    train: TrainBench
