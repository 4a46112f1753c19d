"""Fixtures of the tests of the report page: sweeps, a browser and a server."""

import csv
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from chromium import Seen, chromium, unavailable_reason
from gptlab.reporting.document import ReportDocument
from gptlab.reporting.live import LiveServer
from gptlab.reporting.page import render_page
from run_directories import rows_of, write_run, write_sweep

RATES, SEEDS = (1e-3, 2e-3, 4e-3), (1, 2, 3)
HOSTILE = "<script>window.broken = 1</script><img src=x onerror='window.broken = 2'><b>bold</b>"


@pytest.fixture(scope="module")
def browser():
    if reason := unavailable_reason():
        pytest.skip(reason)
    with chromium() as browser:
        yield browser


@pytest.fixture(scope="module")
def sweep(tmp_path_factory) -> Path:
    """Sweep over three learning rates and three seeds, with one more trial that diverged."""
    directory = write_sweep(tmp_path_factory.mktemp("page") / "lr" / "now", RATES, SEEDS)
    write_run(
        directory / "9",
        settings={"optimizer.lr": 1e-3, "seed": 4},
        rows=rows_of(7, seed=4),
        state="diverged",
        message=HOSTILE,
    )
    trial = json.loads((directory / "0" / "trial.json").read_text())
    trial |= {"number": 9, "overrides": {"optimizer.lr": "0.001", "seed": "4"}, "state": "diverged", "value": None}
    (directory / "9" / "trial.json").write_text(json.dumps(trial))
    return directory


@pytest.fixture(scope="module")
def report(sweep) -> Path:
    return write_report(sweep)


@pytest.fixture(scope="module")
def sizes(tmp_path_factory) -> Path:
    """Runs of three sizes, two lengths and two learning rates."""
    place = tmp_path_factory.mktemp("sizes") / "runs"
    for number, (width, steps, rate) in enumerate(
        (w, s, r) for w in (32, 64, 128) for s in (10, 20) for r in (1e-3, 2e-3)
    ):
        settings = {"model.n_embd": width, "train.max_steps": steps, "optimizer.lr": rate}
        write_run(place / str(number), settings=settings, rows=rows_of(steps, lr=rate))
    return place


def write_report(where: Path) -> Path:
    path = where / "report.html"
    path.write_text(render_page(ReportDocument(str(where), 1000).gather(), poll=None))
    return path


@pytest.fixture
def seen(browser):
    """Opens pages; checks at the end that the browser reported no errors."""
    opened = []

    def look(where, **options) -> Seen:
        opened.append(Seen(browser, **options))
        return opened[-1].open(where)

    yield look
    for one in opened:
        one.page.close()
        assert one.complaints == []


def column(run: Path, name: str, over: str = "tokens") -> tuple[list[float], list[float]]:
    """Returns a column of metrics.csv over another one, read independently of gptlab."""
    with (run / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row[name]]
    return [float(row[over]) for row in rows], [float(row[name]) for row in rows]


@contextmanager
def serving(where: Path) -> Iterator[LiveServer]:
    """Serves a report in a thread."""
    with LiveServer(ReportDocument(str(where), 1000).gather, port=0, poll=0.1) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()
