"""Configuration of the sweeper and its launchers; see conf/hydra/sweeper/ and conf/hydra/launcher/."""

from typing import Annotated, Literal, Self

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt, model_validator

from gptlab.config.base import FrozenConfig
from gptlab.errors import did_you_mean
from gptlab.tracking.run_store.sweeps import DIRECTIONS, Direction, known_direction

Amount = PositiveInt | None


class PruneConfig(FrozenConfig):
    """Configuration of pruning: ASHA (Li et al. 2020) or Hyperband (Li et al. 2018); the resource is tokens seen."""

    method: Literal["asha", "hyperband"]
    min_tokens: PositiveInt
    reduction_factor: Annotated[int, Field(ge=2)]


class SweeperConfig(FrozenConfig):
    """Configuration of a sweep: its question, metric and baseline, and how its points are chosen."""

    question: str
    search: Literal["grid", "random", "tpe", "cmaes"]
    n_trials: Amount
    seed: NonNegativeInt
    metric: str
    direction: Direction | None
    baseline: dict[str, str | int | float | bool | None]
    prune: PruneConfig | None
    retry: bool
    fail_fast: bool
    max_hours: PositiveFloat | None
    params: dict[str, str | int | float | bool]

    @property
    def resolved_direction(self) -> Direction:
        """The direction; by default that in which the metric is known to be better."""
        direction = self.direction or known_direction(self.metric)
        assert direction is not None  # noqa: S101  (validated)
        return direction

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.direction is None and known_direction(self.metric) is None:
            raise ValueError(
                f"hydra.sweeper.metric={self.metric} is not one of gptlab's metrics."
                f"{did_you_mean(self.metric, DIRECTIONS)} To compare another metric, set "
                "hydra.sweeper.direction=minimize or maximize"
            )
        if self.search != "grid" and self.n_trials is None:
            raise ValueError(
                f"hydra.sweeper.search={self.search} requires hydra.sweeper.n_trials, the number of points, "
                "for example 20"
            )
        if self.search == "grid" and self.n_trials is not None:
            raise ValueError(
                f"hydra.sweeper.n_trials={self.n_trials} cannot be used with hydra.sweeper.search=grid, "
                "which runs every point"
            )
        if self.prune is not None and (self.metric, self.resolved_direction) != ("val/loss", "minimize"):
            raise ValueError(
                f"hydra.sweeper.prune compares val/loss, which hydra.sweeper.metric={self.metric} "
                f"hydra.sweeper.direction={self.resolved_direction} does not minimize. Set it to null"
            )
        return self


class LocalLauncherConfig(FrozenConfig):
    """Configuration of the launcher that runs trials as processes on this machine."""

    at_once: PositiveInt | Literal["auto"]


class SlurmLauncherConfig(FrozenConfig):
    """Configuration of the launcher that runs trials as SLURM jobs."""

    at_once: PositiveInt
    timeout_min: PositiveInt
    signal_delay_s: PositiveInt
    max_num_timeout: NonNegativeInt
    nodes: PositiveInt
    tasks_per_node: PositiveInt
    cpus_per_task: Amount
    gpus_per_node: Amount
    mem_gb: PositiveFloat | None
    partition: str | None
    account: str | None
    qos: str | None
    setup: list[str]
    use_srun: bool
    additional_parameters: dict[str, bool | int | str]
