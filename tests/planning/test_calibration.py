"""Measurements of runs, against hand-computed values."""

from configs import resolved
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


def test_unwritable_cache_logs_a_warning(tmp_path, caplog):
    (tmp_path / calibration.FOLDER).touch()
    config = resolved("trainer=cpu", f"data.cache_dir={tmp_path}").with_vocabulary(257)
    save_measurement(config, plan_hardware(config, []), TAKEN)
    assert "could not be saved for later forecasts" in caplog.text
