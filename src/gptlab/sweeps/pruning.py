"""Pruning callback of a trial: reports every evaluation to the Optuna study, whose pruner may end the trial."""

import logging
import math
from pathlib import Path

import lightning as L
import optuna

from gptlab.files import read_regular
from gptlab.launch.train_run import ExtraCallback
from gptlab.parsing import parse_json
from gptlab.sweeps.config import PruneConfig
from gptlab.sweeps.search import STUDY, build_pruner, open_storage
from gptlab.sweeps.sweep_store import PRUNE
from gptlab.training.callbacks.metrics import MetricsCallback

log = logging.getLogger(__name__)


class PruningCallback(ExtraCallback):
    """Stops a trial that the Optuna pruner prunes, at the same step on all ranks.

    Args:
        run_dir: Run directory of the trial, inside the sweep directory.
        recorder: Metrics callback, which counts tokens.

    Attributes:
        pruned: Whether the trial was pruned.
    """

    def __init__(self, run_dir: Path, recorder: MetricsCallback) -> None:
        values = parse_json(read_regular(run_dir / PRUNE))
        self.number, max_tokens = values.pop("number"), values.pop("max_tokens")
        self.folder, self.recorder = run_dir.parent, recorder
        self.pruner = build_pruner(PruneConfig(**values), max_tokens)
        self.pruned = False
        self._trial: optuna.Trial | None = None

    def on_validation_end(self, trainer: L.Trainer, pl_module: L.LightningModule) -> None:
        """Reports the validation loss to the study, and stops training if the pruner prunes the trial."""
        step = trainer.global_step
        if trainer.sanity_checking or step == self.recorder.max_steps:
            return
        should_prune = False
        if trainer.is_global_zero:
            should_prune = self._should_prune(trainer.callback_metrics["val/loss"].item(), self.recorder.tokens(step))
        self.pruned = trainer.strategy.broadcast(should_prune)
        if self.pruned:
            trainer.should_stop = True
            if trainer.is_global_zero:
                log.info("Pruned at step %d: other trials had a lower validation loss at this number of tokens.", step)

    def _should_prune(self, loss: float, tokens: int) -> bool:
        if self._trial is None:
            storage = open_storage(self.folder)
            study = optuna.load_study(study_name=STUDY, storage=storage, pruner=self.pruner)
            study_id = storage.get_study_id_from_name(STUDY)
            trial_id = storage.get_trial_id_from_study_id_trial_number(study_id, self.number)
            self._trial = optuna.Trial(study, trial_id)
        self._trial.report(loss if math.isfinite(loss) else math.inf, tokens)
        return self._trial.should_prune()
