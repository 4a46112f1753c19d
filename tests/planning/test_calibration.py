"""Measurements of runs, against hand-computed values."""

import os
from typing import Any

import pytest

from configs import resolved
from gptlab.config.base import FrozenConfig
from gptlab.errors import UserError
from gptlab.planning import calibration
from gptlab.planning.calibration import find_measurement, measure_run, save_measurement
from gptlab.planning.plans import plan_hardware
from measured_run import TAKEN

CONFIG = resolved("trainer=cpu").with_vocabulary(257)  # 1,200 steps of 12 x 128 tokens, evaluated every 200
ROWS = [
    {"step": 1.0, "tokens": 100.0, "tokens_per_second": 10.0, "train/loss": 5.0},  # 10 s
    {"step": 3.0, "tokens": 300.0, "tokens_per_second": 100.0, "train/loss": 4.0},  # 2 s
    {"step": 3.0, "tokens": 300.0, "val/loss": 4.0},
    {"step": 5.0, "tokens": 500.0, "tokens_per_second": 50.0, "train/loss": 3.0},  # 4 s
    {"step": 5.0, "tokens": 500.0, "val/loss": 3.0},
]


def test_speed_excludes_the_first_step_and_the_rest_is_evaluation():
    assert measure_run(ROWS, seconds=20, evaluations=2, evaluated=64, peak_memory=7, source="me") == TAKEN


def test_short_or_resumed_run_gives_no_measurement():
    for rows in (ROWS[:1], ROWS[1:]):
        assert measure_run(rows, seconds=20, evaluations=2, evaluated=64, peak_memory=7, source="me") is None


def test_measurement_is_found_for_similar_runs_on_the_same_machine(tmp_path, monkeypatch):
    def config(*overrides: str):
        return resolved("trainer=cpu", f"data.cache_dir={tmp_path}", *overrides).with_vocabulary(257)

    hardware = plan_hardware(config(), [])
    save_measurement(config(), hardware, TAKEN)
    for same in ("optimizer.lr=1", "train.max_steps=7", "seed=3", "name=x", "train.eval_every=9", "logger=tensorboard"):
        assert find_measurement(config(same), hardware) == TAKEN
    others = (
        *("model.n_layer=3", "train.global_batch_size=24", "train.micro_batch_size=6", "optimizer=muon"),
        *("train.ema_decay=0.9", "model.activation_checkpointing=true", "train.loss_chunk=64", "train.grad_clip=0"),
        *("callbacks=trace", "callbacks.checkpoint.asynchronous=true", "trainer.profiler=simple", "loss=z_loss"),
        *("data.documents=masked", "model.dropout=0.1", "train.batch_schedule=[[4,6]]"),
    )
    for other in others:
        assert find_measurement(config(other), hardware) is None
    assert find_measurement(config("lora=attention", "init_from=x"), hardware) is None
    for elsewhere in (
        hardware._replace(is_local=False),
        hardware._replace(name="other"),
        hardware._replace(precision="x"),
    ):
        assert find_measurement(config(), elsewhere) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    assert find_measurement(config(), hardware) is None


CONFIGS = (
    ("optimizer=adamw", "lora=all", "init_from=x", "logger=tensorboard", "callbacks=[default,early_stopping,trace]"),
    ("optimizer=muon", "schedule=wsd", "logger=wandb", "tokenizer=gpt2", "model=gpt2_modern"),
    ("optimizer=sgd", "callbacks=[none,watch]", "loss=z_loss", "model.norm={_target_:torch.nn.RMSNorm}"),
)


@pytest.mark.parametrize("overrides", CONFIGS, ids=len)
def test_key_has_every_field_of_the_configuration_that_is_not_excluded_with_a_reason(overrides):
    def check(config: FrozenConfig, key: dict[str, Any]) -> None:
        excluded = calibration.EXCLUDED.get(type(config), {})
        assert {*key, *excluded} == {*type(config).model_fields, *(config.model_extra or {})}
        assert not key.keys() & excluded.keys()
        for name in key:
            if isinstance(value := getattr(config, name), FrozenConfig):
                check(value, key[name])
            else:
                assert key[name] == config.model_dump(mode="json")[name]

    config = resolved("trainer=cpu", *overrides)
    check(config, calibration.key_values(config))


def test_excluded_fields_exist_and_have_a_reason():
    for config_type, reasons in calibration.EXCLUDED.items():
        assert reasons.keys() <= config_type.model_fields.keys()
        assert all(reasons.values())


def test_measurement_of_fewer_steps_does_not_replace_one_of_more(tmp_path):
    config = resolved("trainer=cpu", f"data.cache_dir={tmp_path}").with_vocabulary(257)
    hardware = plan_hardware(config, [])
    long, short, newer = (TAKEN.model_copy(update=u) for u in ({"steps": 9}, {"steps": 8}, {"steps": 9, "source": "x"}))
    for saved, kept in ((short, short), (long, long), (short, long), (newer, newer)):
        save_measurement(config, hardware, saved)
        assert find_measurement(config, hardware) == kept


def test_calibration_run_has_the_key_of_its_configuration(tmp_path):
    overrides = ("callbacks=[default,early_stopping,trace,watch]", "logger=tensorboard", "lora=all", "init_from=x")
    config = resolved("trainer=cpu", f"data.cache_dir={tmp_path}", *overrides).with_vocabulary(257)
    hardware = plan_hardware(config, [])
    save_measurement(calibration._shortened(config), hardware, TAKEN)
    assert find_measurement(config, hardware) == TAKEN


def test_batch_schedule_cannot_be_calibrated():
    with pytest.raises(UserError, match=r"train\.batch_schedule=\[\[4, 6\]\]"):
        calibration.calibrate(resolved("train.batch_schedule=[[4,6]]"))


def test_unwritable_cache_logs_a_warning(tmp_path, caplog):
    (tmp_path / calibration.FOLDER).touch()
    config = resolved("trainer=cpu", f"data.cache_dir={tmp_path}").with_vocabulary(257)
    save_measurement(config, plan_hardware(config, []), TAKEN)
    assert "could not be saved for later forecasts" in caplog.text


def test_threads_are_all_cores_where_their_number_cannot_be_restricted(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert calibration._threads() == len(os.sched_getaffinity(0))
    monkeypatch.delattr(os, "sched_getaffinity")  # as on macOS
    assert calibration._threads() == os.cpu_count()
