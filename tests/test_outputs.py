"""Commands replace only output files that they have written, unless overwrite=true."""

import hashlib
import json
from pathlib import Path

import pytest

from commands import assert_config_error, assert_success
from gptlab.benchmarks.measuring import REPORT_MARK, write_report
from gptlab.errors import UserError
from gptlab.exporters.certificate import CERTIFICATE
from gptlab.exporters.exporter import export_model
from gptlab.exporters.folder import CERTIFICATE_MARK, atomic_folder
from gptlab.files import check_output, check_output_directory
from gptlab.pretrained.source import open_model_source

OUTPUTS = {  # each command with an output path: its arguments, the key of the path, and the file that it would replace
    "report": (("runs=outputs",), "out", "metrics.csv"),
    "plan": (("model=tiny",), "json", "checkpoints/step_000006/state.pt"),
    "dashboard": (("entity=me", "project=mine", "dry_run=true"), "out", "config.yaml"),
    "export": (("run={run}", "format=hf"), "out", ""),
    "bench": (("suite=data",), "out", ""),
    "prove": (("model=tiny",), "prove.out", ""),
}


def hashes(directory: Path) -> dict[Path, str]:
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in directory.rglob("*") if p.is_file()}


@pytest.mark.parametrize("command", OUTPUTS)
def test_files_of_a_run_are_not_overwritten(user, runs, command):
    run = runs.give(user, "halted", "train.max_steps=6", "schedule.decay_steps=9", "callbacks=checkpoint")
    arguments, key, name = OUTPUTS[command]
    before = hashes(run)
    path = run / name if name else run
    done = user.python(f"gptlab.{command}", *(argument.format(run=run) for argument in arguments), f"{key}={path}")
    assert_config_error(done, f"{key}={path} already exists")
    assert ("prove.overwrite=true" if command == "prove" else " overwrite=true") in done.stderr
    assert hashes(run) == before


@pytest.mark.parametrize(
    ("command", "arguments", "path"),
    [
        ("report", ("runs=outputs",), "out=a.html"),
        ("plan", ("model=tiny",), "json=a.json"),
        ("dashboard", ("entity=me", "project=mine", "dry_run=true"), "out=a.json"),
        ("dashboard", (), "wandb_sweeps=sweeps"),
    ],
)
def test_a_command_replaces_its_own_output_and_with_overwrite_any(user, halted, command, arguments, path):
    for _ in range(2):
        assert_success(user.python(f"gptlab.{command}", *arguments, path))
    file = user.folder / path.partition("=")[2]
    file = file / "lr.yaml" if file.is_dir() else file
    own = file.read_bytes()
    file.write_text("notes")
    assert_config_error(user.python(f"gptlab.{command}", *arguments, path), "already exists")
    assert file.read_text() == "notes"
    assert_success(user.python(f"gptlab.{command}", *arguments, path, "overwrite=true"))
    assert file.read_bytes()[:100] == own[:100]


def test_converted_files_are_not_overwritten_without_consent(user):
    (user.folder / "text.txt").write_text("abc\n" * 2000)
    assert_success(user.python("gptlab.prepare", "data=text", "data.source=text.txt", "tokenizer=characters"))
    (prepared,) = (path.parent for path in user.folder.glob("cache/*/manifest.json"))
    convert = ("gptlab.prepare", f"convert={prepared}", "format=nanogpt", "out=char")
    (user.folder / "char").mkdir()
    meta = user.folder / "char" / "meta.pkl"
    meta.write_text("mine")
    assert_config_error(user.python(*convert), "meta.pkl already exists")
    assert [path.name for path in meta.parent.iterdir()] == ["meta.pkl"]
    assert meta.read_text() == "mine"
    assert_success(user.python(*convert, "overwrite=true"))
    assert meta.read_bytes()[:4] != b"mine"


def test_an_export_replaces_the_files_of_the_export_before_it_only(halted, tmp_path):
    source, out = open_model_source(str(halted)), tmp_path / "export"
    export_model(source, "hf", "float32", out)
    (out / "notes.txt").write_text("mine")
    check_output_directory(out, "out", [CERTIFICATE], CERTIFICATE_MARK, overwrite=False)
    export_model(source, "llmc", "float32", out)
    certificate = json.loads((out / CERTIFICATE).read_text())
    assert certificate["format"] == "llmc"
    names = {path.name for path in out.iterdir()}
    assert names == {*certificate["files"], CERTIFICATE, "notes.txt"}
    assert "config.json" not in names


def test_files_named_by_a_certificate_are_removed_only_in_its_directory(tmp_path):
    (tmp_path / "mine").write_text("")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / CERTIFICATE).write_text(
        json.dumps({"gptlab": "1", "files": ["../mine", str(tmp_path / "mine")]})
    )
    with atomic_folder(tmp_path / "out") as folder:
        (folder / "new").write_text("")
    assert (tmp_path / "mine").exists()
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["new"]


def test_a_benchmark_continues_in_its_own_directory(tmp_path):
    write_report(tmp_path, "data", 1, [])
    check_output_directory(tmp_path, "out", ["train.json", "data.json"], REPORT_MARK, overwrite=False)
    with pytest.raises(UserError, match=r"out=.* already exists"):
        check_output_directory(tmp_path, "out", ["train.json"], REPORT_MARK, overwrite=False)


@pytest.mark.parametrize("name", ["file", "link", "dangling", "directory"])
def test_only_files_with_the_mark_are_own(tmp_path, name):
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to("file")
    (tmp_path / "dangling").symlink_to("nothing")
    (tmp_path / "directory").mkdir()
    with pytest.raises(UserError, match=rf"json=.*{name}"):
        check_output(tmp_path / name, "json", "mark", overwrite=False)
    check_output(tmp_path / "new", "json", "mark", overwrite=False)
