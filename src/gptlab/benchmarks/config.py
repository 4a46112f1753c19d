"""Configuration of the benchmark suites; see conf/bench.yaml for the defaults. Imports no torch."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from gptlab.config.base import FrozenConfig
from gptlab.model.config import GPTConfig
from gptlab.training.config import AdamWConfig


class PreparationBench(FrozenConfig):
    """Corpus that suite=data prepares."""

    corpus_mb: PositiveInt
    val_fraction: Annotated[float, Field(gt=0, lt=1)]


class LoaderBench(FrozenConfig):
    """Batches that suite=data loads."""

    block_size: PositiveInt
    micro_batch_sizes: list[PositiveInt]
    batches: PositiveInt
    many_tokens: Annotated[int, Field(ge=2**20)]


class GenerateBench(FrozenConfig):
    """Texts that suite=generate generates."""

    model: GPTConfig
    prompt_tokens: PositiveInt
    tokens: PositiveInt
    batch_size: PositiveInt
    recomputed_every: PositiveInt
    compiled: bool


class OverheadRun(FrozenConfig):
    """Run whose training loop is compared with a bare loop.

    Attributes:
        arguments: Command-line arguments of ``gptlab.train``.
        turns: Number of turns of each of the two loops; a turn has ten timed steps.
    """

    arguments: list[str]
    turns: PositiveInt


class OverheadBench(FrozenConfig):
    """Runs of suite=overhead."""

    characters: OverheadRun
    characters_large: OverheadRun


class GuardsBench(FrozenConfig):
    """Training steps of suite=guards."""

    model: GPTConfig
    optimizer: AdamWConfig
    batch_size: PositiveInt
    steps: PositiveInt


class TrainingSteps(FrozenConfig):
    """Model that is trained for a few steps.

    Attributes:
        model: Model config.
        batch_size: Sequences per step.
        steps: Number of timed steps, after the warm-up.
    """

    model: GPTConfig
    batch_size: PositiveInt
    steps: PositiveInt


class TrainBench(FrozenConfig):
    """Models of suite=train."""

    characters: TrainingSteps
    characters_large: TrainingSteps
    gpt2: TrainingSteps
    memory: TrainingSteps


class SpeedrunBench(FrozenConfig):
    """Runs of suite=speedrun and suite=ladder.

    Attributes:
        source: File with the tinyshakespeare text, or None to download it.
        nanogpt: Checkout of nanoGPT in which data/shakespeare_char/prepare.py was run, or None to omit nanoGPT.
        target: Target val loss, in nats per token.
        parts: Parts of the recipe to omit, one at a time, or None for those of sweeps=ladder.
    """

    source: str | None
    nanogpt: str | None
    target: PositiveFloat
    parts: list[str] | None


class PlanBench(FrozenConfig):
    """Runs of suite=plan.

    Attributes:
        arguments: Command-line arguments of ``gptlab.train`` for all variants.
        steps: Steps of each run and of its calibration.
        only: Names of the variants to measure in addition to the baseline, or None for all.
    """

    arguments: list[str]
    steps: Annotated[int, Field(ge=3)]
    only: list[str] | None


class BenchCommand(FrozenConfig):
    """Config keys of ``gptlab.bench``."""

    suite: Literal["train", "generate", "data", "overhead", "guards", "speedrun", "ladder", "plan", "all"]
    rounds: PositiveInt
    out: str | None
    overwrite: bool
    cache_dir: str
    preparation: PreparationBench
    loader: LoaderBench
    generate: GenerateBench
    overhead: OverheadBench
    guards: GuardsBench
    speedrun: SpeedrunBench
    plan: PlanBench
    train: TrainBench
