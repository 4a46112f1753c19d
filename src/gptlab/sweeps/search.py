"""Search: proposes the points of a sweep, from a grid or with an Optuna sampler.

The Optuna study is a journal in the sweep directory, which trial processes also read and write
(``gptlab.sweeps.pruning``). Its trials have the same numbers as the trials in the ``SweepStore``.
"""

import json
import logging
import math
from pathlib import Path
from typing import Any

import optuna
from optuna.storages.journal import JournalFileBackend
from optuna.trial import TrialState as OptunaState

from gptlab.errors import UserError
from gptlab.files import write_file
from gptlab.parsing import unpickle_plain
from gptlab.sweeps.config import PruneConfig, SweeperConfig
from gptlab.sweeps.space import Point, SearchSpace, format_value
from gptlab.sweeps.sweep_store import PRUNE
from gptlab.tracking.run_store.sweeps import Trial

JOURNAL, STUDY = "optuna.journal", "sweep"
# Names in the pickled state of CMA-ES
PERMITTED = {
    "cmaes._cma.CMA",
    *("numpy.dtype", "numpy.ndarray", "numpy._core.multiarray._reconstruct", "numpy._core.multiarray.scalar"),
}
log = logging.getLogger(__name__)


def open_storage(folder: Path) -> optuna.storages.JournalStorage:
    """Opens the journal of the study; its lock also works on a file system shared by several machines (Optuna docs)."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    backend = JournalFileBackend(str(folder / JOURNAL))
    return optuna.storages.JournalStorage(backend)


class SafeCmaEsSampler(optuna.samplers.CmaEsSampler):
    """CMA-ES whose stored state can run no code. Optuna unpickles any object from the journal, as in optuna 5.0."""

    def _restore_optimizer(self, completed_trials: list[optuna.trial.FrozenTrial]) -> Any:
        for trial in reversed(completed_trials):
            parts = {k: v for k, v in trial.system_attrs.items() if k.startswith(self._attr_key_optimizer)}
            if parts:
                content = bytes.fromhex(self._concat_optimizer_attrs(parts))
                try:
                    return unpickle_plain(content, PERMITTED)
                except Exception as error:  # a damaged pickle can raise any exception
                    raise UserError(f"The state of CMA-ES in {JOURNAL} cannot be read: {error}.") from error
        return None


def build_pruner(config: PruneConfig | None, max_tokens: int) -> optuna.pruners.BasePruner:
    """Builds the pruner, whose resource is the number of tokens seen."""
    if config is None:
        return optuna.pruners.NopPruner()
    if config.method == "asha":
        return optuna.pruners.SuccessiveHalvingPruner(
            min_resource=config.min_tokens, reduction_factor=config.reduction_factor
        )
    return optuna.pruners.HyperbandPruner(
        min_resource=config.min_tokens, max_resource=max_tokens, reduction_factor=config.reduction_factor
    )


class Search:
    """Proposes the points of a sweep one by one, and reports the results to Optuna.

    Args:
        config: Configuration of the sweep.
        space: Search space.
        folder: Sweep directory.
        max_tokens: Number of tokens of a trial that is not pruned.
        grid: Points of a grid, in the order of their trials.

    Raises:
        UserError: The search is not a grid, and no key is varied.
    """

    def __init__(
        self, config: SweeperConfig, space: SearchSpace, folder: Path, max_tokens: int, grid: list[Point]
    ) -> None:
        self.config, self.space, self.max_tokens = config, space, max_tokens
        self.folder = folder
        self.grid = grid if config.search == "grid" else None
        self.distributions = space.distributions() if self.grid is None else {}
        self.study: optuna.Study | None = None
        if self.grid is None or config.prune is not None:
            self.study = optuna.create_study(
                storage=open_storage(folder), study_name=STUDY, load_if_exists=True, direction=config.resolved_direction
            )
            self.study.pruner = build_pruner(config.prune, max_tokens)

    @property
    def n_trials(self) -> int:
        """Number of points."""
        return len(self.grid) if self.grid is not None else self.config.n_trials or 0

    def propose(self, number: int) -> Point:
        """Returns the point of the new trial ``number``; all trials with lower numbers exist already."""
        if self.study is None:
            assert self.grid is not None  # noqa: S101
            return self.grid[number]
        known = self.study.get_trials(deepcopy=False)
        if len(known) > number:  # proposed by an earlier process that ended before the trial was stored
            trial: Any = known[number]
        else:
            self.study.sampler = self._sampler(number)
            if self.grid is not None:
                self.study.enqueue_trial({}, user_attrs={"point": self.grid[number]})
            trial = self.study.ask(self.distributions)
        if self.grid is not None:
            return self.grid[number]
        return {key: format_value(trial.params[key]) for key in self.distributions}

    def prepare(self, trial: Trial, run_dir: Path) -> None:
        """Writes prune.json, which the pruning callback of the trial reads, if the sweep has pruning."""
        if self.config.prune is None:
            return
        run_dir.mkdir(parents=True, exist_ok=True)
        values = {"number": trial.number, "max_tokens": self.max_tokens, **self.config.prune.model_dump()}
        write_file(run_dir / PRUNE, json.dumps(values) + "\n")

    def tell(self, trial: Trial) -> None:
        """Reports the result of a trial to Optuna."""
        if self.study is None:
            return
        value = trial.value if trial.value is not None and math.isfinite(trial.value) else None
        states = {"done": OptunaState.COMPLETE, "pruned": OptunaState.PRUNED}
        state = states.get(trial.state, OptunaState.FAIL)
        if state == OptunaState.COMPLETE and (value is None or trial.blew_up):
            state = OptunaState.FAIL
        values = value if state == OptunaState.COMPLETE else None
        self.study.tell(trial.number, values, state=state, skip_if_finished=True)

    def _sampler(self, number: int) -> optuna.samplers.BaseSampler:
        """Returns the sampler of a point, seeded with its number so that a resumed sweep proposes the same points."""
        seed = (self.config.seed * 1_000_003 + number) % 2**32
        match self.config.search:
            case "tpe":
                return optuna.samplers.TPESampler(seed=seed, multivariate=True)
            case "cmaes":
                return SafeCmaEsSampler(seed=seed)
        return optuna.samplers.RandomSampler(seed=seed)
