"""The checks of part 1 of check.sh as tests, on a machine with a GPU (``make test-gpu``)."""

import ast
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from judge_runs import COMPARED, LEARNING, REPEATED

HERE = Path(__file__).parent
RUNS = ["cpu32", "muoncpu", *COMPARED, *LEARNING, *REPEATED, "oom", "sample", "synced", "gpt2", "bench"]
# Without trainer.deterministic, a run on a GPU need not be repeated exactly.
NOT_REQUIRED = {"again", "half"}

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA GPU")]


def unit_checks() -> list[str]:
    """Returns the names of the checks in unit_checks.py, which have a decorator."""
    tree = ast.parse((HERE / "unit_checks.py").read_text())
    return [node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list]


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Runs all checks, and returns their lines with PASS, FAIL or INFO."""
    folder = tmp_path_factory.mktemp("gpu")
    environment = os.environ | {"PY": sys.executable, "OUT": str(folder / "out"), "WORK": str(folder / "work")}
    command = ("bash", str(HERE / "check.sh"), "1")
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=900)
    print(done.stdout, done.stderr[-2000:])
    return [line for line in done.stdout.splitlines() if re.match("(PASS|FAIL|INFO) ", line)]


@pytest.mark.parametrize("name", [*(f"unit.{name}" for name in unit_checks()), *(f"run.{name}" for name in RUNS)])
def test_check_passes_on_the_gpu(lines: list[str], name: str) -> None:
    found = [line for line in lines if line[5:].startswith(f"{name}:")]
    failed = [line for line in found if line.startswith("FAIL")]
    if failed and name.removeprefix("run.") in NOT_REQUIRED:
        pytest.xfail(failed[0])
    assert found or name in ("run.cpu32", "run.muoncpu"), f"{name} has no result: {lines[-3:]}"
    assert not failed, "\n".join(failed)
