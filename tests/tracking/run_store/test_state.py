"""state.json: the state of a run, including runs whose process is gone."""

import json
import os
import subprocess
import sys
import time

import pytest

from gptlab.errors import Diverged, UserError
from gptlab.exit_codes import CONFIG_ERROR, DIVERGED, DONE, FAILED, INTERRUPTED, PREEMPTED, PRUNED
from gptlab.tracking.run_store.state import SILENT_SECONDS, RunState, end_state, load_state, new_state, status_of
from gptlab.tracking.run_store.sweeps import load_trials


def test_a_run_of_this_process_is_running(tmp_path):
    new_state(100).save(tmp_path)
    state = load_state(tmp_path)
    assert (state.state, state.max_steps, state.pid) == ("running", 100, os.getpid())
    assert [path.name for path in tmp_path.iterdir()] == ["state.json"]


@pytest.mark.parametrize("is_reaped", [True, False], ids=["gone", "a zombie"])
def test_a_run_whose_process_is_gone_is_lost(tmp_path, is_reaped):
    process = subprocess.Popen((sys.executable, "-c", ""))
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)  # it has ended and is a zombie until it is reaped
    if is_reaped:
        process.wait()
    new_state(100).model_copy(update={"pid": process.pid, "seconds_left": 5.0}).save(tmp_path)
    state = load_state(tmp_path)
    process.wait()
    assert (state.state, state.seconds_left) == ("lost", None)


@pytest.mark.parametrize(("age", "expected"), [(SILENT_SECONDS / 2, "running"), (SILENT_SECONDS * 2, "lost")])
def test_a_run_on_another_host_is_lost_without_updates(tmp_path, age, expected):
    RunState(state="running", pid=1, host="elsewhere", updated=time.time() - age).save(tmp_path)
    assert load_state(tmp_path).state == expected


@pytest.mark.parametrize(
    ("status", "state"),
    [
        *((DONE, "done"), (PRUNED, "pruned"), (PREEMPTED, "stopped"), (INTERRUPTED, "interrupted")),
        *((DIVERGED, "diverged"), (CONFIG_ERROR, "config_error"), (FAILED, "failed"), (137, "failed")),
    ],
)
def test_end_state_records_exit_code_and_message(tmp_path, status, state):
    new_state(10).model_copy(update={"step": 7, "loss": 2.5}).save(tmp_path)
    end_state(tmp_path, status, "why")
    found = load_state(tmp_path)
    assert (found.state, found.status, found.message, found.step, found.loss) == (state, status, "why", 7, 2.5)


def test_a_preempted_run_records_the_step_of_its_checkpoint(tmp_path):
    new_state(100).model_copy(update={"step": 30, "tokens": 300}).save(tmp_path)  # the last logged step
    end_state(tmp_path, PREEMPTED, step=54, tokens=540)
    found = load_state(tmp_path)
    assert (found.state, found.step, found.tokens) == ("stopped", 54, 540)


def test_a_state_with_an_earlier_name_is_read_by_its_current_one(tmp_path):
    (tmp_path / "state.json").write_text('{"state": "mistaken", "status": 2}')
    assert load_state(tmp_path).state == "config_error"
    (tmp_path / "0").mkdir()
    trial = {"number": 0, "overrides": {}, "config_hash": "x", "state": "mistaken", "status": 2}
    (tmp_path / "0" / "trial.json").write_text(json.dumps(trial))
    assert [trial.state for trial in load_trials(tmp_path)] == ["config_error"]


def test_status_of_returns_the_exit_code_of_the_command():
    errors = [KeyboardInterrupt(), Diverged(), UserError(), RuntimeError()]
    assert [status_of(error) for error in errors] == [INTERRUPTED, DIVERGED, CONFIG_ERROR, FAILED]


@pytest.mark.parametrize("text", ["", "{", "[]", '{"step": "x"}'])
def test_a_missing_or_invalid_state_is_none(tmp_path, text):
    assert load_state(tmp_path) is None
    (tmp_path / "state.json").write_text(text)
    assert load_state(tmp_path) is None
