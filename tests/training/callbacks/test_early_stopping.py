"""Early stopping on metrics of gptlab, of its callbacks and of users' callbacks."""

import pytest
from lightning.pytorch.callbacks import EarlyStopping as LightningEarlyStopping

from commands import assert_config_error, assert_success, metrics
from gptlab.training.callbacks.early_stopping import EarlyStopping
from gptlab.training.config import EarlyStoppingConfig

SCORE = """
import lightning as L

class Score(L.Callback):
    def on_validation_epoch_end(self, trainer, pl_module):
        pl_module.log("mine/score", -float(trainer.global_step))  # becomes worse
"""
STOP = ("train.max_steps=20", "train.eval_every=2", "callbacks.early_stopping.patience=2")


def test_a_config_of_an_earlier_version_monitors_val_loss():
    earlier = EarlyStoppingConfig.model_validate({"patience": 3, "min_delta": 0.5})
    assert (earlier.monitor, earlier.mode) == ("val/loss", "min")
    assert EarlyStopping(earlier).state_key == LightningEarlyStopping("val/loss", mode="min").state_key


def test_a_run_stops_when_a_metric_of_the_users_callback_does_not_improve(user):
    (user.folder / "mine.py").write_text(SCORE)
    monitor = ("callbacks.early_stopping.monitor=mine/score", "callbacks.early_stopping.mode=max")
    assert_success(
        user.train("callbacks=[default,early_stopping]", "+callbacks.score._target_=mine.Score", *monitor, *STOP)
    )
    assert list(metrics(user.only_run(), "mine/score")) == [2, 4, 6]  # the best one, and two worse ones


def test_a_run_stops_on_a_metric_of_training(user):
    monitor = ("callbacks.early_stopping.monitor=tokens", "callbacks.early_stopping.mode=min")
    assert_success(user.train("callbacks=[default,early_stopping]", *monitor, *STOP))
    assert list(metrics(user.only_run(), "val/loss")) == [2, 4, 6]


@pytest.mark.parametrize(("extra", "step"), [((), 1), (("+callbacks.score._target_=mine.Score",), 2)])
def test_an_unknown_metric_is_reported_as_early_as_it_is_known(user, extra, step):
    (user.folder / "mine.py").write_text(SCORE)
    done = user.train("callbacks=[default,early_stopping]", *extra, *STOP, "callbacks.early_stopping.monitor=val/losss")
    assert_config_error(done, "callbacks.early_stopping.monitor=val/losss: this run has no such metric. Did you mean")
    assert "grad_norm" in done.stderr
    assert ("mine/score" in done.stderr) == bool(extra)
    assert max(metrics(user.only_run(), "train/loss")) == step


@pytest.mark.parametrize("devices", [(), pytest.param(("trainer=fsdp", "trainer.devices=2"), marks=pytest.mark.slow)])
def test_a_run_that_has_stopped_stays_finished_until_its_patience_changes(user, devices):
    monitor = ("callbacks.early_stopping.monitor=tokens", "callbacks.early_stopping.mode=min")
    start = ("callbacks=[default,early_stopping]", *monitor, *STOP, *devices)
    assert_success(user.train(*start))
    run = user.only_run()
    before = {path: path.read_bytes() for path in (run / "metrics.csv", *run.glob("checkpoints/*/*.*"))}
    assert_success(user.python("gptlab.train", f"resume={run}"))
    assert {path: path.read_bytes() for path in (run / "metrics.csv", *run.glob("checkpoints/*/*.*"))} == before
    assert_success(user.python("gptlab.train", f"resume={run}", "callbacks.early_stopping.patience=3"))
    assert list(metrics(run, "val/loss")) == [2, 4, 6, 8]  # as with this patience from the start


@pytest.mark.slow
def test_a_run_that_a_users_callback_has_ended_stays_finished_until_its_length_changes(user):
    stop = ("lightning.pytorch.callbacks.EarlyStopping", "val/loss")
    component = (f"+callbacks.stop._target_={stop[0]}", f"+callbacks.stop.monitor={stop[1]}")
    bound = "+callbacks.stop.stopping_threshold=100"  # reached at the first evaluation
    assert_success(user.train("callbacks=checkpoint", *component, bound, *STOP[:2]))
    run = user.only_run()
    for steps, evaluations in ((20, [2]), (21, [2, 4])):
        assert_success(user.python("gptlab.train", f"resume={run}", f"train.max_steps={steps}"))
        assert list(metrics(run, "val/loss")) == evaluations
