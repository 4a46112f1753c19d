"""TensorBoard's view of a run, read by TensorBoard."""

import shutil

import pytest

from commands import assert_success, metrics

accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
hparams = pytest.importorskip("tensorboard.plugins.hparams.metadata")


@pytest.mark.slow
def test_rows_after_the_checkpoint_are_replaced_when_a_run_is_resumed(user):
    assert_success(user.train("logger=tensorboard", "callbacks=checkpoint"))
    run = user.only_run()
    shutil.rmtree(run / "checkpoints" / "step_000006")  # as after a kill before that checkpoint
    assert_success(user.python("gptlab.train", f"resume={run}"))
    events = accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    for name, steps in (("train/loss", [1, 2, 3, 4, 5, 6]), ("val/loss", [3, 6])):
        rows = events.Scalars(name)
        assert [row.step for row in rows] == steps
        assert [row.value for row in rows] == pytest.approx(list(metrics(run, name).values()), rel=1e-6)


def test_hyperparameters_are_shown_with_the_last_validation_loss(user):
    assert_success(user.train("logger=tensorboard", "callbacks=none", "optimizer.lr=0.125"))
    run = user.only_run()
    events = accumulator.EventAccumulator(str(run / "tensorboard")).Reload()
    content = events.SummaryMetadata("_hparams_/session_start_info").plugin_data.content
    shown = hparams.parse_session_start_info_plugin_data(content).hparams
    assert shown["optimizer.lr"].number_value == 0.125
    assert shown["model.activation"].string_value == "gelu_tanh"
    content = events.SummaryMetadata("_hparams_/experiment").plugin_data.content
    tags = [metric.name.tag for metric in hparams.parse_experiment_plugin_data(content).metric_infos]
    assert tags == ["val/loss", "val/bits_per_byte"]
    for tag in tags:  # TensorBoard shows the last value of the tag
        assert events.Scalars(tag)[-1].value == pytest.approx(metrics(run, tag)[6], rel=1e-6)
