"""SweepRunner with fake trials: every trial runs exactly once, in whatever order trials and sweep processes end."""

import contextlib
import json
import math
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptlab.config.base import validate
from gptlab.errors import UserError
from gptlab.exit_codes import CONFIG_ERROR, DIVERGED, DONE, FAILED, INTERRUPTED, PREEMPTED, PRUNED
from gptlab.sweeps import sweep_runner
from gptlab.sweeps.analysis.table import analyze_sweep
from gptlab.sweeps.config import SweeperConfig
from gptlab.sweeps.search import Search
from gptlab.sweeps.space import SearchSpace
from gptlab.sweeps.sweep_runner import SweepRunner, missing_metric
from gptlab.sweeps.sweep_store import SweepStore, find_or_create_sweep_dir
from gptlab.tracking.run_store.state import RunState
from gptlab.tracking.run_store.sweeps import Sweep, Trial, load_sweep, load_trials

SETTINGS = {
    "question": "",
    "search": "grid",
    "n_trials": None,
    "seed": 0,
    "metric": "val/loss",
    "direction": "minimize",
    "baseline": {},
    "prune": None,
    "retry": False,
    "fail_fast": False,
    "max_hours": None,
    "params": {},
}
GRID = ["x=1,2,3,4,5,6", "seed=1,2"]


class Killed(BaseException):
    """Stands for a SIGKILL of the sweep process."""


class FakeLauncher:
    """Launcher that ends trials in the order of their start, two at a time, with ``statuses`` by number."""

    at_once = 2

    def __init__(self, statuses=None, dies_after=math.inf):
        self.statuses, self.dies_after = statuses or {}, dies_after
        self.running, self.started, self.finished = {}, [], []
        self.is_stopped = False

    @property
    def has_room(self):
        return len(self.running) < self.at_once and not self.is_stopped

    @property
    def is_busy(self):
        return bool(self.running)

    def start(self, trial, config, run_dir):
        self.started.append(trial.number)
        self.running[trial.number] = (config, run_dir)
        return trial

    def reattach(self, trial):
        return False

    def ended(self):
        if not self.running:
            return []
        if len(self.finished) >= self.dies_after:
            raise Killed
        number = next(iter(self.running))
        config, run_dir = self.running.pop(number)
        status = self.statuses.get(number, DONE)
        run_dir.mkdir(parents=True, exist_ok=True)
        if status in (DONE, PRUNED):
            (run_dir / "metrics.csv").write_text(f"step,val/loss\n1,{config.loss}\n")
        RunState(state="running", pid=1, tokens=100, message=f"because {number}").save(run_dir)
        self.finished.append(number)
        return [(number, status)]

    def forward_signal(self, number):
        self.is_stopped = True

    def close(self):
        pass


class Values(SimpleNamespace):
    def model_dump(self, **options):
        return {"x": self.x, "seed": self.seed}


def compose(point):
    if point["x"] == "invalid":
        raise UserError("x=invalid is not a number.")
    x, seed = float(point["x"]), int(point.get("seed", 0))
    return Values(x=x, seed=seed, loss=(x - 4) ** 2 + seed / 100)


def run_sweep(folder: Path, arguments, runner, **changes):
    settings = SweeperConfig(**SETTINGS | changes)
    space = SearchSpace({}, list(arguments))
    grid = space.grid() if settings.search == "grid" else []
    definition = Sweep(
        question="", space=space.written, fixed=space.fixed, search=settings.search,
        n_trials=len(grid) or settings.n_trials, metric=settings.metric, direction=settings.direction,
        baseline={}, wandb_group="", points=grid,
    )  # fmt: skip
    store = SweepStore(folder, definition, lambda trial: True)
    try:
        search = Search(settings, space, folder, 1000, store.sweep.points)
        return SweepRunner(store, search, runner, compose, settings).run()
    finally:
        store.close()


@pytest.fixture(autouse=True)
def no_polling_delay(monkeypatch):
    monkeypatch.setattr(sweep_runner, "POLL_SECONDS", 0)


def test_every_point_runs_and_its_value_is_stored(tmp_path):
    runner = FakeLauncher()
    assert run_sweep(tmp_path, GRID, runner) == DONE
    trials = load_trials(tmp_path)
    assert [trial.number for trial in trials] == list(range(12)) == sorted(runner.started)
    assert {trial.state for trial in trials} == {"done"}
    best = min(trials, key=lambda trial: trial.value)
    assert best.overrides == {"x": "4", "seed": "1"}
    assert [trial.value for trial in trials] == pytest.approx(
        [(x - 4) ** 2 + s / 100 for x in range(1, 7) for s in (1, 2)]
    )


def test_failures_are_recorded_and_the_other_trials_run(tmp_path):
    runner = FakeLauncher({3: FAILED, 5: DIVERGED, 7: 137, 8: PRUNED})
    assert run_sweep(tmp_path, GRID, runner) == DIVERGED
    trials = {trial.number: trial for trial in load_trials(tmp_path)}
    assert Counter(trial.state for trial in trials.values()) == {"done": 8, "failed": 2, "diverged": 1, "pruned": 1}
    assert trials[3].message == "because 3"
    assert trials[3].value is trials[5].value is None
    assert trials[8].value is not None
    assert trials[8].tokens == 100


@pytest.mark.parametrize("first", range(13))
def test_sweep_killed_twice_runs_every_trial_once(tmp_path, first):
    statuses, finished = {3: FAILED, 5: DIVERGED}, []
    for dies_after in (first, 2, math.inf):
        runner = FakeLauncher(statuses, dies_after)
        with contextlib.suppress(Killed):
            assert run_sweep(tmp_path, GRID, runner) == DIVERGED
        finished += runner.finished
    assert sorted(finished) == list(range(12))
    assert Counter(trial.state for trial in load_trials(tmp_path)) == {"done": 10, "failed": 1, "diverged": 1}


@pytest.mark.parametrize("points_are_stored", [True, False])
def test_shuffled_points_run_once_when_the_sweep_is_resumed(tmp_path, points_are_stored):
    """sweep.json of earlier versions has no points."""
    sweep = ["x=shuffle(1,2,3,4,5,6)"]
    values = {"1", "2", "3", "4", "5", "6"}
    for dies_after in (1, 1, 1):
        with pytest.raises(Killed):
            run_sweep(tmp_path, sweep, FakeLauncher(dies_after=dies_after))
        if not points_are_stored:
            path = tmp_path / "sweep.json"
            path.write_text(json.dumps({k: v for k, v in json.loads(path.read_text()).items() if k != "points"}))
    known = [trial.overrides["x"] for trial in load_trials(tmp_path)]
    assert run_sweep(tmp_path, sweep, FakeLauncher()) == DONE
    found = [trial.overrides["x"] for trial in load_trials(tmp_path)]
    assert found[: len(known)] == known
    assert (len(found), {*found}) == (6, values)


def test_preempted_trials_are_resumed_and_failed_trials_only_with_retry(tmp_path):
    assert run_sweep(tmp_path, GRID, FakeLauncher({0: PREEMPTED, 1: INTERRUPTED, 2: FAILED})) == PREEMPTED
    again = FakeLauncher()
    assert run_sweep(tmp_path, GRID, again) == FAILED
    assert again.started == [0, 1]
    once_more = FakeLauncher()
    assert run_sweep(tmp_path, GRID, once_more, retry=True) == DONE
    assert once_more.started == [2]


@pytest.mark.parametrize("stopped", [PREEMPTED, INTERRUPTED])
def test_trial_that_ended_after_its_sweep_is_not_run_again(tmp_path, stopped):
    """Its result is taken from its run's record."""
    assert run_sweep(tmp_path, ["x=1,2,3"], FakeLauncher({0: stopped, 1: stopped, 2: stopped})) == PREEMPTED
    (tmp_path / "0" / "metrics.csv").write_text("step,val/loss\n1,9.5\n")
    RunState(state="done", status=DONE, tokens=7).save(tmp_path / "0")
    RunState(state="diverged", status=DIVERGED, message="too many").save(tmp_path / "1")
    again = FakeLauncher()
    assert run_sweep(tmp_path, ["x=1,2,3"], again) == DIVERGED
    assert again.started == [2]
    found = [(trial.state, trial.value, trial.tokens, trial.starts) for trial in load_trials(tmp_path)]
    assert found == [("done", 9.5, 7, 1), ("diverged", None, 0, 1), ("done", 1, 100, 2)]


def test_trial_that_a_signal_ends_after_its_run_is_done(tmp_path):
    class Late(FakeLauncher):
        def ended(self):
            found = super().ended()
            for number, _ in found:
                (tmp_path / str(number) / "metrics.csv").write_text("step,val/loss\n1,9.5\n")
                RunState(state="done", status=DONE).save(tmp_path / str(number))
            return found

    assert run_sweep(tmp_path, ["x=1,2"], Late({0: INTERRUPTED, 1: PREEMPTED})) == DONE
    assert [(trial.state, trial.value) for trial in load_trials(tmp_path)] == [("done", 9.5)] * 2


def test_record_of_an_earlier_start_is_not_the_result_of_a_retry(tmp_path):
    """The sweep is killed while it retries a trial whose run has recorded its first failure."""
    assert run_sweep(tmp_path, ["x=1,2"], FakeLauncher({1: FAILED})) == FAILED
    RunState(state="failed", status=FAILED, message="out of memory").save(tmp_path / "1")
    with pytest.raises(Killed):
        run_sweep(tmp_path, ["x=1,2"], FakeLauncher(dies_after=0), retry=True)
    again = FakeLauncher()
    assert run_sweep(tmp_path, ["x=1,2"], again) == DONE
    assert again.started == [1]


def test_job_of_an_earlier_start_is_forgotten(tmp_path):
    """Its result must not count as that of the new start if the sweep is killed while it submits the new job."""

    class Submitting(FakeLauncher):
        def start(self, trial, config, run_dir):
            return super().start(trial, config, run_dir).model_copy(update={"job": "7"})

    class Dying(FakeLauncher):
        def start(self, trial, config, run_dir):
            raise Killed

    assert run_sweep(tmp_path, ["x=1,2"], Submitting({1: FAILED})) == FAILED
    assert load_trials(tmp_path)[1].job == "7"
    with pytest.raises(Killed):
        run_sweep(tmp_path, ["x=1,2"], Dying(), retry=True)
    assert load_trials(tmp_path)[1].job is None


def test_invalid_point_is_a_trial_with_a_config_error(tmp_path):
    runner = FakeLauncher()
    assert run_sweep(tmp_path, ["x=1,invalid,3"], runner) == CONFIG_ERROR
    assert [trial.state for trial in load_trials(tmp_path)] == ["done", "config_error", "done"]
    assert load_trials(tmp_path)[1].message == "x=invalid is not a number."


def test_equal_configurations_run_once(tmp_path):
    runner = FakeLauncher()
    runner.at_once = 1
    assert run_sweep(tmp_path, ["x=1,1.0,2"], runner) == DONE
    assert runner.started == [0, 2]
    assert [trial.value for trial in load_trials(tmp_path)] == [9, 9, 4]


@pytest.mark.parametrize("search", ["random", "tpe", "cmaes"])
def test_killed_search_resumes_with_the_same_points(tmp_path, search):
    space = ["x=interval(0.0,10.0)"]
    options = {"search": search, "n_trials": 12}
    whole, parts = FakeLauncher(), []
    whole.at_once = 1
    assert run_sweep(tmp_path / "whole", space, whole, **options) == DONE
    for dies_after in (5, math.inf):
        runner = FakeLauncher(dies_after=dies_after)
        runner.at_once = 1
        with contextlib.suppress(Killed):
            run_sweep(tmp_path / "killed", space, runner, **options)
        parts += runner.finished
    assert parts == list(range(12))
    points = [[trial.overrides for trial in load_trials(tmp_path / name)] for name in ("whole", "killed")]
    assert points[0] == points[1]
    if search != "random":
        best = min(load_trials(tmp_path / "whole"), key=lambda trial: trial.value)
        assert abs(float(best.overrides["x"]) - 4) < 1


def test_directory_with_a_different_sweep_raises(tmp_path):
    run_sweep(tmp_path, ["x=1,2"], FakeLauncher())
    with pytest.raises(UserError, match=r"contains a different sweep: its search space is x=1,2\."):
        run_sweep(tmp_path, ["x=1,3"], FakeLauncher())


def test_second_process_of_a_running_sweep_raises(tmp_path):
    class Second(FakeLauncher):
        def start(self, trial, config, run_dir):
            with pytest.raises(UserError, match="Another process is running this sweep"):
                run_sweep(tmp_path, ["x=1,2"], FakeLauncher())
            return super().start(trial, config, run_dir)

    assert run_sweep(tmp_path, ["x=1,2"], Second()) == DONE


def test_a_sweep_with_more_points_runs_only_the_new_ones(tmp_path):
    assert run_sweep(tmp_path, ["x=1,2", "seed=1,2"], FakeLauncher()) == DONE
    extended = FakeLauncher()
    assert run_sweep(tmp_path, ["x=3,2,1", "seed=1,2"], extended) == DONE
    trials = load_trials(tmp_path)
    assert extended.started == [4, 5]
    assert [trial.overrides["x"] for trial in trials] == ["1", "1", "2", "2", "3", "3"]
    assert load_sweep(tmp_path).n_trials == 6
    assert analyze_sweep(tmp_path).rows[0].settings == {"x": "3"}
    fewer = ["x=1,2", "seed=1,2"]
    with pytest.raises(UserError, match=r"a different sweep: its search space is x=3,2,1 seed=1,2\."):
        run_sweep(tmp_path, fewer, FakeLauncher())


def test_a_search_with_more_trials_continues(tmp_path):
    search = {"search": "tpe", "n_trials": 4, "seed": 5}
    assert run_sweep(tmp_path / "a", ["x=interval(1,6)"], FakeLauncher(), **search) == DONE
    extended = FakeLauncher()
    assert run_sweep(tmp_path / "a", ["x=interval(1,6)"], extended, **search | {"n_trials": 6}) == DONE
    assert extended.started == [4, 5]
    assert run_sweep(tmp_path / "b", ["x=interval(1,6)"], FakeLauncher(), **search | {"n_trials": 6}) == DONE
    assert [t.overrides for t in load_trials(tmp_path / "a")] == [t.overrides for t in load_trials(tmp_path / "b")]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metric": "train/loss"}, "its hydra.sweeper.metric is val/loss"),
        ({"direction": "maximize"}, "its hydra.sweeper.direction is minimize"),
        ({"search": "random", "n_trials": 2}, "its hydra.sweeper.search is grid"),
    ],
)
def test_another_sweep_in_its_directory_is_an_error(tmp_path, changes, message):
    assert run_sweep(tmp_path, ["x=1,2"], FakeLauncher()) == DONE
    with pytest.raises(UserError, match=f"a different sweep: {message}"):
        run_sweep(tmp_path, ["x=1,2"], FakeLauncher(), **changes)


def test_the_highest_value_is_the_best_if_the_metric_is_maximized(tmp_path):
    class Rising(FakeLauncher):
        def ended(self):
            found = super().ended()
            for number, _ in found:
                path = tmp_path / str(number) / "metrics.csv"
                path.write_text(f"{path.read_text()}2,{number + 10}\n3,-1\n")
            return found

    assert run_sweep(tmp_path, ["x=1,2,3"], Rising(), direction="maximize") == DONE
    assert [trial.value for trial in load_trials(tmp_path)] == [10, 11, 12]
    answers = analyze_sweep(tmp_path)
    assert [row.settings["x"] for row in answers.rows] == ["3", "2", "1"]
    assert answers.answer.startswith("best: x=3, 12.0000 nats")


def test_fail_fast_starts_no_further_trial(tmp_path):
    runner = FakeLauncher(statuses={1: FAILED})
    assert run_sweep(tmp_path, GRID, runner, fail_fast=True) == FAILED
    assert runner.started == [0, 1, 2]  # two at a time; trial 2 started when trial 0 ended
    assert {trial.number: trial.state for trial in load_trials(tmp_path)} == {0: "done", 1: "failed", 2: "done"}


def test_a_sweep_ends_after_max_hours_and_continues(tmp_path):
    runner, rest = FakeLauncher(), FakeLauncher()
    assert run_sweep(tmp_path, GRID, runner, max_hours=1e-12) == PREEMPTED
    assert runner.started == []
    assert run_sweep(tmp_path, GRID, rest) == DONE
    assert len(rest.started) == 12


def test_a_metric_that_is_not_logged_ends_the_sweep_after_the_first_trial(tmp_path):
    runner = FakeLauncher()
    with pytest.raises(UserError, match=r"val/lss is not a column of metrics.csv. Did you mean val/loss\?"):
        run_sweep(tmp_path, GRID, runner, metric="val/lss", direction="minimize")
    assert len(runner.finished) == 1


def test_a_metric_that_the_first_evaluation_does_not_log_ends_the_sweep(tmp_path):
    """The trial is still running; the row of a later step says that its first evaluation is complete."""
    definition = Sweep(question="", space={}, fixed=[], search="grid", n_trials=1, baseline={}, wandb_group="",
                       metric="mine/score", direction="maximize", points=[{}])  # fmt: skip
    rows = ["step,train/loss,val/loss", "1,3.0,", "2,,2.9"]
    assert missing_metric("mine/score", []) is None
    store = SweepStore(tmp_path, definition, lambda trial: True)
    callbacks = SimpleNamespace(components={})
    runner = SweepRunner(
        store, None, FakeLauncher(), lambda point: SimpleNamespace(callbacks=callbacks), SweeperConfig(**SETTINGS)
    )
    store.write(Trial(number=0, overrides={}, config_hash="", state="running"))
    for following, is_error in (([], False), (["2,2.8,"], False), (["3,2.7,"], True)):
        (tmp_path / "0" / "metrics.csv").write_text("\n".join([*rows, *following]) + "\n")
        runner._metric_check = 0.0
        with pytest.raises(UserError, match="mine/score is not a column") if is_error else contextlib.nullcontext():
            runner._check_metric()
    callbacks.components["mine"] = {"_target_": "mine.Score", "every": 100}
    runner._check_metric()  # it may record the metric later
    store.close()


@pytest.mark.parametrize(
    ("metric", "direction"),
    [
        *(("val/loss", "minimize"), ("wiki/loss", "minimize"), ("wiki/bits_per_byte", "minimize")),
        *(("hellaswag/acc_norm", "maximize"), ("mine/acc", "maximize"), ("tokens_per_second", "maximize")),
        *(("val/lss", None), ("loss", None), ("score", None)),
    ],
)
def test_known_metrics_have_a_direction(metric, direction):
    settings = SETTINGS | {"metric": metric, "direction": None}
    if direction is not None:
        assert validate(SweeperConfig, settings).resolved_direction == direction
    else:
        with pytest.raises(UserError, match=r"hydra\.sweeper\.direction=minimize or maximize"):
            validate(SweeperConfig, settings)
    assert validate(SweeperConfig, settings | {"direction": "maximize"}).resolved_direction == "maximize"


def test_newest_sweep_of_the_same_definition_is_resumed_or_extended(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    definition = Sweep(
        question="", space={"x": "1,2"}, fixed=[], search="grid", n_trials=2, baseline={}, wandb_group="",
        points=[{"x": "1"}, {"x": "2"}],
    )  # fmt: skip
    other = definition.model_copy(update={"fixed": ["y=1"]})
    extended = definition.model_copy(
        update={"space": {"x": "1,2,3"}, "n_trials": 3, "points": [{"x": "1"}, {"x": "2"}, {"x": "3"}]}
    )

    def find(sweep, is_current=True):
        return find_or_create_sweep_dir("name", sweep, lambda trial: is_current)

    first = find(definition)
    definition.save(first)
    assert find(definition) == find(extended) == first
    assert find(other) != first
    store = SweepStore(first, definition, lambda trial: True)
    for number in range(2):
        trial = json.loads('{"number": %d, "overrides": {}, "config_hash": "", "state": "done"}' % number)  # noqa: UP031
        store.write(sweep_runner.Trial(**trial))
    assert find(definition) != first
    assert find(extended) == first
    assert find(extended, is_current=False) != first  # a configuration file has changed
    for damage in (lambda path: path.write_text("{"), lambda path: path.unlink()):
        damage(first / "sweep.json")
        for sweep in (definition, other):
            with pytest.raises(UserError, match=r"sweep\.json (cannot be read|is missing).*Restore it"):
                find(sweep)
        with pytest.raises(UserError, match=r"sweep\.json (cannot be read|is missing)"):
            SweepStore(first, definition, lambda trial: True)
