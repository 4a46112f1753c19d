"""The wheel contains the configuration and works without a checkout."""

import sys
from pathlib import Path

import pytest

from commands import assert_success
from gptlab.projects.project import template_files

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(user, wheel):
    """User with gptlab from the wheel instead of the checkout."""
    user.environment["PYTHONPATH"] = str(wheel)
    return user


def test_the_wheel_works_outside_the_checkout(installed, wheel):
    where = installed.run(sys.executable, "-c", "import gptlab; print(gptlab.__file__)")
    assert where.stdout.startswith(str(wheel))
    packaged = wheel / "gptlab" / "conf"
    sources = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").glob("**/*.yaml")}
    sweeps = {path.relative_to(ROOT) for path in (ROOT / "sweeps").rglob("*.yaml")}
    assert {path.relative_to(packaged) for path in packaged.rglob("*.yaml")} == sources | sweeps
    assert_success(installed.train("train.max_steps=2"))
    assert list(installed.only_run().glob("checkpoints/*/state.pt"))
    # the page is assembled from files of the package
    assert_success(installed.python("gptlab.report", "runs=outputs"))
    report = (installed.folder / "report.html").read_text()
    assert installed.only_run().name in report
    assert "Plotly" in report
    assert "renderLoss" in report
    assert_success(installed.python("gptlab.new", "lab"))
    written = [path for path in (installed.folder / "lab").rglob("*") if path.is_file()]
    assert len(written) == len(template_files())
    shown = installed.python("gptlab.train", "--cfg", "job", "sweeps=lr")
    assert shown.returncode == 0, shown.stderr
    (installed.folder / "conf" / "optimizer").mkdir(parents=True)
    (installed.folder / "conf" / "optimizer" / "mine.yaml").write_text("defaults: [adamw]\nbetas: [0.5, 0.6]\n")
    shown = installed.python("gptlab.train", "--cfg", "job", "-p", "optimizer.betas", "optimizer=mine")
    assert shown.stdout == "# @package optimizer.betas\n- 0.5\n- 0.6\n", shown.stderr
