"""Hostile YAML and JSON ends in a sentence, in little time and memory."""

import csv
import io
import json
import resource
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from commands import assert_config_error
from gptlab.config.base import validate
from gptlab.data.tokenizers.external import read_json, tokenizer_record
from gptlab.errors import UserError
from gptlab.model.config import GPTConfig
from gptlab.parsing import MAX_DEPTH, parse_json, parse_yaml
from gptlab.pretrained.source import open_model_source
from gptlab.reporting.document import ReportDocument
from gptlab.reporting.reading import RunReader
from gptlab.tracking.environment import read_components
from gptlab.tracking.loggers import _read_rows
from gptlab.tracking.run_directory import load_config
from gptlab.tracking.run_store.listing import list_runs, split_unreadable
from gptlab.tracking.run_store.runs import Run, find_runs, read_csv
from run_directories import write_run

BRACKETS = "[" * 100_000
LAUGHS = "a0: &a0 [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 10)
)
YAMLS = {
    "deep list": BRACKETS,
    "deep mapping": "{a: " * 100_000,
    "deep blocks": "".join(f"{' ' * i}a:\n" for i in range(1000)),
    "deep dashes": "- " * 100_000,
    "aliases": LAUGHS,
    "anchor": "a: &x 1",
    "empty int": "a: !!int ''",
    "invalid bool": "a: !!bool x",
    "invalid date": "a: 2001-99-99",
    "sexagesimal": "a: 1" + ":59" * 300_000,
    "digits": "a: 1" + "9" * 900_000,
    "size": "a: b\n" * 1_000_000,
    "list as a key": "? [a]\n: b",
    "not YAML": "a: b: c",
}


@pytest.mark.parametrize("text", YAMLS.values(), ids=YAMLS)
def test_hostile_yaml_is_refused_quickly(tmp_path, text):
    (tmp_path / "config.yaml").write_text(text)
    began, before = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for read in (lambda: load_config(tmp_path), lambda: Run(tmp_path).config):
        with pytest.raises(UserError) as error:
            read()
        assert "config.yaml cannot be read: " in str(error.value)
        assert len(str(error.value)) < 1000
    assert time.process_time() - began < 2
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 300_000  # KiB


def test_the_payloads_work_with_the_plain_library():
    code = f"import yaml; yaml.CSafeLoader({'[' * 10!r} * 10_000).get_single_data()"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode < 0  # a signal
    with pytest.raises(RecursionError):
        json.loads(BRACKETS)
    small = yaml.safe_load(LAUGHS.split("a4:")[0])
    assert len(json.dumps(small)) > 9 * len(LAUGHS)  # nine times as long per line
    for name, expected in (("empty int", IndexError), ("invalid bool", KeyError)):
        with pytest.raises(expected):
            yaml.safe_load(YAMLS[name])


def test_depth_is_bounded_exactly():
    for parse in (parse_yaml, parse_json):
        assert parse("[" * MAX_DEPTH + "]" * MAX_DEPTH)
        with pytest.raises(ValueError, match="nested"):
            parse("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))


def test_configurations_are_parsed_as_by_yaml(tmp_path):
    text = (write_run(tmp_path / "run") / "config.yaml").read_text()
    assert parse_yaml(text) == yaml.safe_load(text)
    long = yaml.safe_dump({"text": "9 " * 5000, "more": ["- x", None, 1e-3, True, "&a", "*b", "!c"]})
    assert parse_yaml(long) == yaml.safe_load(long)


@pytest.mark.parametrize("text", [BRACKETS, '{"a":' * 100_000, "[" * 200 + "]" * 200, "9" * 10_000], ids=range(4))
def test_hostile_json_is_refused_or_ignored(tmp_path, text):
    for name in ("environment.json", "state.json", "forecast.json", "config.json", "tokenizer.json"):
        (tmp_path / name).write_text(text)
    run = Run(tmp_path)
    assert (run.environment, run.forecast, run.state, read_components(tmp_path)) == ({}, {}, None, {})
    for read in (read_json, lambda path: tokenizer_record(path.parent, 7)):
        with pytest.raises(UserError, match=r"json cannot be read"):
            read(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"config\.json cannot be read"):
        open_model_source(str(tmp_path))


@pytest.mark.parametrize("size", [10**9, 10**400])
def test_a_huge_model_is_refused_before_it_is_built(tmp_path, size):
    sizes = {"n_layer": size, "n_head": 1, "n_embd": 8, "vocab_size": 9, "n_positions": 8}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", **sizes}))
    began = time.process_time()
    with pytest.raises(UserError, match="n_layer"):
        open_model_source(str(tmp_path))
    assert time.process_time() - began < 2


def test_sizes_of_published_models_are_valid():
    values = {"block_size": 8192, "vocab_size": 256_000, "n_layer": 1000, "n_head": 128, "n_embd": 20_480}
    model = write_model(values)
    assert model.n_layer == 1000


def write_model(values: dict[str, int]) -> GPTConfig:
    from conftest import TINY

    return validate(GPTConfig, TINY | values)


@pytest.fixture
def mixed(tmp_path) -> Path:
    """Runs, of which all but the first have a hostile file."""
    write_run(tmp_path / "runs" / "good" / "0")
    for number, (name, text) in enumerate(
        [
            ("config.yaml", BRACKETS),
            ("config.yaml", LAUGHS),
            ("metrics.csv", "step,tokens,train/loss,val/loss\ninf,1,2,3\n"),
            ("metrics.csv", f"step,{'x' * 200_000}\n1,2\n"),
            ("trial.json", BRACKETS),
        ],
        1,
    ):
        run = write_run(tmp_path / "runs" / "bad" / str(number))
        (run / name).write_text(text)
        if name == "metrics.csv":
            (run / "state.json").unlink()
    return tmp_path / "runs"


def test_the_report_names_bad_runs_and_shows_the_others(mixed):
    found = ReportDocument(str(mixed), 100).gather()
    assert [run["name"].rpartition("/")[2] for run in found["runs"]] == ["0"]
    assert len(found["problems"]) == 5
    assert all("is omitted: " in problem for problem in found["problems"])


def test_the_list_names_bad_runs_and_shows_the_others(mixed):
    readable, problems = split_unreadable(find_runs(str(mixed)))
    assert [line["run"].rpartition("/")[2] for line in list_runs(readable, [], "run", descending=False)] == ["0"]
    assert len(problems) == 5


def test_the_command_lists_the_other_runs(user, mixed):
    done = user.python("gptlab.runs", f"runs={mixed}", "format=csv")
    assert done.returncode == 0
    assert len(done.stdout.splitlines()) == 2
    assert done.stderr.count("is omitted") == 5
    assert_config_error(user.python("gptlab.runs", f"runs={mixed / 'bad' / '1'}"), "is omitted")


@pytest.mark.parametrize(
    "name", ["config.yaml", "metrics.csv", "environment.json", "samples", "samples/step_000005.txt"]
)
def test_a_report_shows_nothing_through_links(tmp_path, name):
    secret = tmp_path / "secret"
    secret.mkdir()
    (secret / "step_000005.txt").write_text("step,secret\n5,1\n")
    write_run(tmp_path / "runs" / "good")
    run = write_run(tmp_path / "runs" / "bad", samples={5: "text"})
    if name == "samples":
        (run / "samples").rename(tmp_path / "elsewhere")
        (run / name).symlink_to(secret)
    else:
        (run / name).unlink()
        (run / name).symlink_to(secret / "step_000005.txt")
    assert "step,secret" not in json.dumps(ReportDocument(str(tmp_path / "runs"), 100).gather())


def test_a_metrics_file_with_many_columns_and_many_short_rows_is_read_in_time(tmp_path):
    run = write_run(tmp_path / "run")
    header = ",".join(("step", "tokens", *(f"x{i}" for i in range(15_000))))
    (run / "metrics.csv").write_text(
        "\n".join((header, *(f"{i},{i}" for i in range(15_000)), "1,2" + ",3" * 15_000 + "\n"))
    )
    began = time.process_time()
    assert Run(run).value("x14999") == 3
    assert len(_read_rows(run / "metrics.csv", 20_000)) == 15_001
    (entry,), _ = RunReader(100, "val/loss").read([run])
    assert len(entry.shown["series"]) == 15_000
    assert time.process_time() - began < 5  # csv.DictReader takes more than 10 seconds


@pytest.mark.parametrize("text", ["step,a\n1,2\n\n3,,\n4\n", "a,a\n1,2\n,3\n", "", "a\n1,2,3\n"])
def test_rows_are_those_of_the_standard_library_without_empty_values(text):
    expected = [{key: value for key, value in row.items() if value} for row in csv.DictReader(io.StringIO(text))]
    assert list(read_csv(io.StringIO(text))) == expected
