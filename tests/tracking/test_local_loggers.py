"""Records of MLflow and Trackio; a resumed run continues its record."""

import json
import sys
from importlib.util import find_spec

import pytest

from commands import assert_config_error, assert_success, metrics

pytestmark = pytest.mark.slow  # whole runs

READ_TRACKIO = """
import json
from trackio.sqlite_storage import SQLiteStorage
(name,) = SQLiteStorage.get_runs("gptlab")
rows = SQLiteStorage.get_logs("gptlab", name)
print(json.dumps([name, {row["step"]: row["train/loss"] for row in rows if "train/loss" in row}]))
"""


def train_and_resume(user, *arguments: str):
    assert_success(user.train("callbacks=checkpoint", *arguments))
    directory = user.only_run()
    assert_success(user.python("gptlab.train", f"resume={directory}", "train.max_steps=9"))
    return directory


@pytest.mark.slow
def test_mlflow_has_one_run_with_every_row(user):
    mlflow = pytest.importorskip("mlflow")
    directory = train_and_resume(user, "logger=[csv,mlflow]", "trainer=ddp", "trainer.devices=2")
    client = mlflow.MlflowClient(f"sqlite:///{user.folder}/outputs/mlflow.db")
    (experiment,) = (found for found in client.search_experiments() if found.name == "gptlab")
    (run,) = client.search_runs([experiment.experiment_id])
    assert (run.info.run_name, run.info.status) == (f"quickstart/{directory.name}", "FINISHED")
    assert run.data.params["model/n_layer"] == "2"
    recorded = {point.step: point.value for point in client.get_metric_history(run.info.run_id, "train/loss")}
    assert recorded == pytest.approx(metrics(directory, "train/loss"))
    assert len(recorded) == 9


@pytest.mark.slow
def test_trackio_has_one_run_with_every_row(user):
    pytest.importorskip("trackio")
    user.environment["TRACKIO_DIR"] = str(user.folder / "trackio")
    directory = train_and_resume(user, "logger=[csv,trackio]", "trainer=ddp", "trainer.devices=2")
    done = user.run(sys.executable, "-c", READ_TRACKIO)
    assert_success(done)
    name, recorded = json.loads(done.stdout.splitlines()[-1])
    assert name == f"quickstart/{directory.name}"
    assert {int(step): loss for step, loss in recorded.items()} == pytest.approx(metrics(directory, "train/loss"))


@pytest.mark.parametrize("package", ["mlflow", "trackio"])
def test_a_missing_package_is_reported_before_anything_is_written(user, package):
    if find_spec(package):
        pytest.skip(f"{package} is installed")
    done = user.train(f"logger=[csv,{package}]")
    assert_config_error(done, f"logger={package} needs the {package} package: pip install '.[{package}]'")
    assert not (user.folder / "outputs").exists()
