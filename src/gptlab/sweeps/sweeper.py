"""Running a sweep that Hydra's sweeper plugin hands over. Imports no torch."""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hydra.types import HydraContext
from omegaconf import DictConfig, open_dict

from gptlab.config.base import validate
from gptlab.config.resume import resolve, resolve_split
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.exit_codes import DONE, SweepIncomplete
from gptlab.sweeps.config import LocalLauncherConfig, SlurmLauncherConfig, SweeperConfig
from gptlab.sweeps.local_launcher import LocalLauncher
from gptlab.sweeps.search import Search
from gptlab.sweeps.slurm_launcher import SlurmLauncher, check_cluster
from gptlab.sweeps.space import Point, SearchSpace
from gptlab.sweeps.sweep_runner import Launcher, SweepRunner
from gptlab.sweeps.sweep_store import SweepStore, config_hash, find_or_create_sweep_dir, hash_values
from gptlab.tracking.run_store.sweeps import Sweep
from gptlab.tracking.wandb.opt_outs import check_mode


def run_sweep(
    context: HydraContext,
    composed: DictConfig,
    arguments: list[str],
    settings: dict[str, Any],
    launcher: dict[str, Any],
) -> None:
    """Runs or resumes a sweep.

    Args:
        context: Hydra's, with which a trial's configuration is composed.
        composed: Of the sweep itself.
        arguments: The overrides of the command line.
        settings: Of hydra.sweeper.
        launcher: Of hydra.launcher.

    Raises:
        UserError: What is asked for cannot be run at all.
        SweepIncomplete: Not every trial has come to a result.
    """
    wanted = validate(SweeperConfig, settings)
    space, where = SearchSpace(wanted.params, arguments), _check_launcher(launcher)

    def compose(point: Point) -> RunConfig:
        overrides = [*space.fixed, *(f"{key}={value}" for key, value in point.items())]
        values = context.config_loader.load_sweep_config(composed, overrides)
        with open_dict(values):
            del values["hydra"]  # which is Hydra's own, and of no job yet
        return resolve_split(resolve(values, overrides).with_absolute_paths())

    base = _check_space(space, compose, is_grid=wanted.search == "grid")
    if base.logger.wandb is not None:
        check_mode(base.logger.wandb)
    what = _describe(wanted, space, base)
    named = any(override.startswith("hydra.sweep.dir=") for override in composed.hydra.overrides.hydra)
    directory = Path(composed.hydra.sweep.dir) if named else find_or_create_sweep_dir(base.name, what)
    store = SweepStore(directory, what)
    try:
        search = Search(wanted, space, directory, base.steps * base.train.global_batch_size * base.model.block_size)
        runner: Launcher = (
            LocalLauncher(where, base.trainer)
            if isinstance(where, LocalLauncherConfig)
            else SlurmLauncher(where, directory)
        )
        status = SweepRunner(store, search, runner, compose, retry=wanted.retry).run()
    finally:
        store.close()
    if status != DONE:
        raise SweepIncomplete(status)


def _check_space(space: SearchSpace, compose: Callable[[Point], RunConfig], *, is_grid: bool) -> RunConfig:
    """Checks that a point is valid before anything is created; returns the configuration that all trials share."""
    mistakes = []
    for point in space.grid() if is_grid else [space.example()]:
        try:
            compose(point)
            break
        except UserError as error:
            mistakes.append(error)
    else:
        raise mistakes[0]
    return compose({})


def _describe(wanted: SweeperConfig, space: SearchSpace, base: RunConfig) -> Sweep:
    """Builds the definition of a sweep, with the hash of all that identifies it."""
    grid = space.grid() if wanted.search == "grid" else None
    chosen = wanted.model_dump(mode="json", include={"search", "n_trials", "seed", "metric", "prune"})
    return Sweep(
        question=wanted.question or _question(space),
        space=space.written,
        fixed=space.fixed,
        search=wanted.search,
        n_trials=len(grid) if grid is not None else wanted.n_trials or 0,
        metric=wanted.metric,
        baseline={key: str(value) for key, value in wanted.baseline.items()},
        definition=hash_values(
            {"space": space.written, "fixed": sorted(space.fixed), "base": config_hash(base)} | chosen
        ),
        wandb_group=f"{base.name}-{time.strftime('%Y%m%d-%H%M%S')}",
    )


def _question(space: SearchSpace) -> str:
    """Returns the question of a sweep that has none configured."""
    keys = [key for key in space.varied if key != "seed"]
    if not keys:
        return "How much do seeds differ?" if space.varied else "How good is this configuration?"
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
        f"hydra/launcher with {kind} runs no sweep of hydra/sweeper=gptlab; processes and slurm do, and "
        "hydra/sweeper=basic takes any launcher."
    )
