"""Implementation of the Hydra sweeper plugin. Imports no torch."""

import random
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from gptlab.config.base import validate
from gptlab.config.resolve import resolve, resolve_split
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.exit_codes import DONE, SweepIncomplete
from gptlab.launch.components import check_components
from gptlab.sweeps.config import LocalLauncherConfig, SlurmLauncherConfig, SweeperConfig
from gptlab.sweeps.local_launcher import LocalLauncher
from gptlab.sweeps.search import Search
from gptlab.sweeps.slurm_launcher import SlurmLauncher, check_cluster
from gptlab.sweeps.space import Point, SearchSpace
from gptlab.sweeps.sweep_runner import Launcher, SweepRunner
from gptlab.sweeps.sweep_store import SweepStore, config_hash, find_or_create_sweep_dir, hash_values
from gptlab.tracking.run_store.sweeps import Sweep, format_overrides
from gptlab.tracking.wandb.opt_outs import check_mode
from gptlab.training.distributed.processes import launched_externally


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
    config = validate(SweeperConfig, settings)
    space, launcher_config = SearchSpace(config.params, arguments), _check_launcher(launcher)

    def compose(point: Point) -> RunConfig:
        if point and not space.contains(point):
            raise UserError(f"{format_overrides(point)} in a file of this sweep is not a point of its search space.")
        overrides = [*space.fixed, *(f"{key}={value}" for key, value in point.items())]
        values = context.config_loader.load_sweep_config(composed, overrides)
        with open_dict(values):
            del values["hydra"]  # not part of the configuration of a run
        config = resolve(values, overrides)
        check_components(config)
        return resolve_split(config.with_absolute_paths())

    base = _check_space(space, compose, is_grid=config.search == "grid")
    if base.logger.wandb is not None:
        check_mode(base.logger.wandb)
    definition = _describe(config, space, base)
    named = any(override.startswith("hydra.sweep.dir=") for override in composed.hydra.overrides.hydra)
    directory = Path(composed.hydra.sweep.dir) if named else find_or_create_sweep_dir(base.name, definition)
    store = SweepStore(directory, definition)
    try:
        max_tokens = base.steps * base.train.global_batch_size * base.model.block_size
        search = Search(config, space, directory, max_tokens, store.sweep.points)
        runner: Launcher = (
            LocalLauncher(launcher_config, base.trainer)
            if isinstance(launcher_config, LocalLauncherConfig)
            else SlurmLauncher(launcher_config, directory)
        )
        status = SweepRunner(store, search, runner, compose, retry=config.retry).run()
    finally:
        store.close()
    if status != DONE:
        raise SweepIncomplete(status)


def _check_space(space: SearchSpace, compose: Callable[[Point], RunConfig], *, is_grid: bool) -> RunConfig:
    """Checks that at least one point is valid; returns the configuration without the overrides of a point."""
    errors = []
    for point in space.grid() if is_grid else [space.example()]:
        try:
            compose(point)
            break
        except UserError as error:
            errors.append(error)
    else:
        raise errors[0]
    return compose({})


def _describe(config: SweeperConfig, space: SearchSpace, base: RunConfig) -> Sweep:
    """Builds the definition of a sweep, with the hash that identifies it."""
    grid = space.grid() if config.search == "grid" else []
    if config.prune is not None:
        # in grid order, each trial might be better than the one before, and none would be pruned
        random.Random(config.seed).shuffle(grid)  # noqa: S311
    identity = config.model_dump(mode="json", include={"search", "n_trials", "seed", "metric", "prune"})
    return Sweep(
        question=config.question or _question(space),
        space=space.written,
        fixed=space.fixed,
        search=config.search,
        n_trials=len(grid) if config.search == "grid" else config.n_trials or 0,
        metric=config.metric,
        baseline={key: str(value) for key, value in config.baseline.items()},
        definition=hash_values(
            {"space": space.written, "fixed": sorted(space.fixed), "base": config_hash(base)} | identity
        ),
        wandb_group=f"{base.name}-{time.strftime('%Y%m%d-%H%M%S')}",
        points=grid,
    )


def _question(space: SearchSpace) -> str:
    """Returns a default question for a sweep without one."""
    keys = [key for key in space.varied if key != "seed"]
    if not keys:
        return "How much do runs with different seeds differ?" if space.varied else "How good is this configuration?"
    return f"Which {' and '.join(keys)} is best?"


def _check_launcher(launcher: dict[str, Any]) -> LocalLauncherConfig | SlurmLauncherConfig:
    """Validates the launcher's configuration."""
    kind = str(launcher["_target_"]).rpartition(".")[2]
    settings = {key: value for key, value in launcher.items() if key != "_target_"}
    match kind:
        case "ProcessLauncher":
            return validate(LocalLauncherConfig, settings)
        case "SlurmLauncher":
            config = validate(SlurmLauncherConfig, settings)
            check_cluster(config)
            return config
    raise UserError(
        f"hydra/launcher ({kind}) cannot be used with hydra/sweeper=gptlab. Use hydra/launcher=processes or slurm, or "
        "hydra/sweeper=basic, which supports any launcher."
    )
