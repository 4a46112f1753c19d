"""Run directories of an earlier version (tests/compatibility) work with every command."""

import csv
import json
import shutil
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from commands import assert_success, metrics

STORED = Path(__file__).parent / "compatibility"
MADE_IN = "/home/someone/gptlab"  # path in the text files of STORED
WINDOWS = 55  # windows of 16 tokens in the val split

# Runs commands in one process, since imports take longer than any command. A separator follows each output.
COMMANDS = """
import json, runpy, sys
for module, *arguments in json.loads(sys.argv[1]):
    sys.argv = [module, *arguments]
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    except SystemExit as end:
        assert not end.code, (module, end.code)
    print("\\x1e", end="", flush=True)
"""


def restore(user, name: str) -> Path:
    """Copies a stored run directory to the user's directory, and replaces the paths in its files."""
    run = user.folder / "outputs" / name / "earlier"
    shutil.copytree(STORED / name, run)
    shutil.copy(STORED / "text.txt", user.folder / "text.txt")
    for path in (*run.glob("*.yaml"), *run.glob("*.json")):
        path.write_text(path.read_text().replace(MADE_IN, str(user.folder)))
    return run


@pytest.mark.parametrize(("name", "vocab_size"), [("single", 257), pytest.param("sharded", 27, marks=pytest.mark.slow)])
def test_a_run_of_an_earlier_version_can_be_read_and_resumed(user, name, vocab_size):
    run = restore(user, name)
    stored_loss = json.loads((run / "state.json").read_text())["val_loss"]
    commands = [
        ["gptlab.runs", "runs=outputs", "format=json"],
        ["gptlab.report", "runs=outputs", "out=report.html"],
        ["gptlab.sample", f"run={run}", "prompt=line", "temperature=1", "top_k=null", "max_new_tokens=60"],
        ["gptlab.evaluate", f"run={run}", f"windows={WINDOWS}"],
        ["gptlab.export", f"run={run}", "format=hf", "out=hf"],
        ["gptlab.train", f"resume={run}", "train.max_steps=42"],
    ]
    done = user.run(sys.executable, "-c", COMMANDS, json.dumps(commands), timeout=600)
    assert_success(done)
    listed, _, sampled, *_ = done.stdout.split("\x1e")

    (line,) = json.loads(listed)
    assert (line["run"], line["state"], line["step"]) == (f"{name}/earlier", "done", 40)
    assert f"{name}/earlier" in (user.folder / "report.html").read_text()
    assert sampled == (STORED / f"{name}.txt").read_text()
    (evaluation,) = (run / "evaluations").glob("*.json")
    assert json.loads(evaluation.read_text())["loss"] == pytest.approx(stored_loss, abs=1e-5)
    with safe_open(user.folder / "hf" / "model.safetensors", "numpy") as file:
        assert file.get_tensor("transformer.wte.weight").shape == (vocab_size, 16)
    with (run / "metrics.csv").open(newline="") as file:
        steps = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    assert steps == list(range(1, 43))
    assert metrics(run, "val/loss")[42] == pytest.approx(stored_loss, abs=0.1)
