"""Run directories of an earlier version (tests/compatibility) work with every command."""

import csv
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors import safe_open

from commands import assert_config_error, assert_same_run, assert_success, metrics
from conftest import SMALL
from gptlab.config.search_path import configuration_folder

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


@pytest.mark.slow
def test_keys_that_an_earlier_run_lacks_get_their_defaults_and_are_printed_once(user, halted):
    config = halted / "config.yaml"
    kept = [
        line for line in config.read_text().splitlines(keepends=True) if "dropout" not in line and "lr_r" not in line
    ]
    config.write_text("".join(kept))
    resume = ("gptlab.train", f"resume={halted}", "train.max_steps=9")
    done = user.python(*resume)
    assert_success(done)
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"gptlab: {config}")
    assert line.endswith("model.dropout=0.0, schedule.min_lr_ratio=0.1.")
    assert_same_run(halted, user.only_run("whole"))
    assert user.python(*resume).stderr == ""  # the resumed run has recorded the values


# The recipe "A model option" of CONTRIBUTING.md: file, line that is found, and lines to insert in front of it
OPTION = (
    ("src/gptlab/model/config.py", "    block: Annotated[", "    mlp_gain: Annotated[bool, Option('modern', False)]\n"),
    (
        "src/gptlab/model/config.py",
        "        2 * config.n_layer * config.x0",
        "        config.n_layer * config.mlp_gain +\n",
    ),
    ("conf/model/gpt.yaml", "block: null", "mlp_gain: false\n"),
    (
        "src/gptlab/model/modern.py",
        "        self.ln_2 = _norm(config, layer)",
        "        self.mlp_gain = nn.Parameter(torch.ones(1)) if config.mlp_gain else None\n",
    ),
)


@pytest.mark.slow
def test_a_model_option_added_by_the_recipe_keeps_earlier_runs_usable(user, halted):
    root = configuration_folder().parent
    for folder in ("src", "conf", "sweeps"):
        shutil.copytree(root / folder, user.folder / "gptlab" / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for name, line, inserted in OPTION:
        path = user.folder / "gptlab" / name
        text = path.read_text()
        assert text.count(line) == 1
        path.write_text(text.replace(line, inserted + line))
    user.environment["PYTHONPATH"] = str(user.folder / "gptlab" / "src")

    def run(module: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return user.run(sys.executable, "-m", module, *arguments, timeout=300)

    for command in (
        ("gptlab.sample", f"run={halted}", "max_new_tokens=4", "prompt=line"),
        ("gptlab.export", f"run={halted}", "format=gguf", "out=gguf"),
        ("gptlab.train", f"resume={halted}", "train.max_steps=9"),
    ):
        done = run(*command)
        assert_success(done)
        assert done.stderr.count("model.mlp_gain=false") == 1
    assert_same_run(halted, user.only_run("whole"))
    done = run("gptlab.train", *SMALL, "name=new", "model.mlp_gain=true", "callbacks=checkpoint")
    assert_success(done)
    assert "parameters exact" in done.stdout
    done = run("gptlab.export", f"run={user.only_run('new')}", "format=gguf", "out=gguf2")
    assert_config_error(done, "format=gguf does not support model.mlp_gain=true")
