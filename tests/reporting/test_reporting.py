"""Data of the report: downsampled curves, grouping of runs into points, and unreadable files."""

import csv
import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest

from gptlab.errors import UserError
from gptlab.model.config import GPTConfig
from gptlab.reporting import reading
from gptlab.reporting.document import ReportDocument
from gptlab.reporting.page import render_page, to_script_json
from gptlab.reporting.series import curves, downsample, training_seconds
from gptlab.tracking.run_store.sweeps import Trial
from run_directories import ENVIRONMENT, TOKENS, rows_of, write_metrics, write_run, write_sweep


def gathered(where, points: int = 1000):
    return ReportDocument(str(where), points).gather()


def test_a_downsampled_curve_keeps_its_ends_and_extremes():
    values = [math.sin(i / 700) + (5 if i == 3333 else -5 if i == 7777 else 0) for i in range(10_000)]
    places = downsample(range(1, 10_001), values, 100)
    assert len(places) <= 100
    assert places == sorted(set(places))
    assert {0, 3333, 7777, 9999} <= set(places)
    for start in range(0, 10_000, 2000):  # in any range much longer than a segment
        kept = [values[place] for place in places if start <= place < start + 2000]
        assert max(kept) == pytest.approx(max(values[start : start + 2000]), abs=0.25)
        assert min(kept) == pytest.approx(min(values[start : start + 2000]), abs=0.25)
    assert downsample([1, 2, 3], [3.0, 1.0, 2.0], 6) == [0, 1, 2]


def test_downsampling_prefers_finite_values_to_nan():
    values = [math.nan if i % 3 else float(i) for i in range(1000)]
    places = downsample(range(1000), values, 50)
    assert sum(math.isfinite(values[place]) for place in places) >= len(places) - 2
    assert len(downsample(range(1000), [math.nan] * 1000, 50)) == 26  # one per segment, and the ends


def test_downsampled_runs_of_any_length_have_half_of_their_steps_in_common():
    values = np.random.default_rng(1).normal(size=(2, 9000)).tolist()
    steps = [10 * (i + 1) for i in range(9000)]
    short, long = (
        {steps[place] for place in downsample(steps[:length], own[:length], 100)}
        for own, length in zip(values, (1800, 9000), strict=True)
    )
    within = {step for step in long if step <= 18_000}
    assert len(short & within) >= len(within) / 3
    assert len(downsample(steps, values[0], 100)) > 60


def test_best_value_of_a_run_is_in_the_direction_of_the_sweep(tmp_path):
    directory = write_sweep(tmp_path / "lr" / "now", rates=(1e-3, 2e-3), seeds=(1,))
    for direction, best in (("minimize", min), ("maximize", max)):
        definition = json.loads((directory / "sweep.json").read_text()) | {"direction": direction}
        (directory / "sweep.json").write_text(json.dumps(definition))
        found = gathered(directory)
        assert found["maximized"] == (direction == "maximize")
        for number, run in enumerate(found["runs"]):
            rows = csv.DictReader((directory / str(number) / "metrics.csv").read_text().splitlines())
            values = [float(row["val/loss"]) for row in rows if row["val/loss"]]
            assert len(set(values)) > 1
            assert run["best"]["value"] == pytest.approx(best(values))


def test_means_and_ranges_over_seeds_are_those_of_the_rows(tmp_path):
    """Against NumPy, from metrics.csv: at every step that all thinned curves have, the values are those of the rows."""
    rng = np.random.default_rng(2)
    for seed in range(3):
        rows = [
            {"step": step, "tokens": step * TOKENS, "train/loss": 3 - step / 9000 + rng.normal(0, 0.05)}
            for step in range(1, 5001)
        ]
        write_run(tmp_path / "runs" / str(seed), settings={"seed": seed}, rows=rows)
    found = gathered(tmp_path, points=200)
    drawn = [run["series"]["train/loss"] for run in found["runs"]]
    assert all(len(curve["step"]) <= 200 for curve in drawn)
    common = sorted(set.intersection(*(set(curve["step"]) for curve in drawn)))
    assert len(common) >= 70
    assert max(np.diff(common)) <= 5000 / 70 * 1.5
    raw = [np.loadtxt(tmp_path / "runs" / str(seed) / "metrics.csv", delimiter=",", skiprows=1) for seed in range(3)]
    losses = np.array([run[np.searchsorted(run[:, 0], common), 2] for run in raw])
    shown = np.array(
        [[dict(zip(curve["step"], curve["value"], strict=True))[step] for step in common] for curve in drawn]
    )
    assert shown.mean(axis=0) == pytest.approx(losses.mean(axis=0), rel=1e-6)
    assert np.ptp(shown, axis=0) == pytest.approx(np.ptp(losses, axis=0), abs=1e-5)


def test_time_is_tokens_over_throughput():
    rows = [
        {"step": 1, "tokens": 100, "tokens_per_second": 50.0},
        {"step": 2, "tokens": 200, "tokens_per_second": 200.0},
        {"step": 3, "tokens": 300, "val/loss": 1.0},  # half-way to the next row with a throughput
        {"step": 4, "tokens": 400, "tokens_per_second": 20.0},
        {"step": 4, "tokens": 400, "val/loss": 1.0},
    ]
    assert training_seconds(rows) == pytest.approx([2.0, 2.5, 7.5, 12.5, 12.5])


def test_curves_equal_the_rows_with_nan_as_none():
    rows = rows_of(10)
    rows[3]["train/loss"] = math.nan
    found = curves(rows, 1000)
    train = [row for row in rows if "train/loss" in row]
    assert found["train/loss"]["step"] == [row["step"] for row in train]
    assert found["train/loss"]["tokens"] == [row["tokens"] for row in train]
    assert found["train/loss"]["value"][3] is None
    others = [value for i, value in enumerate(found["train/loss"]["value"]) if i != 3]
    assert others == pytest.approx([row["train/loss"] for i, row in enumerate(train) if i != 3], rel=1e-6)
    assert found["val/loss"]["step"] == [5, 10]
    assert not {"step", "tokens"} & set(found)


def test_runs_that_differ_only_in_the_seed_are_one_point(tmp_path):
    write_sweep(tmp_path / "lr" / "now", rates=(1e-3, 2e-3), seeds=(1, 2, 3))
    found = gathered(tmp_path / "lr" / "now")
    assert found["keys"] == ["seed", "optimizer.lr"]
    assert found["varied"] == ["optimizer.lr"]
    assert found["points"] == ["lr=0.001", "lr=0.002"]
    assert [run["point"] for run in found["runs"]] == [0, 0, 0, 1, 1, 1]
    assert [run["seed"] for run in found["runs"]] == [1, 2, 3] * 2
    (sweep,) = found["sweeps"]
    assert (sweep["question"], sweep["trials"], sweep["without_run"]) == ("Which learning rate is best?", 6, [])


def test_a_run_is_described_by_its_own_files(tmp_path):
    directory = write_run(tmp_path / "quickstart" / "now", samples={5: "early", 10: "late"})
    found = gathered(tmp_path)
    (run,) = found["runs"]
    assert run["name"] == "quickstart/now"
    # GPT-2's layout with biases: two LayerNorms and four linear layers per block, a tied head of 257 rows
    model = GPTConfig.model_validate(
        ReportDocument(str(tmp_path), 10).reader.read([directory])[0][0].run.config["model"]
    )
    C, L, V, T = model.n_embd, model.n_layer, 257, model.block_size
    blocks = L * (12 * C * C + 9 * C + 4 * C) + 2 * C
    assert run["parameters"] == V * C + T * C + blocks
    assert run["flops"] == 6 * (V * C + blocks) + 12 * L * C * T
    lowest = min((row for row in rows_of(20) if "val/loss" in row), key=lambda row: row["val/loss"])
    assert run["best"] == {
        "value": pytest.approx(lowest["val/loss"], rel=1e-6),
        "step": lowest["step"],
        "tokens": lowest["step"] * TOKENS,
    }
    assert run["samples"] == [(5, "early"), (10, "late")]
    assert (run["state"]["state"], run["state"]["seconds"]) == ("done", 12.5)
    assert found["environments"][run["environment"]]["packages"] == ENVIRONMENT["packages"]
    assert (run["start"]["command"], found["keys"], found["points"]) == ("python -m gptlab.train", [], ["quickstart"])
    assert found["common"]["optimizer.lr"] == 2e-3  # from conf/model/nano.yaml


def test_unreadable_files_are_reported_and_the_rest_is_shown(tmp_path):
    good = write_run(tmp_path / "runs" / "good", samples={5: "text\n"})
    (good / "samples" / "step_000009.txt").write_bytes(b"\xff\xfe\xff")
    (write_run(tmp_path / "runs" / "bytes") / "metrics.csv").write_bytes(b"\x89PNG\xff\x00")
    (write_run(tmp_path / "runs" / "prose") / "metrics.csv").write_text("once upon a time\n")
    (write_run(tmp_path / "runs" / "config") / "config.yaml").write_text("{")
    metrics = write_run(tmp_path / "runs" / "folder") / "metrics.csv"
    metrics.unlink()
    metrics.mkdir()
    write_run(tmp_path / "runs" / "begun", settings={"seed": 3}, rows=[])
    found = gathered(tmp_path / "runs")
    assert [run["name"] for run in found["runs"]] == ["begun", "good"]
    problems = "\n".join(found["problems"])
    assert len(found["problems"]) == 5
    for name in ("bytes", "prose", "config", "folder"):
        assert re.search(rf"runs/{name} is omitted: .*{name}.* cannot be read", problems), problems
    assert re.search(r"runs/good: \S*step_000009.txt cannot be read: it is not UTF-8 text", problems)


def test_damaged_files_of_a_run_that_is_shown_are_reported(tmp_path):
    run = write_run(tmp_path / "runs" / "one", samples={5: "cut"})
    (run / "metrics.csv").unlink()
    for name in ("state.json", "environment.json", "forecast.json"):
        (run / name).write_text('{"step": ')
    (run / "config.yaml").write_text((run / "config.yaml").read_text().rstrip())
    found = gathered(tmp_path / "runs")
    assert [run["name"] for run in found["runs"]] == ["runs/one"]
    assert found["runs"][0]["samples"] == [(5, "cut")]
    named = [re.fullmatch(r"runs/one: \S*/(\S+) (is truncated|cannot be read): .*", one) for one in found["problems"]]
    files = {"step_000005.txt", "config.yaml", "state.json", "environment.json", "forecast.json"}
    assert {match[1] for match in named if match} == files
    assert len(named) == len(files)
    (run / "state.json").write_text('{"step": 3}')
    assert any("metrics.csv has no rows" in problem for problem in gathered(tmp_path / "runs")["problems"])


def test_a_report_without_readable_runs_is_an_error(tmp_path):
    (write_run(tmp_path / "runs" / "one") / "config.yaml").write_text("{")
    with pytest.raises(UserError, match=r"none of the runs can be read\.\nruns/one is omitted"):
        gathered(tmp_path / "runs")
    with pytest.raises(UserError, match="it does not exist"):
        gathered(tmp_path / "nothing")


def test_sweep_data_includes_trials_without_a_run(tmp_path):
    directory = write_sweep(tmp_path / "lr" / "now", rates=(1e-3,), seeds=(1,))
    (directory / "scaling.json").write_text("no json")
    Trial(number=1, overrides={"optimizer.lr": "9"}, config_hash="x", state="config_error", message="too large").save(
        directory
    )
    found = gathered(directory)
    (sweep,) = found["sweeps"]
    assert [(trial["number"], trial["message"]) for trial in sweep["without_run"]] == [(1, "too large")]
    assert any("scaling.json cannot be read" in problem for problem in found["problems"])


def test_sweep_results_equal_those_in_the_terminal(tmp_path):
    directory = write_sweep(tmp_path / "lr" / "now", rates=(1e-3, 2e-3), seeds=(1, 2))
    answers = gathered(directory)["sweeps"][0]["answers"]
    assert answers["columns"] == ["optimizer.lr", "seeds", "val/loss", "difference", "verdict", "tokens"]
    (best, *_), (other, *_) = answers["rows"]
    assert (best, other) == ("0.002", "0.001")
    lowest = [
        [min(row.get("val/loss", 9) for row in rows_of(20, lr=lr, seed=seed)) for seed in (1, 2)] for lr in (2e-3, 1e-3)
    ]
    means = [sum(values) / 2 for values in lowest]
    losses = [row[2] for row in answers["rows"]]
    assert [float(text.split(" ± ")[0]) for text in losses] == pytest.approx(means, abs=1e-3)
    assert [float(text.split(" ± ")[1]) for text in losses] == pytest.approx(
        [abs(one - another) / 2 for one, another in lowest], rel=0.1
    )
    trial = json.loads((directory / "0" / "trial.json").read_text())
    (directory / "0" / "trial.json").write_text(json.dumps(trial | {"state": "failed", "value": None}))
    answers = gathered(directory)["sweeps"][0]["answers"]
    failed = answers["columns"].index("failed")
    assert [row[failed] for row in answers["rows"]] == [None, 1]


def test_points_per_curve_and_samples_per_run_are_limited(tmp_path):
    rows = rows_of(400, eval_every=400)
    for number in range(3):
        write_run(
            tmp_path / "many" / str(number),
            settings={"seed": number},
            rows=rows,
            samples=dict.fromkeys(range(60), "x" * 9000),
        )
    found = gathered(tmp_path / "many", points=100)
    assert found["thinned"]
    assert all(90 <= len(run["series"]["train/loss"]["value"]) <= 100 for run in found["runs"])
    assert [step for step, _ in found["runs"][0]["samples"]] == sorted({round(i * 59 / 23) for i in range(24)})
    assert all(len(text) == reading.LONGEST_SAMPLE + 2 for _, text in found["runs"][0]["samples"])
    assert not gathered(tmp_path / "many", points=1000)["thinned"]


def test_a_run_is_read_again_only_when_its_files_change(tmp_path, monkeypatch):
    first, second = (write_run(tmp_path / "runs" / str(i), settings={"seed": i}) for i in range(2))
    read = []
    monkeypatch.setattr(
        reading, "_read", lambda run, *rest, was=reading._read: read.append(run.directory) or was(run, *rest)
    )
    document = ReportDocument(str(tmp_path / "runs"), 1000)
    document.gather()
    document.gather()
    assert read == [first, second]
    write_metrics(second, rows_of(30))
    assert document.gather()["runs"][1]["series"]["train/loss"]["step"][-1] == 30
    assert read == [first, second, second]


HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>&<!--\u2028"


class Scripts(HTMLParser):
    """Parses a page like a browser: its elements, and the content of its scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.scripts: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.lasttag == "script" and self.scripts:
            self.scripts[-1] += data


def test_strings_of_runs_cannot_escape_the_embedded_data(tmp_path):
    write_run(tmp_path / "runs" / "0", settings={"data.source": HOSTILE}, samples={5: HOSTILE}, message=HOSTILE)
    write_run(tmp_path / "runs" / "1", settings={"seed": 9}, environment={"command": HOSTILE})
    document = gathered(tmp_path / "runs")
    seen = Scripts()
    seen.feed(render_page(document, poll=None))
    scripts = [attributes for tag, attributes in seen.elements if tag == "script"]
    assert [attributes.get("id") for attributes in scripts] == ["data", None, None]
    assert "img" not in {tag for tag, _ in seen.elements}
    assert json.loads(seen.scripts[0])["runs"][0]["samples"] == [[5, HOSTILE]]
    (policy,) = (attributes["content"] for tag, attributes in seen.elements if attributes.get("http-equiv"))
    assert "default-src 'none'" in policy
    assert "connect-src 'none'" in policy
    assert "script-src 'sha256-" in policy
    assert "unsafe" not in policy.partition("script-src")[2]


def test_embedded_json_has_no_markup_and_no_nan():
    text = to_script_json({"a": [HOSTILE, math.nan, {"b": -math.inf}], "c": "\ud800"})
    assert not set("<>&\u2028") & set(text)
    assert json.loads(text) == {"a": [HOSTILE, None, {"b": None}], "c": "?"}
