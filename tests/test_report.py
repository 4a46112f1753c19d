"""The report command: file, server and error messages."""

import http.client
import json
import os
import re
import signal
import socket

import pytest

from commands import assert_config_error, assert_success
from gptlab.exit_codes import DONE
from gptlab.reporting.document import ReportDocument
from gptlab.reporting.live import LiveServer
from report_pages import serving
from run_directories import rows_of, running, write_metrics, write_run, write_sweep

REPORT = "gptlab.report"


def test_a_report_needs_no_torch_and_prints_omitted_runs(without_torch):
    sweep = write_sweep(without_torch.folder / "outputs" / "lr" / "now", seeds=(1, 2))
    (sweep / "3" / "metrics.csv").write_text("nothing\n")
    done = without_torch.python(REPORT, "runs=outputs/l*/now", "out=lr=1.html")
    assert_success(done)
    report = without_torch.folder / "lr=1.html"
    assert re.fullmatch(r"lr=1\.html: 5 runs, \d\.\d MB\. The file is self-contained\.\n", done.stdout)
    assert report.stat().st_size / 1e6 == pytest.approx(float(done.stdout.split()[3]), abs=0.05)
    assert "lr/now/3 is omitted" in done.stderr
    assert [path.name for path in without_torch.folder.glob("*.html*")] == ["lr=1.html"]


def test_report_help_lists_keys_and_exit_codes(without_torch):
    done = without_torch.python(REPORT, "--help")
    assert_success(done)
    for text in ("points=1000", "live=false", "Exit codes: 0 done (with live=true, also after Ctrl-C)"):
        assert text in done.stdout


CONFIG_ERRORS = {
    "nothing there": (["runs=outputs/none"], "No runs found at runs=outputs/none: it does not exist"),
    "no run there": (["runs=elsewhere"], "No runs found at runs=elsewhere: no run directory"),
    "runs not named": ([], "runs is missing"),
    "unknown key": (["run=x"], "Unknown config key `run`. Did you mean runs?"),
    "no folder to write in": (["runs=outputs", "out=missing/x.html"], "out=missing/x.html cannot be written: no such"),
    "a folder": (["runs=outputs", "out=outputs"], "out=outputs is a directory. Set a file: out=outputs/report"),
    "too few points": (["runs=outputs", "points=2"], "points=2 is not valid"),
    "a port that is none": (["runs=outputs", "live=true", "port=70000"], "port=70000 is not valid"),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), CONFIG_ERRORS.values(), ids=CONFIG_ERRORS)
def test_an_invalid_report_command_is_a_config_error(without_torch, arguments, message):
    write_run(without_torch.folder / "outputs" / "quickstart" / "now")
    assert_config_error(without_torch.python(REPORT, *arguments), message)
    assert not list(without_torch.folder.rglob("*.html*"))


def test_a_port_in_use_is_a_config_error(user):
    write_run(user.folder / "outputs" / "quickstart" / "now")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = user.python(REPORT, "runs=outputs", "live=true", f"port={port}")
    assert_config_error(done, f"port={port} is in use. Set another port, or port=0 for a free one.")


def test_report_serves_until_ctrl_c(user):
    write_run(user.folder / "outputs" / "quickstart" / "now", **running())
    command = user.begin(REPORT, "runs=outputs", "live=true", "port=0")
    line = command.stdout.readline()
    port = int(re.fullmatch(r"Serving the report at http://127\.0\.0\.1:(\d+)/ .*\n", line)[1])
    status, _, body = get(port, "/")
    assert (status, b"gptlab report" in body) == (200, True)
    os.kill(command.pid, signal.SIGINT)
    command.ended(DONE)
    with pytest.raises(ConnectionRefusedError):
        get(port, "/")
    assert not (user.folder / "report.html").exists()


def get(port: int, path: str, **headers: str) -> tuple[int, http.client.HTTPMessage, bytes]:
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=30)
    connection.request("GET", path, headers={name.replace("_", "-"): value for name, value in headers.items()})
    answer = connection.getresponse()
    return answer.status, answer.headers, answer.read()


def test_data_is_sent_only_when_it_has_changed(tmp_path):
    run = write_run(tmp_path / "runs" / "0", **running())
    with serving(tmp_path / "runs") as server:
        port = server.server_port
        status, headers, body = get(port, "/data.json")
        assert (status, headers["Content-Type"]) == (200, "application/json; charset=utf-8")
        assert json.loads(body)["runs"][0]["series"]["train/loss"]["step"][-1] == 20
        assert get(port, "/data.json", If_None_Match=headers["ETag"])[0] == 304
        write_metrics(run, rows_of(25))
        write_run(tmp_path / "runs" / "1", settings={"seed": 5})
        status, _, body = get(port, "/data.json", If_None_Match=headers["ETag"])
        assert status == 200
        assert [run["series"]["train/loss"]["step"][-1] for run in json.loads(body)["runs"]] == [25, 20]
        (tmp_path / "runs").rename(tmp_path / "gone")
        status, _, body = get(port, "/data.json")
        assert (status, b"it does not exist" in body) == (410, True)


@pytest.mark.parametrize("host", ["example.org", "127.0.0.1", "127.0.0.1.example.org:{port}", "localhost:1"])
def test_requests_with_a_foreign_host_header_are_refused(tmp_path, host):
    write_run(tmp_path / "runs" / "0")
    with serving(tmp_path / "runs") as server:
        port = server.server_port
        for path in ("/", "/data.json"):
            status, _, body = get(port, path, Host=host.format(port=port))
            assert (status, b"series" in body) == (403, False)
        assert get(port, "/data.json", Host=f"localhost:{port}")[0] == 200
        assert get(port, "/../conftest.py")[0] == 404


def test_the_server_listens_only_on_the_loopback_interface(tmp_path):
    write_run(tmp_path / "runs" / "0")
    with LiveServer(ReportDocument(str(tmp_path / "runs"), 1000).gather, port=0, poll=1) as server:
        assert server.socket.getsockname()[0] == "127.0.0.1"
