"""The record of an offline run, read by W&B's own reader, is complete."""

import hashlib
import json
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest
import wandb
import yaml

from commands import assert_success, metrics
from configs import resolved
from faults import break_steps
from gptlab.exit_codes import DIVERGED, HUNG, INTERRUPTED, PREEMPTED
from gptlab.tracking.environment import record_environment
from gptlab.tracking.run_store.sweeps import Sweep
from gptlab.tracking.wandb.init import init_run, run_config
from own_package import NODES
from wandb_records import SCRIPTS, exit_code, has_secret, interrupted, metrics_file, records, resumed, rows
from wandb_server import KEY

OFFLINE = ("logger=wandb", "logger.wandb.mode=offline")
SWEEP = {"question": "?", "space": {}, "fixed": [], "search": "grid", "n_trials": 1, "baseline": {}}


def summaries(directory: Path) -> list[dict[str, Any]]:
    """Returns what W&B's reader prints for each start of a run."""
    found = []
    for path in sorted(directory.glob("wandb/*run-2*/*.wandb"), key=lambda path: path.parent.name.split("run-")[1]):
        command = (SCRIPTS / "wandb", "leet", "inspect", "--summary", "--json", path)
        found.append(json.loads(subprocess.run(command, capture_output=True, check=True).stdout))
    return found


def of_kind(record: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [line[kind] for line in record if line["type"] == kind]


def table(directory: Path, summary: dict[str, Any]) -> list[list[Any]]:
    """Returns the rows of the last table of samples."""
    (path,) = directory.glob(f"wandb/*run-2*/files/{summary['samples']['path']}")
    assert hashlib.sha256(path.read_bytes()).hexdigest() == summary["samples"]["sha256"]
    values = json.loads(path.read_text())
    assert values["columns"] == ["step", "tokens", "text"]
    assert len(values["data"]) == summary["samples"]["nrows"]
    return values["data"]


def written_samples(directory: Path) -> list[list[Any]]:
    """Returns the texts in samples/, one per row."""
    paths = sorted(directory.glob("samples/step_*.txt"))
    texts = {int(path.stem[5:]): path.read_bytes().decode() for path in paths}  # with carriage returns
    return [[step, step * 12 * 32, text.removeprefix("--- sample 1 ---\n")[:-1]] for step, text in texts.items()]


def check_whole(directory: Path, *found: list[dict[str, Any]]) -> None:
    """Checks that the record has all metrics of metrics.csv, all config keys and all tables."""
    summary = summaries(directory)[-1]
    assert (summary["state"], summary["exit_code"]) == ("finished", 0)
    assert summary["run_id"] == (directory / "wandb_id").read_text()
    header = set((directory / "metrics.csv").read_text().splitlines()[0].split(",")) - {"step"}
    assert header <= {name for row in rows(*found) for name in row}
    assert header <= summary["summary"].keys()
    assert summary["step"] == max(metrics_file(directory))
    assert summary["summary"]["val/loss"] == {"min": min(metrics(directory, "val/loss").values())}
    written = yaml.safe_load((directory / "config.yaml").read_text())
    assert written["trainer"].pop("flags") == {}  # W&B records no empty mappings
    assert {name: summary["config"][name] for name in written} == written
    assert table(directory, summary["summary"]) == written_samples(directory)


@pytest.mark.slow
def test_the_record_has_all_metrics_config_samples_and_checkpoints(user):
    for command in (("init", "-q"), ("add", "text.txt"), ("commit", "-qm", "c")):
        subprocess.run(("git", "-c", "user.name=a", "-c", "user.email=b", *command), check=True, cwd=user.folder)
    commit = subprocess.check_output(("git", "rev-parse", "HEAD"), text=True, cwd=user.folder)
    user.environment |= {
        "WANDB_API_KEY": KEY,
        "HOME": str(user.folder / "text.txt"),
    }  # not a directory: nothing can be written there
    more = ("logger.wandb.checkpoints=all", "logger.wandb.tags=[a,b]", "callbacks.checkpoint.keep_last=1")
    assert_success(user.train(*OFFLINE, *more))
    directory = user.only_run()
    (record,) = records(directory)
    check_whole(directory, record)
    (started,) = of_kind(record, "run")
    assert (started["job_type"], started["tags"], started["project"]) == ("train", ["a", "b"], "gptlab")
    assert "run_group" not in started
    environment = summaries(directory)[0]["config"]["environment"]
    kept = json.loads((directory / "environment.json").read_text())
    assert environment["git_commit"] == commit.strip()
    assert environment["torch"] == kept["packages"]["torch"]
    assert {key: environment[key] for key in ("host", "cores", "gpus")} == {
        key: kept["machine"][key] for key in ("host", "cores", "gpus")
    }
    artifacts = [one for one in of_kind(record, "artifact") if one["type"] == "model"]
    assert [one["name"] for one in artifacts] == [f"model-{started['run_id']}"] * 2
    assert [set(one["aliases"]) for one in artifacts] == [{"latest", f"step-{step}", "best"} for step in (3, 6)]
    for artifact, step in zip(artifacts, (3, 6), strict=True):  # the first one has been deleted from checkpoints/
        files = {one["path"]: Path(one["local_path"]) for one in artifact["manifest"]["contents"]}
        assert json.loads(files["record.json"].read_text())["facts"]["step"] == step
        digest = json.loads(files["record.json"].read_text())["files"]["state.pt"]["sha256"]
        assert hashlib.sha256(files["state.pt"].read_bytes()).hexdigest() == digest
    assert has_secret(user.folder) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("by", "state", "status"),
    [(signal.SIGINT, "failed", INTERRUPTED), (signal.SIGTERM, "failed", PREEMPTED), (signal.SIGKILL, "running", None)],
)
def test_a_resumed_run_has_every_row_once(user, by, state, status):
    directory = interrupted(user, *OFFLINE[1:], "callbacks.samples.max_new_tokens=8", by=by, callbacks="default")
    (first,) = summaries(directory)
    assert (first["state"], first["exit_code"]) == (state, status)
    assert bool(of_kind(records(directory)[0], "preempting")) == (by == signal.SIGTERM)
    resumed(user, directory)
    check_whole(directory, *records(directory))
    steps = [row["_step"] for row in rows(*records(directory))]
    assert steps == sorted(set(steps))
    assert set(steps) == metrics_file(directory).keys()


@pytest.mark.slow
def test_skipped_steps_and_divergence_send_alerts(user):
    break_steps(user, "if step >= 4: loss = loss * float('nan')")
    done = user.train("train.max_steps=50", "train.max_bad_steps=3", "callbacks=none", *OFFLINE)
    assert done.returncode == DIVERGED
    (record,) = records(user.only_run())
    first, last = of_kind(record, "alert")  # one for the three bad steps
    assert (first["title"], first["level"], first["wait_duration"]) == ("Step skipped", "ERROR", "300000")
    assert first["text"].startswith("step 4: skipped, because its gradient is not finite")
    assert last["title"] == "Run diverged"
    assert done.stderr == f"gptlab: {last['text']}\n"
    assert exit_code(record) == DIVERGED


@pytest.mark.slow
def test_a_hanging_run_sends_an_alert_and_ends_its_record(user):
    break_steps(user, "if step == 3: import time; time.sleep(3600)")
    done = user.train("trainer.hang_timeout=30", "callbacks=none", *OFFLINE, timeout=300)
    assert done.returncode == HUNG
    (record,) = records(user.only_run())
    (alert,) = of_kind(record, "alert")
    assert alert["title"] == "No progress"
    assert alert["text"] in done.stderr
    assert exit_code(record) == HUNG
    assert [row["_step"] for row in rows(record)] == [1, 2]


@pytest.mark.parametrize(
    ("named", "in_sweep", "agent", "expected"),
    [
        ({}, False, False, (None, "train")),
        ({}, True, False, ("lr-sweep", "sweep")),
        ({"group": "mine", "job_type": "ablation"}, True, False, ("mine", "ablation")),
        ({}, False, True, (None, "sweep")),
    ],
)
def test_a_trial_is_in_the_wandb_group_of_its_sweep(tmp_path, monkeypatch, named, in_sweep, agent, expected):
    directory = tmp_path / "0"
    directory.mkdir()
    record_environment(directory)
    if in_sweep:
        fields = {key: value for key, value in SWEEP.items() if key in Sweep.model_fields}
        Sweep(**fields, wandb_group="lr-sweep").save(tmp_path)
    if agent:
        monkeypatch.setenv("WANDB_SWEEP_ID", "s1")
        monkeypatch.setenv("WANDB_RUN_ID", "r1")
    for name in ("WANDB_DATA_DIR", "WANDB_ERROR_REPORTING"):
        monkeypatch.setenv(name, str(tmp_path))  # restored afterwards
    wandb.teardown()
    config = resolved("logger=wandb", "logger.wandb.mode=offline")
    run = init_run(config, config.logger.wandb.model_copy(update=named), directory)
    group, job_type = run.group, run.settings.run_job_type
    run.finish()
    wandb.teardown()
    assert ((group or None), job_type) == expected
    assert (directory / "wandb_id").read_text() == run.id
    assert not agent or run.id == "r1"


@pytest.mark.slow
def test_values_and_histograms_of_callbacks_are_in_the_record(user):
    (user.folder / "mine.py").write_text(
        "import lightning as L\n"
        "class Logs(L.Callback):\n"
        "    def on_train_batch_end(self, trainer, pl_module, *_):\n"
        "        if trainer.global_step % 2 == 0:\n"
        "            pl_module.log('mine/step', float(trainer.global_step))\n"
        "    def on_validation_epoch_end(self, trainer, pl_module):\n"
        "        pl_module.log('mine/val', float(trainer.global_step))\n"
    )
    watch = ("callbacks=[checkpoint,watch]", "callbacks.watch.every=4", "callbacks.watch.modules=[ln_f]")
    assert_success(user.train(*OFFLINE, *watch, "+callbacks.logs._target_=mine.Logs", "train.log_every=3"))
    (record,) = records(user.only_run())
    found: dict[str, list[int]] = {}
    values: dict[str, list[Any]] = {}
    for row in rows(record):
        for name, value in row.items():
            found.setdefault(name, []).append(int(row["_step"]))
            values.setdefault(name, []).append(value)
    assert found["mine/step"] == values["mine/step"] == [2, 4, 6]
    assert found["mine/val"] == values["mine/val"] == [3, 6]
    assert found["train/loss"] == [1, 3, 6]
    names = [name for name in found if name.startswith(("weights/", "gradients/"))]
    assert {name.split(".")[0] for name in names} == {"weights/ln_f", "gradients/ln_f"}
    assert all(found[name] == [1, 4] for name in names)


def test_the_configuration_has_the_components_of_a_run(tmp_path):
    record_environment(tmp_path)
    config = resolved("data=text", "data.source=text.txt", *NODES)
    found = run_config(config, tmp_path, wandb.Settings())
    assert found["loss"] == {"_target_": "mylab.losses.focal", "gamma": 0.5}
    assert found["model"]["attention"] == {"_target_": "mylab.model.DecayAttention", "decay": 0.7}
    for group, name in (("model", "scale"), ("optimizer", "momentum"), ("schedule", "power")):
        assert found[group]["_target_"].startswith("mylab.")
        assert name in found[group]
    assert found["callbacks"]["step_log"]["every"] == 2
    assert found["logger"]["lines"]["prefix"] == "own/"
    assert found["trainer"]["flags"] == {"detect_anomaly": True}
