"""Every experiment of the project in a short run."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
EXPERIMENTS = ("combined", "docstrings", "gradient_histogram", "layer_scale", "lion")
SHORT = ("train.max_steps=2", "train.eval_every=2", "train.eval_windows=4", "train.log_every=1")


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Starts all experiments, each in a process that writes to a temporary directory."""
    folder = tmp_path_factory.mktemp("runs")
    paths = os.pathsep.join(filter(None, (str(PROJECT), os.environ.get("PYTHONPATH"))))
    environment = os.environ | {"PYTHONPATH": paths, "GPTLAB_CONF": str(PROJECT / "conf"), "OMP_NUM_THREADS": "1"}
    started = {
        name: subprocess.Popen(
            (sys.executable, "-m", "gptlab.train", f"experiment={name}", "trainer=cpu", *SHORT),
            cwd=folder,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for name in EXPERIMENTS
    }
    yield folder, started
    for process in started.values():
        process.kill()
        process.wait()


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_experiment_trains(runs, name):
    folder, started = runs
    output, _ = started[name].communicate(timeout=300)
    assert started[name].returncode == 0, output
    (metrics,) = folder.glob(f"outputs/{name}/*/metrics.csv")
    header, *rows = metrics.read_text().splitlines()
    assert len(rows) >= 2
    assert ("gradient_decade/-3" in header) == (name in ("combined", "gradient_histogram"))
