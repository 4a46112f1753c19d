# ruff: noqa: F811  (fixtures)
"""Interaction with the report: filters, legend, tables, screen sizes, dark mode and live updates."""

import csv
import math

import pytest

from report_pages import (  # noqa: F401
    RATES,
    SEEDS,
    browser,
    column,
    report,
    seen,
    serving,
    sizes,
    sweep,
    write_report,
)
from run_directories import TOKENS, rows_of, running, write_run


def test_filters_act_on_charts_and_tables(seen, report):
    page = seen(report)

    def shown() -> tuple[int, set[str], int, int]:
        names = {trace["name"] for trace in page.traces("loss")}
        return (
            len(page.page.query_selector_all("#runs tbody tr")),
            names,
            len(page.page.query_selector_all("#config tbody tr")),
            len(page.page.query_selector_all("#samples .card")),
        )

    every = {f"lr={rate}" for rate in RATES}
    assert shown() == (10, every, 10, 3)  # one sample per point
    page.page.select_option("#sample-run", "")
    assert shown() == (10, every, 10, 9)
    page.page.fill("#search", "lr>0.001 seed=2")
    assert shown() == (2, {"lr=0.002", "lr=0.004"}, 2, 2)
    assert [trace["meta"]["kind"] for trace in page.traces("loss")] == ["run"] * 4
    assert page.text("#count") == "2 of 10 runs"
    page.page.fill("#search", "nothing like that")
    assert shown() == (0, set(), 0, 0)
    assert "No data" in page.text("#loss-caption")
    page.page.fill("#search", "diverged")
    assert shown()[0] == 1
    page.page.click("#reset")
    assert shown() == (10, every, 10, 9)
    page.page.click("#picks summary")
    page.page.uncheck("[data-pick='optimizer.lr=0.002']")
    page.page.uncheck("[data-pick='seed=1']")
    assert shown() == (5, {"lr=0.001", "lr=0.004"}, 5, 4)
    assert [trace["meta"]["kind"] for trace in page.traces("curve", "mean")] == ["mean"]
    assert page.traces("curve", "mean")[0]["x"] == [1e-3, 4e-3]


@pytest.mark.slow
def test_the_legend_hides_and_isolates_in_all_charts(seen, report):
    page = seen(report)
    page.page.click("#legend [data-point='1']")
    for chart in ("loss", "metric-0", "metric-1"):
        assert {trace["meta"]["point"] for trace in page.traces(chart)} == {0, 2}
    assert page.traces("curve", "mean")[0]["x"] == [1e-3, 4e-3]
    assert page.page.get_attribute("#legend [data-point='1']", "aria-pressed") == "false"
    page.page.click("#legend [data-point='1']")
    assert {trace["meta"]["point"] for trace in page.traces("loss")} == {0, 1, 2}
    page.page.dblclick("#legend [data-point='2']")
    assert {trace["meta"]["point"] for trace in page.traces("loss")} == {2}
    page.page.dblclick("#legend [data-point='2']")
    assert {trace["meta"]["point"] for trace in page.traces("loss")} == {0, 1, 2}
    page.page.uncheck("[data-part=singles]")
    page.page.uncheck("[data-part=train]")
    drawn = {(trace["meta"]["kind"], trace["meta"]["metric"]) for trace in page.traces("loss")}
    assert drawn == {("mean", "val/loss"), ("band", "val/loss")}


def test_the_table_of_runs_can_be_sorted_and_shows_states(seen, sweep, report):
    page = seen(report)
    page.page.click("[data-sort=best]")
    cells = page.page.eval_on_selector_all(
        "#runs tbody tr", "rows => rows.map(row => [...row.cells].map(cell => cell.innerText))"
    )
    best = [min(column(sweep / str(number), "val/loss")[1]) for number in range(10)]
    assert [row[0] for row in cells] == [f"trial {number}" for number in sorted(range(10), key=best.__getitem__)]
    assert {row[1] for row in cells} == {"✓ done", "✕ diverged"}
    assert f"{min(best):.4f}" in cells[0]


def test_samples_are_selected_by_run_and_step(seen, report):
    page = seen(report)
    assert "at 0.001 with 1, step 20" in page.text("#samples")
    page.page.evaluate(
        "() => { const s = document.getElementById('sample-step'); s.value = 1; s.dispatchEvent(new Event('input')); }"
    )
    assert page.text("#sample-at") == "10"
    assert "at 0.001 with 1, step 10" in page.text("#samples")
    assert "step 20" not in page.text("#samples")
    page.page.select_option("#sample-run", label="trial 4 · lr=0.002")
    assert page.page.eval_on_selector_all("#samples .card", "all => all.length") == 1
    assert "at 0.002 with 2, step 10" in page.text("#samples")


def test_differing_config_values_are_highlighted_and_the_rest_is_collapsed(seen, sweep, report):
    page = seen(report)
    assert page.page.eval_on_selector_all("#config thead th", "all => all.map(one => one.innerText)") == [
        "run",
        "seed",
        "optimizer.lr",
    ]

    def marked() -> set[str]:
        return set(page.page.eval_on_selector_all("#config .diff", "all => all.map(one => one.innerText)"))

    lowest = min(range(9), key=lambda number: min(column(sweep / str(number), "val/loss")[1]))
    seed = str(SEEDS[lowest % 3])
    assert marked() == {"0.001", "0.004", "1", "2", "3", "4"} - {seed}  # the best run has 0.002
    page.page.select_option("#reference", label="trial 0 · lr=0.001")
    assert marked() == {"0.002", "0.004", "2", "3", "4"}
    assert not page.page.is_visible("#common-table")
    page.page.click("#common summary")
    assert "schedule.warmup_steps" in page.text("#common-table")
    environment = page.text("#environment")
    for found in ("Some CPU, 2 cores", "0123456789abcdef", "1 file: M src/gptlab/model/gpt.py", "8.0 GiB"):
        assert found in environment


@pytest.mark.slow
def test_nothing_is_wider_than_the_screen(seen, report, sizes):
    for path in (report, write_report(sizes)):
        page = seen(path)
        page.page.evaluate("document.querySelectorAll('details:not(#picks)').forEach(one => { one.open = true; })")
        for width in (1280, 400, 320):
            page.page.set_viewport_size({"width": width, "height": 800})
            page.until("document.querySelector('#loss svg').clientWidth < innerWidth")
            widths = "[document.body, document.documentElement].map(one => one.scrollWidth)"
            assert max(page.page.evaluate(widths)) <= width
            right = "[...document.querySelectorAll('.chart')].map(one => one.getBoundingClientRect().right)"
            assert max(page.page.evaluate(right)) <= width


# every element with its own text, its color and its background; and the lines of the loss chart
COLORS = """() => {
  const ground = element => {
    for (let one = element; one; one = one.parentElement) {
      const color = getComputedStyle(one).backgroundColor;
      if (!/, 0\\)$|transparent/.test(color)) return color;
    }
    return getComputedStyle(document.documentElement).backgroundColor;
  };
  const texts = [...document.querySelectorAll('body *')].filter(element =>
    element.checkVisibility() && !element.closest('svg, script, style, button:disabled') &&
    [...element.childNodes].some(node => node.nodeType === 3 && node.data.trim()));
  const name = element => element.tagName + '.' + element.className;
  const found = texts.map(element => [name(element), getComputedStyle(element).color, ground(element)]);
  const svg = [...document.querySelectorAll('#loss text, #curve text, #metric-1 text')].filter(one => one.textContent);
  const words = svg.map(text => ['text of a chart', getComputedStyle(text).fill, ground(text.closest('.chart'))]);
  const isVal = trace => trace.meta.kind === 'mean' && trace.meta.metric === 'val/loss';
  const lines = document.getElementById('loss').data.filter(isVal);
  const behind = ground(document.getElementById('loss'));
  return [[...found, ...words], lines.map(trace => ['line', trace.line.color, behind])];
}"""


def luminance(color: str) -> float:
    """Relative luminance (WCAG 2.2)."""
    if color.startswith("#"):
        channels = [int(color[i : i + 2], 16) for i in (1, 3, 5)]
    else:
        channels = [int(float(part)) for part in color[color.index("(") + 1 : -1].split(",")[:3]]
    linear = [c / 255 / 12.92 if c / 255 <= 0.04045 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


def contrast(one: str, other: str) -> float:
    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


@pytest.mark.slow
def test_light_and_dark_mode_have_sufficient_contrast(seen, report):
    page = seen(report, color_scheme="light")
    grounds = []
    for scheme in ("light", "dark"):
        page.page.emulate_media(color_scheme=scheme)
        page.until("document.getElementById('loss').layout.font.color === color('text')")  # rendered again
        texts, lines = page.page.evaluate(COLORS)
        assert len(texts) > 100
        assert len(lines) == 3
        assert [found for found in texts if contrast(*found[1:]) < 4.5] == []
        assert [found for found in lines if contrast(*found[1:]) < 3] == []
        palette = page.page.evaluate("[...Array(COLORS).keys()].map(i => color(`c${i}`))")
        scale = page.page.evaluate("[...Array(21).keys()].map(i => onScale(i / 20))")
        card = page.page.evaluate("color('card')")
        assert [one for one in (*palette, *scale) if contrast(one, card) < 3] == []
        grounds.append((luminance(texts[0][2]), lines[0][1]))
    assert grounds[0][0] > 0.8 > 0.05 > grounds[1][0]
    assert grounds[0][1] != grounds[1][1]


def test_a_live_page_updates_and_keeps_the_selection(seen, tmp_path):
    for number, rate in enumerate((1e-3, 2e-3)):
        write_run(
            tmp_path / "runs" / str(number), settings={"optimizer.lr": rate}, rows=rows_of(10, lr=rate), **running()
        )
    with serving(tmp_path / "runs") as server:
        page = seen(server.url)
        page.page.fill("#search", "lr=0.002")
        page.page.evaluate("Plotly.relayout('loss', {'xaxis.range': [1000, 5000]})")
        page.page.check("[data-part=logY]")
        page.page.evaluate("Plotly.relayout('loss', {'xaxis.range': [1000, 5000]})")
        (before,) = (trace for trace in page.traces("loss") if trace["meta"]["metric"] == "train/loss")
        assert len(before["x"]) == 10
        with (tmp_path / "runs" / "1" / "metrics.csv").open("a", newline="") as file:
            csv.writer(file).writerow([11, 11 * TOKENS, 1.2345])  # step, tokens, train/loss
        page.until("document.getElementById('loss').data[0].x.length === 11")
        (after,) = (trace for trace in page.traces("loss") if trace["meta"]["metric"] == "train/loss")
        assert (after["x"][-1], after["y"][-1]) == (11 * TOKENS, 1.2345)
        assert {trace["name"] for trace in page.traces("loss")} == {"lr=0.002"}
        assert page.page.evaluate("document.getElementById('loss').layout.xaxis.range") == [1000, 5000]
        assert page.page.input_value("#search") == "lr=0.002"
        write_run(tmp_path / "runs" / "2", settings={"optimizer.lr": 4e-3}, rows=rows_of(3, lr=4e-3))
        page.until("document.getElementById('count').textContent === '1 of 3 runs'")
        assert page.page.inner_text("#live").startswith("live")
        assert {request.partition("?")[0] for request in page.requests} == {server.url, f"{server.url}data.json"}
    page.until("document.getElementById('live').textContent.includes('has stopped')")
    # the stopped server fails these requests
    page.complaints = [found for found in page.complaints if "Failed to load resource" not in found]
    assert math.isclose(page.traces("loss")[0]["y"][-1], 1.2345)
