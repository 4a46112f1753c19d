"""The scripts of tests/gpu without a GPU: their imports exist, and they run on the CPU."""

import ast
import csv
import importlib.util
import re
import sys
from pathlib import Path

import pytest

GPU = Path(__file__).parent / "gpu"
SCRIPTS = sorted(set(GPU.glob("*.py")) - {GPU / "test_gpu.py"})
PACKAGE = Path(importlib.util.find_spec("gptlab").origin).parent


def imports(script: Path) -> list[tuple[str, list[str]]]:
    """Returns the modules that a script imports, and the names imported from each."""
    found = []
    for node in ast.walk(ast.parse(script.read_text())):
        if isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found.append((node.module, [alias.name for alias in node.names]))
    return found


def defined(file: Path) -> set[str]:
    """Returns the names that a module defines or imports at its top level."""
    names = set()
    for node in ast.parse(file.read_text()).body:
        if isinstance(node, ast.ClassDef | ast.FunctionDef):
            names.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names |= {alias.asname or alias.name for alias in node.names}
        else:
            names |= {name.id for name in ast.walk(node) if isinstance(name, ast.Name)}
    return names


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_import_of_a_gpu_check_exists(script):
    siblings = {other.stem: other for other in SCRIPTS}
    for module, names in imports(script):
        package = module.partition(".")[0]
        if package != "gptlab" and module not in siblings:
            assert importlib.util.find_spec(package), module
            continue
        file = siblings.get(module) or Path(importlib.util.find_spec(module).origin)
        assert set(names) <= defined(file), module


def test_every_module_and_file_that_gpu_checks_name_exists():
    text = "".join(file.read_text() for file in (*SCRIPTS, GPU / "check.sh"))
    modules = set(re.findall(r"(?:-m |run_module\(\")(gptlab\.[\w.]+)", text))
    assert {"gptlab.train", "gptlab.sample"} <= modules
    assert all(importlib.util.find_spec(module) for module in modules)
    files = set(re.findall(r"\b(?:training|launch|model|config)/[\w/]+\.py", text))
    assert [file for file in sorted(files) if not (PACKAGE / file).exists()] == []
    scripts = set(re.findall(r"\$HERE/(\w+\.py)", text))
    assert scripts == {script.name for script in SCRIPTS} - {"measuring.py", "kill_at_step.py"}


def verdicts_in(output: str) -> dict[str, list[str]]:
    """Returns the verdicts by the name of the check."""
    verdicts: dict[str, list[str]] = {}
    for verdict, name in re.findall(r"^(PASS|FAIL|INFO) (?:unit|run)\.(\w+):", output, re.MULTILINE):
        verdicts.setdefault(name, []).append(verdict)
    return verdicts


@pytest.mark.slow
def test_unit_checks_pass_on_a_cpu(user):
    user.environment["CUDA_VISIBLE_DEVICES"] = ""
    done = user.run(sys.executable, "-W", "ignore", str(GPU / "unit_checks.py"), timeout=300)
    assert done.returncode == 0, done.stderr
    verdicts = verdicts_in(done.stdout)
    tree = ast.parse((GPU / "unit_checks.py").read_text())
    checks = {node.name for node in tree.body if isinstance(node, ast.FunctionDef) and node.decorator_list}
    assert verdicts.keys() == checks - {"cache_error"}
    assert "\nFAIL" not in done.stdout
    assert len(verdicts["cached_generation"]) == 4


@pytest.mark.slow
def test_the_training_runs_of_gpu_checks_pass_on_a_cpu(user):
    # the path of the text is relative to the working directory of each run
    small = "model=tiny data=text data.source=../../../text.txt train.eval_windows=8"
    user.environment |= {
        "GPU": "trainer=cpu",
        "ONLY": "cpu32 gpu32 masked maskedcpu whole_d half_d",
        "ARGS": f"{small} train.max_steps=12 train.eval_every=6",
        "PY": sys.executable,
        "JOBS": "2",
        "OUT": "out",
        "WORK": "work",
    }
    done = user.run("bash", str(GPU / "check.sh"), "1", timeout=400)
    assert done.returncode == 0, done.stderr
    expected = {"gpu32": ["PASS"], "masked": ["PASS"], "half_d": ["PASS"]}
    assert verdicts_in(done.stdout) == expected, done.stdout
    assert verdicts_in((user.folder / "out/judged-1.txt").read_text()) == expected
    assert (user.folder / "out/logs-1.tgz").exists()
    change_losses(user.folder / "work/part1/gpu32", by=0.1)
    judge = (sys.executable, str(GPU / "judge_runs.py"), "work/part1", "1", "gpu32", "masked")
    assert verdicts_in(user.run(*judge).stdout) == expected | {"gpu32": ["FAIL"]}


def change_losses(directory: Path, by: float) -> None:
    """Adds a constant to the recorded training losses of a run."""
    (path,) = directory.glob("outputs/*/*/metrics.csv")
    with path.open(newline="") as file:
        rows = list(csv.DictReader(file))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        for row in rows:
            writer.writerow(row | {"train/loss": float(row["train/loss"]) + by} if row["train/loss"] else row)
