"""The wheel: it carries the configuration, and works where there is no checkout."""

import sys
from pathlib import Path

import pytest

from commands import assert_success

ROOT = Path(__file__).parents[1]


@pytest.fixture
def installed(user):
    """A user with the wheel alone: built from the checkout, unpacked elsewhere and found first."""
    assert_success(
        user.run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(user.folder), str(ROOT))
    )
    (wheel,) = user.folder.glob("*.whl")
    site = user.folder / "site"
    assert_success(user.run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", str(site), str(wheel)))
    user.environment["PYTHONPATH"] = str(site)
    return user


def test_the_wheel_works_outside_the_checkout(installed):
    where = installed.run(sys.executable, "-c", "import gptlab; print(gptlab.__file__)")
    assert where.stdout.startswith(str(installed.folder / "site"))
    packaged = installed.folder / "site" / "gptlab" / "conf"
    sources = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").glob("**/*.yaml")}
    sweeps = {path.relative_to(ROOT) for path in (ROOT / "sweeps").rglob("*.yaml")}
    assert {path.relative_to(packaged) for path in packaged.rglob("*.yaml")} == sources | sweeps
    assert_success(installed.train("train.max_steps=2"))
    assert list(installed.only_run().glob("checkpoints/*/state.pt"))
    assert_success(
        installed.python("gptlab.report", "runs=outputs")
    )  # its page is put together of files of the package
    report = (installed.folder / "report.html").read_text()
    assert installed.only_run().name in report
    assert "Plotly" in report
    assert "renderLoss" in report
    shown = installed.python("gptlab.train", "--cfg", "job", "sweeps=lr")
    assert shown.returncode == 0, shown.stderr
