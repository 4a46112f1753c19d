"""Passwords and tokens in URLs appear in no message and no record of a run."""

import json

import pytest
import yaml

from gptlab.errors import UserError, hide_passwords
from gptlab.reporting.document import ReportDocument
from gptlab.reporting.page import render_page
from gptlab.terminal import printable
from gptlab.tracking.environment import COMMAND, record_environment
from gptlab.tracking.run_directory import load_config
from gptlab.tracking.run_store.runs import Run
from run_directories import write_run

SECRET = "hunter2"  # noqa: S105
URLS = {
    f"https://user:{SECRET}@host/a": "https://***@host/a",
    f"https://{SECRET}@host/a": "https://***@host/a",
    f"https://user:p@{SECRET}@host": "https://***@host",
    f"https://user:a/{SECRET}?b#c@host/x": "https://***@host/x",
    f"simplecache::https://u:{SECRET}@h/x::s3://key:{SECRET}@bucket": "simplecache::https://***@h/x::s3://***@bucket",
    f"/home/user/https:/user:{SECRET}@host/a": "/home/user/https:/***@host/a",
    f"https://h/p?X-Amz-Signature={SECRET}&x=1": "https://h/p?***",
    f"https://h/p?sv=1&sig={SECRET}#x": "https://h/p?***",
    f"https://h/p?{SECRET}": "https://h/p?***",
    f"https://h/p#access_token={SECRET}": "https://h/p?***",
    f"postgresql+psycopg2://u:{SECRET}@h/db": "postgresql+psycopg2://***@h/db",
    f"HTTPS://U:{SECRET}@H": "HTTPS://***@H",
}
HARMLESS = (
    *("https://host:8080/path@v1", "s3://bucket/a@b", "hf://datasets/owner/name@main", "file:///home/a/b"),
    *("https://docs.org/page#section", "/data/a@b?c=d", "user@host.org", "C:/x@y", "12:30 a@b"),
)


@pytest.mark.parametrize(("url", "hidden"), URLS.items())
def test_secrets_of_a_url_are_hidden_in_a_sentence(url, hidden):
    assert hide_passwords(f"x='{url}', which") == f"x='{hidden}', which"
    assert hide_passwords(f"See {url}. More ({url}).") == f"See {hidden}. More ({hidden})."
    assert SECRET not in printable(f"data.path={url}")
    assert SECRET not in str(UserError(f"data.path={url}"))


@pytest.mark.parametrize("text", HARMLESS)
def test_text_without_secrets_is_unchanged(text):
    assert hide_passwords(f"{text}. Is it {text}?") == f"{text}. Is it {text}?"


@pytest.mark.parametrize(
    "hostile", ["ab:/" * 50_000, "ab:/?" * 30_000 + "." * 50_000, "a." * 100_000, "ab:/#" * 50_000]
)
def test_a_hostile_text_is_searched_in_linear_time(hostile):
    hide_passwords(hostile)  # far below a second; quadratic time would be minutes


def test_the_recorded_command_line_has_no_passwords(tmp_path, monkeypatch):
    monkeypatch.setenv(COMMAND, f"python -m gptlab.train logger.uri=https://user:{SECRET}@host")
    record_environment(tmp_path)
    command = json.loads((tmp_path / "environment.json").read_text())["command"]
    assert command == "python -m gptlab.train logger.uri=https://***@host"


def test_shown_records_of_a_run_have_no_passwords_but_its_config_keeps_them_to_resume(tmp_path):
    command, url = f"gptlab.train x=https://u:{SECRET}@h", f"https://user:{SECRET}@host"
    directory = write_run(tmp_path / "a" / "1", "logger=mlflow", environment={"command": command})
    config = yaml.safe_load((directory / "config.yaml").read_text())
    config["logger"]["mlflow"]["tracking_uri"] = url
    (directory / "config.yaml").write_text(yaml.safe_dump(config))
    assert SECRET not in render_page(ReportDocument(str(tmp_path), 100).gather(), poll=None)
    assert Run(directory).settings["logger.mlflow.tracking_uri"] == "https://***@host"
    assert Run(directory).environment["command"] == "gptlab.train x=https://***@h"
    assert load_config(directory).logger.model_dump()["mlflow"]["tracking_uri"] == url


@pytest.mark.parametrize(
    ("module", "arguments"),
    [
        ("gptlab.train", ("data=text", "data.source=")),
        ("gptlab.train", ("data=shards", "data.path=")),
        ("gptlab.train", ("data=text", "data.source=text.txt", "init_from=")),
        ("gptlab.train", ("resume=",)),
        ("gptlab.train", ("modle=",)),
        ("gptlab.prepare", ("convert=",)),
        ("gptlab.sample", ("run=",)),
        ("gptlab.runs", ("runs=",)),
    ],
)
def test_an_error_of_a_command_reveals_no_password(user, module, arguments):
    done = user.python(module, *arguments[:-1], f"{arguments[-1]}https://user:{SECRET}@127.0.0.1:9/x?token={SECRET}")
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert SECRET not in done.stdout + done.stderr
    written = [path for path in user.folder.rglob("*") if path.is_file()]
    assert not [path for path in written if SECRET.encode() in path.read_bytes()]
