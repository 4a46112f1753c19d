"""Listing of runs: finding, filtering, sorting and formatting."""

import csv
import io
import json
import time

import pytest
import yaml
from rich.console import Console

from gptlab.errors import UserError
from gptlab.tracking.run_store.listing import COLUMNS, Condition, format_csv, format_json, format_table, list_runs
from gptlab.tracking.run_store.runs import Run, find_runs
from gptlab.tracking.run_store.state import RunState


@pytest.fixture
def outputs(tmp_path):
    """Three runs: one done, one trial that diverged, and one trial without state.json."""

    def make(name, lr, n_layer, state, **values):
        directory = tmp_path / "outputs" / name
        directory.mkdir(parents=True)
        config = {"optimizer": {"lr": lr}, "model": {"n_layer": n_layer, "norm": "rms"}, "train": {"max_steps": 10}}
        (directory / "config.yaml").write_text(yaml.safe_dump(config))
        rows = "step,tokens,train/loss,val/loss\n5,50,3.5,\n5,50,,3.25\n10,100,3.0,nan\n"
        (directory / "metrics.csv").write_text(rows)
        if state:
            RunState(state=state, max_steps=10, updated=time.time() - 60, **values).save(directory)
        return directory

    make("a/2026-01-01_00-00-00", 1e-3, 2, "done", step=10, loss=2.0, best_val_loss=2.5, tokens_per_second=1234.0)
    make("s/2026-01-02_00-00-00/10", 2e-3, 6, "diverged", step=4, loss=9.0, message="why")
    make("s/2026-01-02_00-00-00/2", 4e-3, 6, None)
    return tmp_path / "outputs"


def lines(outputs, *conditions, sort="run", descending=False):
    found = list_runs(find_runs(str(outputs)), [Condition.parse(c) for c in conditions], sort, descending=descending)
    return [line["run"].partition("/")[0] + line["run"][-2:] for line in found]


def test_runs_are_found_at_any_depth_and_trials_in_order(outputs):
    names = [run.name for run in find_runs(str(outputs))]
    assert names == ["a/2026-01-01_00-00-00", "s/2026-01-02_00-00-00/2", "s/2026-01-02_00-00-00/10"]
    assert [run.name for run in find_runs(str(outputs / "s" / "*" / "1*"))] == ["s/2026-01-02_00-00-00/10"]
    (outputs / "a").rename(outputs / "a[1]")
    assert [run.name for run in find_runs(str(outputs / "a[1]"))] == ["a[1]/2026-01-01_00-00-00"]
    with pytest.raises(UserError, match="it does not exist"):
        find_runs(str(outputs / "none"))
    (outputs / "empty").mkdir()
    with pytest.raises(UserError, match=r"no run directory \(with a config.yaml\)"):
        find_runs(str(outputs / "empty"))


@pytest.mark.parametrize(
    ("conditions", "expected"),
    [
        (["state=done"], ["a00"]),
        (["state!=done"], ["s10", "s/2"]),
        (["optimizer.lr>=2e-3"], ["s10", "s/2"]),
        (["optimizer.lr = 0.002"], ["s10"]),
        (["optimizer.lr<4e-3", "model.n_layer>2"], ["s10"]),
        (["model.norm=rms", "step>=10"], ["a00", "s/2"]),
        (["model.norm>3"], []),
    ],
)
def test_runs_are_filtered_by_column_and_key(outputs, conditions, expected):
    assert sorted(lines(outputs, *conditions)) == sorted(expected)


def test_runs_are_sorted_and_those_without_a_value_come_last(outputs):
    assert lines(outputs, sort="optimizer.lr", descending=True) == ["s/2", "s10", "a00"]
    assert lines(outputs, sort="val_loss") == ["a00", "s/2", "s10"]
    assert lines(outputs, sort="val_loss", descending=True) == ["s/2", "a00", "s10"]


@pytest.mark.parametrize(
    ("condition", "sentence"),
    [
        ("optimizer.lr", "filter=optimizer.lr is not valid"),
        ("=3", "filter==3 is not valid"),
        ("optimizer.rl=1", "optimizer.lr"),
    ],
)
def test_an_invalid_condition_is_an_error(outputs, condition, sentence):
    with pytest.raises(UserError, match=sentence):
        lines(outputs, condition)


def test_a_run_without_a_state_is_listed_from_its_metrics(outputs):
    (line,) = list_runs(find_runs(str(outputs / "s" / "*" / "2")), [], "run", descending=False)
    assert (line["state"], line["step"], line["loss"], line["val_loss"]) == ("?", 10, 3.0, 3.25)


def test_the_list_is_formatted_as_table_csv_and_json(outputs):
    found = list_runs(find_runs(str(outputs)), [], "run", descending=False)
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(format_table(found[:2], [*COLUMNS, "model.norm"], left_out=1))
    text = console.export_text()
    assert "4/10" in text
    assert "1,234" in text
    assert "and 1 more (limit)" in text
    rows = list(csv.DictReader(io.StringIO(format_csv(found, ["run", "val_loss", "optimizer.lr"]))))
    assert [(row["val_loss"], row["optimizer.lr"]) for row in rows] == [
        ("2.5", "0.001"),
        ("", "0.002"),
        ("3.25", "0.004"),
    ]
    assert json.loads(format_json(found, ["step"])) == [{"step": 10}, {"step": 4}, {"step": 10}]


def test_series_and_values_skip_missing_and_nan_values(outputs):
    run = Run(outputs / "a" / "2026-01-01_00-00-00")
    assert run.series("val/loss")[0] == [5, 10]
    assert run.value() == 3.25
    assert run.value("train/loss", "last") == 3.0
    assert run.value("grad_norm") is None
