"""Damaged run directories: a command gives the result of the undamaged run, or names the damaged file."""

import csv
import hashlib
import json
import os
import re
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from commands import assert_config_error, assert_success, newest_state
from conftest import SMALL
from gptlab.config.locations import TRUST_PATHS
from gptlab.data.shards.manifest import load_manifest
from gptlab.exit_codes import CONFIG_ERROR, DONE
from gptlab.training.checkpoints.reading import flatten_tensors, read_checkpoint
from gptlab.training.checkpoints.records import commit, read_record, unfinished_path
from gptlab.training.checkpoints.shards import save_shards
from gptlab.training.checkpoints.writing import _write_state
from repeated_command import Call, RepeatedCommand
from test_compatibility import MADE_IN, STORED

CHECKPOINT = Path("checkpoints") / "step_000040"
OUTPUTS = ("hf", "report.html", "scores")


def flip(path: Path, bit: int, position: float = 0.5) -> None:
    content = bytearray(path.read_bytes())
    content[int(len(content) * position)] ^= 1 << bit
    path.write_bytes(content)


def replace_by_directory(path: Path) -> None:
    path.unlink()
    path.mkdir()
    (path / "file").touch()


# The highest bit, since a lower one can turn a text into another valid one, which only a checksum would detect.
DAMAGES: dict[str, Callable[[Path], object]] = {
    "missing": Path.unlink,
    "a directory": replace_by_directory,
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3]),
    "one bit flipped": lambda path: flip(path, 7),
    "garbled": lambda path: path.write_bytes(bytes(range(256)) * 4),
    "not readable": lambda path: path.chmod(0),
}
# Damages of a file that a command does not open.
UNOPENED = ("missing", "a directory")
# More damages of the files of which the checkpoint has a checksum.
HASHED: dict[str, Callable[[Path], object]] = {
    "lowest bit flipped at the beginning": lambda path: flip(path, 0, 0),
    "lowest bit flipped": lambda path: flip(path, 0),
    "lowest bit flipped at the end": lambda path: flip(path, 0, 0.9999),
    "one byte too long": lambda path: path.write_bytes(path.read_bytes() + b"\0"),
}

COMMANDS = {
    "sample": ("gptlab.sample", "run=run", "max_new_tokens=8", "temperature=0"),
    "evaluate": ("gptlab.evaluate", "run=run", "windows=2", "out=scores"),
    "export": ("gptlab.export", "run=run", "format=hf", "out=hf"),
    "train": ("gptlab.train",),
    "resume": ("gptlab.train", "resume=run", "train.max_steps=41", "trainer.devices=1", "trainer.strategy=single"),
    "report": ("gptlab.report", "runs=run", "out=report.html"),
    "runs": ("gptlab.runs", "runs=run", "format=csv"),
}
# The parts of a result that come from a file and that may be missing if it is damaged
PARTS = {
    ("report", "config.yaml"): r"common\..*|runs\.0\.(parameters|flops)",
    ("report", "environment.json"): r"(environments|runs\.0\.(environment|start))\b.*",
    ("report", "forecast.json"): r"runs\.0\.forecast\b.*",
    ("report", "metrics.csv"): r"runs\.0\.(series|rows|best)\b.*",
    ("report", "samples"): r"runs\.0\.samples\b.*",
    ("report", "state.json"): r"runs\.0\.state\b.*",
    ("runs", "state.json"): r"state",
    ("export", "metrics.csv"): r"README\.md",
    ("resume", "metrics.csv"): r"metrics\.-(?!1$)\d+",
}
# Runs may lack these files
OPTIONAL = ("environment.json", "forecast.json", "samples", "state.json")


def with_shards(run: Path) -> None:
    """Replaces the checkpoint of an earlier version by one with the same tensors in the current format."""
    checkpoint_dir = run / CHECKPOINT
    state, unfinished = read_checkpoint(checkpoint_dir), unfinished_path(checkpoint_dir)
    unfinished.mkdir()
    save_shards(flatten_tensors(state), unfinished, rank=0)
    groups = [{"param_groups": optimizer["param_groups"]} for optimizer in state["optimizer_states"]]
    rest = {key: value for key, value in state.items() if key != "state_dict"} | {"optimizer_states": groups}
    commit(unfinished, checkpoint_dir, read_record(checkpoint_dir).facts, _write_state(unfinished, rest))


def make_runs(folder: Path) -> dict[str, Path]:
    """Creates the runs that are damaged: one with a checkpoint in one file, two with shards."""
    shutil.copy(STORED / "text.txt", folder / "text.txt")
    runs = {}
    for name, stored in (("one file", "single"), ("shards of an earlier version", "sharded"), ("shards", "sharded")):
        run = runs[name] = folder / "runs" / name
        shutil.copytree(STORED / stored, run)
        for path in (*run.glob("*.yaml"), *run.glob("*.json")):
            path.write_text(path.read_text().replace(MADE_IN, str(folder)))
    with_shards(runs["shards"])
    return runs


def remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def contents(run: Path) -> dict[str, Any]:
    """Returns the contents of a directory by path."""
    paths = (path for path in run.rglob("*") if path.name != ".run.lock")
    return {str(path.relative_to(run)): path.read_bytes() if path.is_file() else None for path in paths}


def flatten(values: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the leaves of nested lists and dictionaries by dotted name."""
    if isinstance(values, dict | list) and values:
        for key, value in values.items() if isinstance(values, dict) else enumerate(values):
            yield from flatten(value, f"{prefix}.{key}".removeprefix("."))
    else:
        yield prefix, values


def result(folder: Path, command: str, done: Call) -> dict[str, Any]:
    """Returns what a command has computed, without times."""
    match command:
        case "sample":
            return {"text": done.stdout}
        case "evaluate":
            (path,) = (folder / "scores").iterdir()
            return {
                key: value
                for key, value in json.loads(path.read_text()).items()
                if key not in ("seconds", "time", "data")
            }
        case "export":
            return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in (folder / "hf").iterdir()}
        case "resume":
            return resumed(folder / "run")
        case "report":
            return dict(flatten(report_data(folder)))
        case "runs":
            (line,) = csv.DictReader(done.stdout.splitlines())
            return {key: value for key, value in line.items() if key != "age"}
    raise ValueError(command)


def report_data(folder: Path) -> dict[str, Any]:
    """Returns the data of a report, without messages and its time."""
    page = (folder / "report.html").read_text()
    (data,) = re.findall(r'<script type="application/json" id="data">(.*?)</script>', page)
    return {key: value for key, value in json.loads(data).items() if key not in ("made", "problems")}


def resumed(run: Path) -> dict[str, Any]:
    """Returns weights, optimizer state, metrics and state of a resumed run, without times."""
    state = newest_state(run)
    tensors = {name: hashlib.sha256(tensor.numpy().tobytes()) for name, tensor in flatten_tensors(state).items()}
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    times = ("tokens_per_second", "data_wait", "peak_memory_gb")
    progress = json.loads((run / "state.json").read_text())
    return {
        "step": state["global_step"],
        **{f"tensor.{name}": digest.hexdigest() for name, digest in tensors.items()},
        **{f"metrics.{i}": {k: v for k, v in row.items() if k not in times} for i, row in enumerate(rows, -len(rows))},
        **{key: progress[key] for key in ("state", "step", "max_steps", "tokens", "loss", "val_loss", "best_val_loss")},
        **{path.name: path.read_text() for path in run.glob("samples/step_000041.txt")},
        "data": load_manifest(run).fingerprint(),
    }


class Case(NamedTuple):
    """A damaged file of a run, by its path in the run directory."""

    run: str
    file: str
    damage: str

    def __str__(self) -> str:
        return f"{self.run}: {self.file} {self.damage}"


def problem_of(case: Case, command: str, done: Call, folder: Path, expected: dict[str, Any], before: Any) -> str | None:
    """Describes what is wrong with the outcome of a command, or returns None."""
    name, written = Path(case.file).name, " ".join((done.stdout + done.stderr).split())
    if "Traceback" in written:
        return "traceback"
    if done.returncode:
        if done.returncode != CONFIG_ERROR:
            return f"exit code {done.returncode}"
        if name not in written:
            return "the file is not named"
        return "the run was changed" if contents(folder / "run") != before else None
    found = result(folder, command, done)
    different = {key for key in expected.keys() | found.keys() if expected.get(key) != found.get(key)}
    if not different:
        return None
    part = PARTS.get((command, case.file.partition("/")[0]))
    if part is None or (wrong := {key for key in different if not re.fullmatch(part, key)}):
        return f"different: {sorted(different if part is None else wrong)}"
    if name not in written and not (case.damage == "missing" and case.file.partition("/")[0] in OPTIONAL):
        return f"the file is not named, but missing or different: {sorted(different)}"
    return None


def start(user, command: str, *arguments: str) -> RepeatedCommand:
    user.environment[TRUST_PATHS] = "1"
    return RepeatedCommand((*COMMANDS[command], *arguments), user.folder, user.environment)


@pytest.mark.slow
@pytest.mark.parametrize("command", [command for command in COMMANDS if command != "train"])
def test_a_damaged_file_of_a_run_is_named_or_does_not_change_the_result(user, command):
    folder, runs, problems, count = user.folder, make_runs(user.folder), [], 0
    with start(user, command) as repeated:

        def call(source: Path, file: str = "", damage: Callable[[Path], object] | None = None) -> tuple[Call, Any]:
            for path in (folder / "run", *(folder / name for name in OUTPUTS)):
                remove(path)
            shutil.copytree(source, folder / "run")
            if damage:
                damage(folder / "run" / file)
            before = contents(folder / "run")
            return repeated.call(), before

        for name, source in runs.items():
            done, _ = call(source)
            assert done.returncode == DONE, done.stderr
            expected = result(folder, command, done)
            opened = {os.path.relpath(folder / path, folder / "run") for path in done.opened}
            for file in sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file()):
                damages = DAMAGES if file in opened else {kind: DAMAGES[kind] for kind in UNOPENED}
                if file in opened and file.startswith("checkpoints") and not file.endswith("record.json"):
                    damages = DAMAGES | HASHED
                for kind, damage in damages.items():
                    case, count = Case(name, file, kind), count + 1
                    done, before = call(source, file, damage)
                    if problem := problem_of(case, command, done, folder, expected, before):
                        problems.append(f"{case}: {problem}\n{done.stdout[-800:]}{done.stderr[-800:]}")
    print(f"{command}: {count} cases")
    assert not problems, f"{len(problems)} of {count} cases:\n" + "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize(("file", "kind"), [("state.pt", "one bit flipped"), ("shard_00000.safetensors", "truncated")])
def test_a_damaged_checkpoint_is_named_by_several_ranks(user, file, kind):
    user.environment[TRUST_PATHS] = "1"
    run = make_runs(user.folder)["shards"].rename(user.folder / "run")
    DAMAGES[kind](run / CHECKPOINT / file)
    before = contents(run)
    done = user.python("gptlab.train", f"resume={run}", "train.max_steps=41")
    assert_config_error(done, "no intact checkpoint")
    assert file in done.stdout + done.stderr
    assert contents(run) == before


NEW_RUN = ("train.eval_every=2", "train.max_steps=2", "callbacks=checkpoint", "name=new")


@pytest.mark.slow
@pytest.mark.parametrize("command", ["train", "evaluate"])
def test_damaged_prepared_data_is_named_or_does_not_change_the_result(user, command):
    make_runs(user.folder)["one file"].rename(user.folder / "run")
    done = user.python("gptlab.prepare", "data=text", "data.source=text.txt", "tokenizer=bytes")
    assert_success(done)
    whole, folder = Path(done.stdout.rpartition("Prepared: ")[2].strip()), user.folder / "prepared"
    shards = ("data=shards", "data.path=prepared", "tokenizer=bytes")
    arguments = shards if command == "evaluate" else (*SMALL[2:], *shards, *NEW_RUN)
    with start(user, command, *arguments) as repeated:

        def call(file: str = "", damage: Callable[[Path], object] | None = None) -> Call:
            for path in (folder, user.folder / "outputs", user.folder / "scores"):
                remove(path)
            shutil.copytree(whole, folder)
            if damage:
                damage(folder / file)
            return repeated.call()

        check_data(user, command, call, data_cases(whole))


@pytest.mark.slow
@pytest.mark.parametrize("command", ["resume", "evaluate"])
def test_damaged_cached_data_is_named_or_does_not_change_the_result(user, command):
    run, cache, whole = make_runs(user.folder)["one file"], user.folder / "cache", user.folder / "whole"
    with start(user, command) as repeated:

        def call(file: str = "", damage: Callable[[Path], object] | None = None) -> Call:
            for path in (user.folder / "run", user.folder / "scores"):
                remove(path)
            shutil.copytree(run, user.folder / "run")
            if damage:
                remove(cache)
                shutil.copytree(whole, cache)
                damage(cache / file)
            return repeated.call()

        assert call().returncode == DONE
        shutil.copytree(cache, whole)
        cases = data_cases(next(whole.glob("*/manifest.json")).parent, whole)
        (record,) = (path.relative_to(whole) for path in whole.glob("verified/*.json"))
        verified = [(str(record), kind, DAMAGES[kind]) for kind in ("missing", "a directory", "garbled")]
        check_data(user, command, call, cases + verified)


DataCase = tuple[str, str, Callable[[Path], object]]  # file, name of the damage, damage


def data_cases(folder: Path, relative_to: Path | None = None) -> list[DataCase]:
    """Returns the cases for the files of prepared data."""
    return [
        (str(path.relative_to(relative_to or folder)), kind, damage)
        for path in sorted(folder.iterdir())
        for kind, damage in (DAMAGES | (HASHED if path.suffix == ".bin" else {})).items()
    ]


def check_data(user, command: str, call: Callable[..., Call], cases: list[DataCase]) -> None:
    """Checks that a command names each damaged file of the data, or has the result of the undamaged data."""

    def found(done: Call) -> dict[str, Any]:
        return resumed(user.only_run("new")) if command == "train" else result(user.folder, command, done)

    done = call()
    assert done.returncode == DONE, done.stderr
    expected, problems = found(done), []
    for file, kind, damage in cases:
        done = call(file, damage)
        written = done.stdout + done.stderr
        if "Traceback" in written:
            problem = "traceback"
        elif done.returncode == CONFIG_ERROR:
            problem = None if Path(file).name in written else "the file is not named"
        elif done.returncode != DONE:
            problem = f"exit code {done.returncode}"
        else:
            problem = None if found(done) == expected else "different"
        if problem:
            problems.append(f"{file} {kind}: {problem}\n{written[-1500:]}")
    assert not problems, f"{len(problems)} of {len(cases)} cases:\n" + "\n".join(problems)


SWEEP = (
    *("gptlab.train", "-m", *SMALL, "train.max_steps=1", "train.eval_windows=2", "callbacks=checkpoint"),
    *("optimizer.lr=1e-3,1e-2", "hydra.sweep.dir=sweep"),
)


@pytest.fixture
def sweep(user) -> Path:
    """A finished sweep of two trials, to be copied to the directory ``sweep``."""
    done = user.python(*SWEEP)
    assert done.returncode == DONE, done.stderr
    return (user.folder / "sweep").rename(user.folder / "whole")


def without_overrides(user) -> None:
    """Makes file permissions apply to later commands, also for root."""
    (user.folder / "startup").mkdir()
    helpers = str(Path(__file__).parent / "helpers")
    lines = ("import sys", f"sys.path.append({helpers!r})", "import permissions", "permissions.drop_overrides()")
    (user.folder / "startup" / "sitecustomize.py").write_text("\n".join(lines))
    before = user.environment.get("PYTHONPATH")
    user.environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(user.folder / "startup"), before)))


def trials(folder: Path) -> dict[str, Any]:
    """Returns what a sweep knows about its trials, without the number of their starts."""
    values = {path.parent.name: json.loads(path.read_text()) for path in sorted(folder.glob("*/trial.json"))}
    return {number: value | {"starts": None} for number, value in values.items()}


@pytest.mark.slow
def test_a_sweep_with_a_damaged_file_names_it_or_runs_no_trial_anew(user, sweep):
    folder, problems, count = user.folder / "sweep", [], 0
    without_overrides(user)

    def call(file: str = "", damage: Callable[[Path], object] | None = None) -> subprocess.CompletedProcess[str]:
        remove(folder)
        shutil.copytree(sweep, folder)
        if damage:
            damage(folder / file)
        return user.python(*SWEEP)

    expected = call().stdout
    assert "2 of them already ended" in expected
    for file in ("sweep.json", "answers.json", "0/trial.json", "0/metrics.csv", "0/config.yaml", "0/forecast.json"):
        for kind in DAMAGES if file.endswith(("sweep.json", "trial.json")) else ("missing", "a directory", "garbled"):
            done, count = call(file, DAMAGES[kind]), count + 1
            if "Traceback" in done.stderr:
                problem = "traceback"
            elif done.returncode == CONFIG_ERROR:
                problem = None if Path(file).name in done.stderr else "the file is not named"
            elif done.returncode != DONE:
                problem = f"exit code {done.returncode}"
            else:
                is_named = kind == "missing" or Path(file).name in done.stdout
                is_same = trials(folder) == trials(sweep) and (done.stdout == expected or is_named)
                problem = None if is_same else "different"
            if problem:
                problems.append(f"{file} {kind}: {problem}\n{done.stdout[-1500:]}{done.stderr[-800:]}")
    assert not problems, f"{len(problems)} of {count} cases:\n" + "\n".join(problems)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["report", "runs"])
def test_a_damaged_file_of_a_sweep_is_named_and_only_its_part_is_missing(user, sweep, command):
    folder, problems, count = user.folder / "run", [], 0

    def call(file: str = "", damage: Callable[[Path], object] | None = None) -> Call:
        for path in (folder, user.folder / "report.html"):
            remove(path)
        shutil.copytree(sweep, folder)
        if damage:
            damage(folder / file)
        return repeated.call()

    with start(user, command) as repeated:
        expected = shown(user.folder, command, call())
        read, unread = ("sweep.json", "0/trial.json", "0/config.yaml"), ("answers.json", "answers.csv", "0/output.log")
        for file in (*read, *unread):
            for kind, damage in DAMAGES.items() if file in read else ((kind, DAMAGES[kind]) for kind in UNOPENED):
                done, count = call(file, damage), count + 1
                written = done.stdout + done.stderr
                if "Traceback" in written or done.returncode:
                    problems.append(f"{file} {kind}: exit code {done.returncode}\n{written[-800:]}")
                    continue
                found = shown(user.folder, command, done)
                is_named = Path(file).name in written or (file != "0/config.yaml" and kind == "missing")
                if found != expected and not (is_named and found["1"] == expected["1"]):
                    problems.append(f"{file} {kind}: different\n{written[-800:]}")
    assert not problems, f"{len(problems)} of {count} cases:\n" + "\n".join(problems)


def shown(folder: Path, command: str, done: Call) -> dict[str, Any]:
    """Returns what is shown of each run of a sweep, by its directory, and of the sweep."""
    if command == "runs":
        return {Path(line["run"]).name: line | {"age": None} for line in csv.DictReader(done.stdout.splitlines())}
    values = report_data(folder)
    relative = dict.fromkeys(("id", "point", "name", "varied", "settings"))  # these depend on the other runs
    return {**{Path(run["directory"]).name: run | relative for run in values["runs"]}, "sweeps": values["sweeps"]}
