"""PruningCallback reports to the Optuna trial with its own number."""

import json
from types import SimpleNamespace
from typing import Any

import optuna
import pytest

from gptlab.sweeps.pruning import PruningCallback
from gptlab.sweeps.search import STUDY, open_storage


@pytest.mark.parametrize(("number", "loss", "is_worse"), [(2, 1.0, False), (2, 9.0, True), (1, 9.0, False)])
def test_callback_reports_to_its_own_trial_and_prunes_it(tmp_path, number, loss, is_worse):
    storage = open_storage(tmp_path)
    optuna.create_study(storage=storage, study_name="another").ask()  # so that trial IDs are not trial numbers
    study = optuna.create_study(storage=storage, study_name=STUDY)
    trials = [study.ask() for _ in range(3)]
    run_dir = tmp_path / str(number)
    run_dir.mkdir()
    settings = {"method": "asha", "min_tokens": 100, "reduction_factor": 2}
    (run_dir / "prune.json").write_text(json.dumps({"number": number, "max_tokens": 400, **settings}))
    recorder: Any = SimpleNamespace(max_steps=9, tokens=lambda step: 100 * step)
    pruning = PruningCallback(run_dir, recorder)
    trainer: Any = SimpleNamespace(
        global_step=1,
        sanity_checking=False,
        is_global_zero=True,
        should_stop=False,
        callback_metrics={"val/loss": SimpleNamespace(item=lambda: loss)},
        strategy=SimpleNamespace(broadcast=lambda value: value),
    )
    if is_worse:  # of two trials, the better one continues
        study.pruner = pruning.pruner
        trials[0].report(2.0, 100)
        assert not trials[0].should_prune()
    pruning.on_validation_end(trainer, None)
    reported = {trial.number: trial.intermediate_values for trial in study.get_trials()}
    assert reported[number] == {100: loss}
    assert pruning.pruned == trainer.should_stop == is_worse
