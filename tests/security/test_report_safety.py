# ruff: noqa: F811  (fixtures)
"""The report shows the text of runs as text, and its server limits connections."""

import http.client
import socket
import threading
import time

from gptlab.reporting import live
from report_pages import browser, seen, serving, write_report  # noqa: F401
from run_directories import rows_of, write_metrics, write_run

LINK = '<a href="https://example.org/">click</a>'
TEMPLATE = "%{x}"
LINKS = "document.querySelectorAll('svg a').length"


def write_runs(directory, text: str) -> None:
    """Writes runs whose config values and metric names are hostile, in all charts of the page."""
    rows = [{**row, f"{text}{TEMPLATE}": 1.0} for row in rows_of(6)]
    for number, (value, lr) in enumerate((v, lr) for v in (text, "b") for lr in (1e-3, 2e-3)):
        settings = {"data.column": value, "data.subset": f"{value}{TEMPLATE}", "optimizer.lr": lr, "name": text}
        write_metrics(write_run(directory / str(number), settings=settings), rows)


def test_no_config_value_becomes_a_link_in_a_chart(seen, tmp_path):
    write_runs(tmp_path / "runs", LINK)
    page = seen(write_report(tmp_path / "runs"))
    for key in ("data.column", "data.subset", "optimizer.lr"):
        page.page.evaluate(f"Plotly.relayout('curve', {{'xaxis.title.text': {LINK!r}}})")
        assert page.page.evaluate(LINKS) == 1, "the payload has no effect"
        page.page.select_option("#curve-key", key)
        page.page.evaluate("render()")
        assert page.page.evaluate(LINKS) == 0
        if key != "optimizer.lr":
            shown = page.page.evaluate("document.querySelector('#curve .xaxislayer-above').textContent")
            assert LINK in shown  # as text


def connect(server: live.LiveServer) -> socket.socket:
    return socket.create_connection((live.ADDRESS, server.server_port), timeout=10)


def status(server: live.LiveServer) -> int:
    connection = http.client.HTTPConnection(live.ADDRESS, server.server_port, timeout=10)
    connection.request("GET", "/data.json")
    return connection.getresponse().status


def test_half_open_connections_start_at_most_64_threads_and_end_in_time(tmp_path, monkeypatch):
    write_run(tmp_path / "runs" / "1")
    monkeypatch.setattr(live, "READ_SECONDS", 1.0)
    monkeypatch.setattr(live.LiveServer, "request_queue_size", 200)  # so that connecting is fast
    before = threading.active_count()
    with serving(tmp_path / "runs") as server:
        opened = [connect(server) for _ in range(150)]
        for one in opened[:60]:
            one.sendall(b"GET / HTTP/1.0\r\n")
        time.sleep(0.3)
        assert threading.active_count() - before <= live.MAX_CONNECTIONS + 1
        start = time.monotonic()
        while time.monotonic() - start < 2:  # one byte at a time does not extend the deadline
            for one in opened[:60]:
                try:
                    one.sendall(b"a")
                except OSError:
                    break
            time.sleep(0.2)
        assert status(server) == 200
        assert threading.active_count() - before <= 2
        for one in opened:
            one.close()


def test_64_connections_are_served_at_a_time(tmp_path):
    write_run(tmp_path / "runs" / "1")
    with serving(tmp_path / "runs") as server:
        idle = [connect(server) for _ in range(live.MAX_CONNECTIONS - 1)]
        time.sleep(0.2)
        assert status(server) == 200
        for one in idle:
            one.close()
