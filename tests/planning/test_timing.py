"""Speeds as they are read from a run, and times as they follow from them, by hand."""

import pytest

from gptlab.errors import UserError
from gptlab.model.config import flops_per_token
from gptlab.planning import calibration
from gptlab.planning.calibration import Measurement, find_measurement, measure_run, save_measurement
from gptlab.planning.plans import plan_hardware
from gptlab.planning.timing import RunLength, estimate_at_mfu, estimate_from_measurement, run_length
from gptlab.training.hardware import GPUS, gpu_from_name
from test_conf import resolved

CONFIG = resolved("trainer=cpu").with_vocabulary(257)  # 1,200 steps of 12 x 128 tokens, evaluated every 200
ROWS = [
    {"step": 1.0, "tokens": 100.0, "tokens_per_second": 10.0, "train/loss": 5.0},  # 10 s
    {"step": 3.0, "tokens": 300.0, "tokens_per_second": 100.0, "train/loss": 4.0},  # 2 s
    {"step": 3.0, "tokens": 300.0, "val/loss": 4.0},
    {"step": 5.0, "tokens": 500.0, "tokens_per_second": 50.0, "train/loss": 3.0},  # 4 s
    {"step": 5.0, "tokens": 500.0, "val/loss": 3.0},
]
TAKEN = Measurement(
    tokens_per_second=400 / 6,
    first_step_seconds=10,
    evaluation_seconds=2,
    evaluated=64,
    peak_memory_bytes=7,
    steps=4,
    source="me",
)


def test_a_run_s_speed_is_that_of_its_steps_but_the_first_and_what_is_left_is_its_evaluations():
    assert measure_run(ROWS, seconds=20, evaluations=2, evaluated=64, peak_memory=7, source="me") == TAKEN


def test_a_run_of_a_step_or_of_a_second_half_tells_nothing():
    for rows in (ROWS[:1], ROWS[1:]):
        assert measure_run(rows, seconds=20, evaluations=2, evaluated=64, peak_memory=7, source="me") is None


def test_how_long_a_run_is():
    assert run_length(CONFIG, 558_031) == RunLength(1200, 1200 * 12 * 128, 6, 500 * 128)
    everything = resolved("train.eval_windows=null", "train.eval_every=1000").with_vocabulary(257)
    assert run_length(everything, 1281) == RunLength(1200, 1200 * 12 * 128, 2, 10 * 128)
    assert run_length(everything, None).evaluated is None


def test_time_as_measured():
    done = RunLength(
        steps=100, tokens=10_000, evaluations=3, evaluated=128
    )  # twice as long as those that were measured
    time = estimate_from_measurement(done, plan_hardware(CONFIG, []), TAKEN)
    # evaluated tokens take a third of the time of trained ones; the rest of an evaluation is its sample and checkpoint
    each = 2 + (128 - 64) / (3 * 400 / 6)
    assert time.seconds == pytest.approx(10 + 9_900 / (400 / 6) + 3 * each)


def test_time_at_a_share_of_the_peak():
    done = RunLength(steps=100, tokens=10_000, evaluations=3, evaluated=300)
    time = estimate_at_mfu(CONFIG, done, plan_hardware(CONFIG, ["a100"]), 0.5)
    assert time.tokens_per_second == pytest.approx(0.5 * 312e12 / flops_per_token(CONFIG.model))
    assert time.seconds * time.tokens_per_second == pytest.approx(10_000 + 3 * 100)


def test_what_was_measured_is_known_to_runs_of_the_same_shape_on_the_same_machine(tmp_path, monkeypatch):
    def config(*overrides: str):
        return resolved("trainer=cpu", f"data.cache_dir={tmp_path}", *overrides).with_vocabulary(257)

    hardware = plan_hardware(config(), [])
    save_measurement(config(), hardware, TAKEN)
    for same in ("optimizer.lr=1", "train.max_steps=7", "seed=3", "name=x", "train.eval_every=9"):
        assert find_measurement(config(same), hardware) == TAKEN
    others = (
        *("model.n_layer=3", "train.global_batch_size=24", "train.micro_batch_size=6", "optimizer=muon"),
        *("train.ema_decay=0.9", "model.activation_checkpointing=true", "train.loss_chunk=64"),
    )
    for other in others:
        assert find_measurement(config(other), hardware) is None
    for elsewhere in (
        hardware._replace(is_local=False),
        hardware._replace(name="other"),
        hardware._replace(precision="x"),
    ):
        assert find_measurement(config(), elsewhere) is None
    monkeypatch.setenv("OMP_NUM_THREADS", "77")
    assert find_measurement(config(), hardware) is None


def test_a_cache_that_cannot_be_written_ends_no_run(tmp_path, caplog):
    (tmp_path / calibration.FOLDER).touch()
    config = resolved("trainer=cpu", f"data.cache_dir={tmp_path}").with_vocabulary(257)
    save_measurement(config, plan_hardware(config, []), TAKEN)
    assert "is not kept for plans" in caplog.text


def test_gpus_are_known_by_two_names_and_a_wrong_one_by_the_nearest():
    assert gpu_from_name("NVIDIA H100 80GB HBM3") is gpu_from_name("H100") is GPUS["h100"]
    with pytest.raises(UserError, match=r"gpu=h1000: .* Did you mean h100\?"):
        gpu_from_name("h1000")
