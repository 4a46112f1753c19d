# ruff: noqa: F811  (fixtures)
"""The report in a browser: charts have the data of the runs, and strings of runs are shown as text."""

import json

import numpy as np
import pytest

from gptlab.reporting.document import ReportDocument
from gptlab.reporting.page import render_page
from gptlab.sweeps.analysis.scaling_report import ScalingAnswer, write_scaling
from gptlab.sweeps.analysis.table import analyze_sweep
from report_pages import (  # noqa: F401
    HOSTILE,
    RATES,
    SEEDS,
    browser,
    column,
    report,
    seen,
    sizes,
    sweep,
    write_report,
)
from run_directories import TOKENS, rows_of, write_metrics, write_run, write_sweep


def test_a_page_from_disk_makes_no_requests(seen, sweep, report):
    page = seen(report)
    page.page.wait_for_timeout(300)
    assert page.requests == [report.as_uri()]
    assert page.text("#title") == "lr/now"
    assert analyze_sweep(sweep).answer in page.text("#answers .answer")
    assert len(page.page.query_selector_all("#answers tbody tr")) == len(RATES)


def test_the_loss_chart_has_the_mean_and_band_of_the_seeds(seen, sweep, report):
    page = seen(report)
    flops = page.page.evaluate("DATA.runs[0].flops")
    for axis, factor in (("flops", flops), ("step", 1 / TOKENS), ("tokens", 1)):
        page.page.check(f"input[name=axis][value={axis}]")
        for metric in ("train/loss", "val/loss"):
            means, bands = (
                {t["meta"]["point"]: t for t in page.traces("loss", kind) if t["meta"]["metric"] == metric}
                for kind in ("mean", "band")
            )
            assert len(means) == len(bands) == len(RATES)
            for point, rate in enumerate(RATES):
                columns = [column(sweep / str(len(SEEDS) * point + seed), metric) for seed in range(len(SEEDS))]
                x = [tokens * factor for tokens in columns[0][0]]
                values = list(zip(*(values for _, values in columns), strict=True))
                assert means[point]["name"] == f"lr={rate}"
                assert means[point]["x"] == pytest.approx(x)
                assert means[point]["y"] == pytest.approx([sum(at) / len(at) for at in values], rel=1e-6)
                assert bands[point]["x"] == pytest.approx([*x, *reversed(x)])
                high, low = [max(at) for at in values], [min(at) for at in values]
                assert bands[point]["y"] == pytest.approx([*high, *reversed(low)], rel=1e-6)


def test_the_y_range_is_that_of_the_loss_after_the_first_tenth(seen, sweep, report):
    page = seen(report)
    late = [loss for n in range(9) for loss in column(sweep / str(n), "train/loss")[1][2:]]  # of 20
    late += [loss for n in range(9) for loss in column(sweep / str(n), "val/loss")[1]]
    low, high = page.page.evaluate("document.getElementById('loss').layout.yaxis.range")
    highest = max(loss for n in range(9) for loss in column(sweep / str(n), "train/loss")[1])
    assert low < min(late) < max(late) < high < highest
    page.page.check("[data-part=whole]")
    assert page.page.evaluate("document.getElementById('loss').layout.yaxis.range")[1] > highest


def test_an_early_spike_of_another_metric_is_above_the_visible_range(seen, tmp_path):
    rows = rows_of(40)
    for row in rows:
        row["grad_norm"] = 1e6 if row["step"] == 1 else 1 + row["step"] % 2
    write_run(tmp_path / "run", rows=rows)
    page = seen(write_report(tmp_path))
    chart = "document.querySelector('[data-metric=grad_norm]')"
    assert 2 < page.page.evaluate(f"{chart}.layout.yaxis.range[1]") < 3
    page.page.check("[data-part=whole]")
    page.until(f"{chart}.layout.yaxis.range[1] > 9e5")


def test_the_table_of_runs_has_the_varied_keys(seen, sweep, report):
    page = seen(report)
    heads = page.page.eval_on_selector_all("#runs thead th", "heads => heads.map(head => head.textContent)")
    place = heads.index("lr")
    shown = page.page.eval_on_selector_all("#runs tbody tr", f"rows => rows.map(row => row.cells[{place}].textContent)")
    assert [float(rate) for rate in shown] == [*(rate for rate in RATES for _ in SEEDS), RATES[0]]


@pytest.mark.parametrize("width", [1280, 400])
def test_rows_of_the_tables_are_a_line_high(seen, tmp_path, width):
    score = {"score": {name: {"ratio": 1.0625} for name in ("parameters", "seconds", "peak_memory_bytes")}}
    directory = write_sweep(tmp_path / "lr" / "now", RATES, SEEDS)
    for number in range(9):
        (directory / str(number) / "forecast.json").write_text(json.dumps(score))
    page = seen(write_report(directory), viewport={"width": width, "height": 900})
    assert "memory ×1.063" in page.text("#runs")
    heights = page.page.eval_on_selector_all(
        "#runs tbody tr, #answers tbody tr", "rows => rows.map(row => row.offsetHeight)"
    )
    assert max(heights) < 45


def test_the_toolbar_of_a_chart_is_above_its_curves(seen, sweep, report):
    page = seen(report)
    page.page.hover("#loss")
    bottom = "document.querySelector('#loss .modebar-group').getBoundingClientRect().bottom"
    assert page.page.evaluate(f"{bottom} <= document.querySelector('#loss .nsewdrag').getBoundingClientRect().top")


def test_the_time_axis_is_training_time(seen, sweep, report):
    page = seen(report)
    page.page.check("input[name=axis][value=time]")
    tokens, speed = column(sweep / "0", "tokens_per_second")
    seconds, total, before = [], 0.0, 0.0
    for at, rate in zip(tokens, speed, strict=True):
        total, before = total + (at - before) / rate, at
        seconds.append(total)
    singles = next(
        t for t in page.traces("loss", "runs") if t["meta"] == {"point": 0, "metric": "train/loss", "kind": "runs"}
    )
    assert singles["x"][: len(seconds)] == pytest.approx(seconds, rel=1e-6)
    assert singles["y"][: len(seconds)] == pytest.approx(column(sweep / "0", "train/loss")[1], rel=1e-6)
    assert "training only" in page.text("#loss-caption")


def test_every_other_metric_has_a_chart(seen, sweep, report):
    page = seen(report)
    charts = page.page.eval_on_selector_all("#training .chart", "all => all.map(one => [one.id, one.dataset.metric])")
    assert {metric for _, metric in charts} == {
        *("val/bits_per_byte", "tokens_per_second", "peak_memory_gb", "grad_norm", "lr", "data_wait")
    }
    for chart, metric in charts:
        singles = next(t for t in page.traces(chart, "runs") if t["meta"]["point"] == 2)
        x, y = column(sweep / "6", metric)
        assert singles["x"][: len(x)] == pytest.approx(x)
        assert singles["y"][: len(x)] == pytest.approx(y, rel=1e-6)


def test_the_varied_key_is_drawn_with_its_best_point(seen, sweep, report):
    page = seen(report)
    lowest = [
        [min(column(sweep / str(len(SEEDS) * p + s), "val/loss")[1]) for s in range(len(SEEDS))] for p in range(3)
    ]
    (mean,) = page.traces("curve", "mean")
    assert mean["x"] == list(RATES)
    assert mean["y"] == pytest.approx([sum(values) / len(values) for values in lowest], rel=1e-6)
    (singles,) = page.traces("curve", "runs")
    assert singles["y"] == pytest.approx([value for values in lowest for value in values], rel=1e-6)
    (best,) = page.traces("curve", "best")
    assert best["x"] == [2e-3]
    assert page.page.evaluate("document.getElementById('curve').layout.xaxis.type") == "log"
    assert "★ lowest mean" in page.text("#curve-caption")
    assert "Omitted: 1 run (1 diverged)." in page.text("#curve-caption")
    assert not page.page.is_visible("#parallel-figure")
    assert not page.page.is_visible("#scaling-section")


def test_several_varied_keys_are_parallel_coordinates_and_sizes_a_scaling_chart(seen, sizes):
    page = seen(write_report(sizes))
    drawn = page.traces("parallel")
    assert len(drawn) == 12
    assert {tuple(trace["y"]) for trace in drawn} == {(0, 1, 2, 3)}
    of_first = next(
        trace for trace in drawn if trace["meta"]["point"] == 0
    )  # 1e-3, 32 wide, 10 steps: the lowest of each
    assert of_first["x"][:3] == [0, 0, 0]
    of_last = next(trace for trace in drawn if trace["meta"]["point"] == 11)
    assert of_last["x"][:3] == [1, 1, 1]
    page.page.select_option("#curve-key", "optimizer.lr")
    assert len(page.traces("curve", "mean")) == 6
    scaled = page.traces("scaling", "runs")
    assert [len(trace["x"]) for trace in scaled] == [4, 4, 4]
    flops = page.page.evaluate("DATA.runs[0].flops")
    assert scaled[0]["x"] == pytest.approx([10 * TOKENS * flops] * 2 + [20 * TOKENS * flops] * 2)
    assert "No scaling law was fitted." in page.text("#scaling-caption")


def test_a_fitted_scaling_law_is_drawn(seen, sizes, tmp_path):
    sweep = write_sweep(tmp_path / "scaling" / "now", (1e-3,), (1,))
    fit = {"E": 1.69, "A": 406.4, "B": 410.7, "alpha": 0.34, "beta": 0.28}
    more = {"residual": 0.01, "runs": [], "optima": [], "answer": "the best N grows as C^0.45"}
    write_scaling(ScalingAnswer(law=fit, intervals={"E": (1.6, 1.8)}, **more), sweep)
    page = seen(write_report(sweep))
    (curve,) = page.traces("scaling", "fit")
    parameters = page.page.evaluate("DATA.runs[0].parameters")
    tokens = [x / 6 / parameters for x in curve["x"]]
    expected = [1.69 + 406.4 / parameters**0.34 + 410.7 / count**0.28 for count in tokens]
    assert curve["y"] == pytest.approx(expected)
    assert page.traces("scaling", "runs")[0]["x"] == [6 * parameters * 20 * TOKENS]
    assert "E = 1.69 (1.6 to 1.8), A = 406.4, B = 410.7" in page.text("#scaling-caption")
    (frontier,) = page.traces("scaling", "frontier")
    for compute, loss in zip(
        frontier["x"], frontier["y"], strict=True
    ):  # no model size has a lower loss at this compute
        others = (10 ** (i / 20) for i in range(20, 240))
        lowest = min(1.69 + 406.4 / n**0.34 + 410.7 / (compute / 6 / n) ** 0.28 for n in others)
        assert loss == pytest.approx(lowest, rel=1e-3)
        assert loss <= lowest


def test_strings_of_runs_are_shown_as_text(seen, tmp_path):
    sweep = write_sweep(tmp_path / f"{HOSTILE.replace('/', '')}" / "now", (1e-3, 2e-3), (1,))
    rows = [{**row, f"<b>{HOSTILE}</b>": 1.0} for row in rows_of(6)]
    settings = {"data.source": HOSTILE, "name": HOSTILE, "optimizer.lr": 3e-3}
    write_run(
        sweep / "2",
        settings=settings,
        samples={5: HOSTILE},
        message=HOSTILE,
        state="failed",
        environment={"command": HOSTILE},
    )
    write_metrics(sweep / "2", rows)
    record = json.loads((sweep / "sweep.json").read_text())
    (sweep / "sweep.json").write_text(json.dumps(record | {"question": HOSTILE}))
    trial = json.loads((sweep / "1" / "trial.json").read_text())
    trial |= {"number": 2, "overrides": {HOSTILE: HOSTILE, "seed": "1"}, "message": HOSTILE}
    (sweep / "2" / "trial.json").write_text(json.dumps(trial))
    (sweep / "3").mkdir()
    (sweep / "3" / "trial.json").write_text(json.dumps(trial | {"number": 3, "state": "config_error", "value": None}))
    page = seen(write_report(sweep))
    assert page.page.evaluate("window.broken") is None
    assert page.page.evaluate("document.querySelectorAll('img, main b, #answers b, header b').length") == 0
    assert page.text("#answers h2") == HOSTILE
    assert HOSTILE in page.text("#samples")
    names = {trace["name"] for trace in page.traces("loss")}
    assert all("<" not in name for name in names)


def test_the_mean_and_band_of_long_curves_are_those_of_equal_steps(seen, tmp_path):
    """Against metrics.csv: the curves are thinned, but not the values that are averaged."""
    random = np.random.default_rng(1)
    for seed, steps in ((1, 5000), (2, 5000), (3, 4000)):
        noise = random.normal(0, 0.05, steps)
        rows = [
            {**rows_of(1)[0], "step": i, "tokens": i * TOKENS, "train/loss": 3 + noise[i - 1]}
            for i in range(1, steps + 1)
        ]
        write_run(tmp_path / "runs" / str(seed), settings={"seed": seed}, rows=rows)
    path = tmp_path / "report.html"
    path.write_text(render_page(ReportDocument(str(tmp_path), 200).gather(), poll=None))
    page = seen(path)
    losses = np.array([column(tmp_path / "runs" / str(seed), "train/loss")[1][:4000] for seed in (1, 2, 3)])
    speeds = np.array([column(tmp_path / "runs" / str(seed), "tokens_per_second")[1][:4000] for seed in (1, 2, 3)])
    for axis, x_of in (
        ("step", np.arange(1, 4001)),
        ("tokens", np.arange(1, 4001) * TOKENS),
        ("time", np.cumsum(TOKENS / speeds, axis=1).mean(axis=0)),
    ):
        page.page.check(f"input[name=axis][value={axis}]")
        (mean,), (band,) = page.traces("loss", "mean"), page.traces("loss", "band")
        unit = 60 if axis == "time" and "minutes" in page.page.evaluate("timeUnit()[2]") else 1
        places = np.abs(np.subtract.outer(np.array(mean["x"]) * unit, x_of)).argmin(axis=1)
        assert len(places) > 50
        assert places[-1] >= 3900
        assert mean["y"] == pytest.approx(losses.mean(axis=0)[places], abs=2e-6)
        assert band["y"] == pytest.approx([*losses.max(axis=0)[places], *losses.min(axis=0)[places][::-1]], abs=2e-6)


@pytest.mark.parametrize("state", ["diverged", "pruned", "failed"])
def test_runs_that_ended_early_have_no_lowest_value(seen, tmp_path, state):
    sweep = write_sweep(tmp_path / "lr" / "now", (1e-3, 4e-3), (1, 2))
    lowest = min(min(column(sweep / str(n), "val/loss")[1]) for n in range(4))
    low = [{**row, **({"val/loss": 0.5} if "val/loss" in row else {})} for row in rows_of(20)]
    write_run(sweep / "4", settings={"optimizer.lr": 2e-3, "seed": 1}, rows=low, state=state)
    page = seen(write_report(sweep))
    assert f"{lowest:.4f}" in page.text("#tiles")
    assert "0.5000" not in page.text("#tiles")
    assert "★ trial 4" not in page.text("#config")
