"""Implementation of the Hydra sweeper plugin. Imports no torch."""

import logging
import random
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.types import HydraContext
from omegaconf import DictConfig, OmegaConf, open_dict

from gptlab.config.base import validate
from gptlab.config.command import check_hydra
from gptlab.config.option_groups import OptionGroups
from gptlab.config.resolve import resolve
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.exit_codes import DONE, SweepIncomplete
from gptlab.launch.launcher import check_start
from gptlab.sweeps.config import LocalLauncherConfig, SlurmLauncherConfig, SweeperConfig
from gptlab.sweeps.local_launcher import LocalLauncher
from gptlab.sweeps.search import Search
from gptlab.sweeps.slurm_launcher import SlurmLauncher, check_cluster
from gptlab.sweeps.space import Point, SearchSpace
from gptlab.sweeps.sweep_runner import Launcher, SweepRunner
from gptlab.sweeps.sweep_store import SweepStore, config_hash, find_or_create_sweep_dir
from gptlab.tracking.run_store.sweeps import Sweep, Trial, format_overrides
from gptlab.training.distributed.processes import launched_externally

log = logging.getLogger(__name__)

MANY_POINTS = 100  # whose check takes some seconds


def run_sweep(
    context: HydraContext,
    composed: DictConfig,
    arguments: list[str],
    settings: dict[str, Any],
    launcher: dict[str, Any],
) -> None:
    """Runs or resumes a sweep.

    Args:
        context: Hydra context, which composes the configuration of a trial.
        composed: Configuration of the sweep, as composed by Hydra.
        arguments: Command-line overrides.
        settings: Config group hydra.sweeper, without ``_target_``.
        launcher: Config group hydra.launcher.

    Raises:
        UserError: The config of the sweep or launcher is invalid, no point is valid, or the sweep directory is in use.
        SweepIncomplete: The exit code of the sweep is not 0: a trial failed, or the sweep was interrupted.
    """
    if launched_externally():
        raise UserError(
            "A sweep (-m) starts the processes of its trials itself and cannot be started by torchrun or by several "
            "tasks of srun. Start it as one process, with trainer=ddp for trials on several devices."
        )
    config = validate(SweeperConfig, settings, "hydra.sweeper.")
    check_hydra(composed.hydra)
    _check_directories(composed)
    loader = context.config_loader
    space, launcher_config = SearchSpace(config.params, arguments, loader), _check_launcher(launcher)
    groups = OptionGroups.of_search_path(str(composed.hydra.job.config_name), loader.get_search_path())

    composed_points: dict[frozenset[tuple[str, str]], RunConfig] = {}

    def compose(point: Point) -> RunConfig:
        key = frozenset(point.items())
        if key not in composed_points:
            composed_points[key] = compose_anew(point)
        return composed_points[key]

    def compose_anew(point: Point) -> RunConfig:
        if point and not space.contains(point):
            raise UserError(f"{format_overrides(point)} in a file of this sweep is not a point of its search space.")
        overrides = [*space.fixed, *groups.normalize(f"{key}={value}" for key, value in point.items())]
        values = loader.load_sweep_config(composed, overrides)
        with open_dict(values):
            del values["hydra"]  # not part of the configuration of a run
        config = resolve(values, overrides)
        if config.resume is not None:
            raise UserError(
                f"resume={config.resume} cannot be used with -m: each trial has a run directory of its own. The same "
                "command resumes an unfinished sweep."
            )
        return check_start(config).config

    grid = space.grid() if config.search == "grid" else []
    first = _check_points(grid, compose) if grid else _check_any(space.ends(), compose)
    if config.metric.startswith("hellaswag/") and first.callbacks.hellaswag is None:
        raise UserError(f"hydra.sweeper.metric={config.metric} needs the callback: callbacks=[default,hellaswag]")
    sweep = _describe(config, space, grid, first.name)

    def is_current(trial: Trial) -> bool:
        return not trial.config_hash or config_hash(compose(trial.overrides)) == trial.config_hash

    named = any(override.startswith("hydra.sweep.dir=") for override in composed.hydra.overrides.hydra)
    directory = Path(composed.hydra.sweep.dir) if named else find_or_create_sweep_dir(first.name, sweep, is_current)
    store = SweepStore(directory, sweep, is_current)
    try:
        max_tokens = first.steps * first.train.global_batch_size * first.model.block_size
        search = Search(config, space, directory, max_tokens, store.sweep.points)
        runner: Launcher = (
            LocalLauncher(launcher_config, first.trainer)
            if isinstance(launcher_config, LocalLauncherConfig)
            else SlurmLauncher(launcher_config, directory)
        )
        status = SweepRunner(store, search, runner, compose, config).run()
    finally:
        store.close()
    if status != DONE:
        raise SweepIncomplete(status)


def _check_directories(composed: DictConfig) -> None:
    """Raises UserError if a directory is set that the trials of a sweep would not have."""
    subdir = OmegaConf.to_container(composed.hydra.sweep, resolve=False)["subdir"]  # type: ignore[index, call-overload]
    if subdir != "${hydra.job.num}":
        raise UserError(
            f"hydra.sweep.subdir={subdir} is not supported: the run directories of trials are numbered. Set "
            "hydra.sweep.dir, the directory that contains them, or use hydra/sweeper=basic."
        )


def _check_points(points: list[Point], compose: Callable[[Point], RunConfig]) -> RunConfig:
    """Checks that all points of a grid are valid; returns the configuration of the first one.

    Raises:
        UserError: A point is invalid; the message names it, unless all points have the same error.
    """
    if len(points) > MANY_POINTS:
        log.info("Checking the configurations of %d points ...", len(points))
    first: RunConfig | None = None
    errors: dict[int, UserError] = {}
    for number, point in enumerate(points):
        try:
            config = compose(point)
            first = first or config
        except UserError as problem:
            errors[number] = problem
        if errors and (first is not None or len(errors) > 1):
            break
    if errors:
        number, error = next(iter(errors.items()))
        named, is_general = format_overrides(points[number]), first is None and len(set(map(str, errors.values()))) == 1
        if len(points) > 1 and not is_general and not str(error).startswith(named):
            error = UserError(f"{named}: {error}")
        raise error
    assert first is not None  # noqa: S101
    return first


def _check_any(points: list[Point], compose: Callable[[Point], RunConfig]) -> RunConfig:
    """Returns the configuration of the first point that is valid; raises UserError if none is."""
    for point in points[:-1]:
        with suppress(UserError):
            return compose(point)
    return compose(points[-1])


def _describe(config: SweeperConfig, space: SearchSpace, grid: list[Point], name: str) -> Sweep:
    """Builds the definition of a sweep."""
    if config.prune is not None:
        # in grid order, each trial might be better than the one before, and none would be pruned
        random.Random(config.seed).shuffle(grid)  # noqa: S311
    return Sweep(
        question=config.question or _question(space),
        space=space.written,
        fixed=space.fixed,
        search=config.search,
        n_trials=len(grid) if config.search == "grid" else config.n_trials or 0,
        search_seed=config.seed,
        metric=config.metric,
        direction=config.resolved_direction,
        prune=config.prune and config.prune.model_dump(mode="json"),
        baseline={key: str(value) for key, value in config.baseline.items()},
        wandb_group=f"{name}-{time.strftime('%Y%m%d-%H%M%S')}",
        points=grid,
    )


def _question(space: SearchSpace) -> str:
    """Returns a default question for a sweep without one."""
    keys = [name for key in space.varied if (name := key.lstrip("+")) != "seed"]
    if not keys:
        return "How much do runs with different seeds differ?" if space.varied else "How good is this configuration?"
    return f"Which {' and '.join(keys)} is best?"


def _check_launcher(launcher: dict[str, Any]) -> LocalLauncherConfig | SlurmLauncherConfig:
    """Validates the launcher's configuration."""
    kind = str(launcher["_target_"]).rpartition(".")[2]
    settings = {key: value for key, value in launcher.items() if key != "_target_"}
    match kind:
        case "ProcessLauncher":
            return validate(LocalLauncherConfig, settings, "hydra.launcher.")
        case "SlurmLauncher":
            config = validate(SlurmLauncherConfig, settings, "hydra.launcher.")
            check_cluster(config)
            return config
    raise UserError(
        f"hydra/launcher ({kind}) cannot be used with hydra/sweeper=gptlab. Use hydra/launcher=processes or slurm, or "
        "hydra/sweeper=basic, which supports any launcher."
    )
