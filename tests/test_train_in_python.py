"""gptlab.train(...) in Python: the run that it returns, its exception, and that it leaves nothing behind."""

import gc
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import nbformat
import pytest
import torch
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from nbclient import NotebookClient

import gptlab
from commands import assert_success, metrics, weights
from conftest import SMALL
from gptlab import TrainingError
from gptlab.config.override_values import format_value

INTERRUPTED = """
import gptlab
try:
    gptlab.train({overrides})
except KeyboardInterrupt as error:
    print("message:", error, flush=True)
"""


@pytest.fixture
def here(user, monkeypatch):
    """User whose directory and environment are those of this process."""
    monkeypatch.chdir(user.folder)
    for name in ("GPTLAB_CACHE", "OMP_NUM_THREADS"):
        monkeypatch.setenv(name, user.environment[name])
    return user


def state() -> dict[str, object]:
    """Returns what a training run changes in a process that it shares."""
    return {
        "environment": dict(os.environ),
        "arguments": list(sys.argv),
        "directory": Path.cwd(),
        "signals": [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)],
        "handlers": [list(logging.getLogger(name).handlers) for name in (None, "gptlab", "py.warnings")],
        "warnings": list(warnings.filters),
        "garbage collection": gc.get_threshold(),
        "random numbers": torch.get_rng_state().tolist(),
        "dtype": torch.get_default_dtype(),
        "precision": torch.get_float32_matmul_precision(),
        "torch threads": torch.get_num_threads(),
        "threads": threading.active_count(),
        "hydra": GlobalHydra.instance().is_initialized(),
        "children": children(os.getpid()),
    }


def children(pid: int) -> list[str]:
    found = subprocess.run(("pgrep", "-P", str(pid)), capture_output=True, text=True, check=False).stdout.split()
    return [child for child in found if Path(f"/proc/{child}/cmdline").read_bytes().find(b"gptlab.train") >= 0]


@pytest.mark.parametrize(
    "value",
    [
        None,
        True,
        3,
        1e-3,
        1e16,
        "nano",
        "1e-3",
        "null",
        "",
        "a,b",
        "it's",
        "a\\",
        "ü=1",
        "[1]",
        " a ",
        [1, "a,b", None],
        {},
    ],
)
def test_a_formatted_value_is_parsed_by_hydra_as_the_same_value(value):
    parsed = OverridesParser.create().parse_override(f"key={format_value(value)}").value()
    parsed = [getattr(item, "text", item) for item in parsed] if isinstance(parsed, list) else parsed
    assert (type(parsed), parsed) == (type(value), value)


def test_a_formatted_mapping_is_parsed_by_hydra_as_the_same_mapping():
    value = {"optimizer.lr": 1e-3, "names": ["a", "b"], "deep": {"n": 1}}
    assert OverridesParser.create().parse_override(f"key={format_value(value)}").value() == value


def test_a_mistake_raises_the_exception_with_its_sentence_and_leaves_nothing(here, capfd):
    before = state()
    with pytest.raises(TrainingError, match=r"optimizer\.lrr`\. Did you mean optimizer\.lr\?") as error:
        gptlab.train({"optimizer": {"lrr": 1e-3}})
    assert (error.value.exit_code, error.value.run_dir) == (2, None)
    assert state() == before
    assert {path.name for path in here.folder.iterdir()} == {"text.txt"}
    assert capfd.readouterr().err == ""  # the exception has the sentence


@pytest.mark.parametrize(
    "overrides", ["model=nano", ["-m", "seed=1,2"], ["hydra.mode=MULTIRUN"], {"seed": object()}, [1]]
)
def test_overrides_that_are_not_those_of_one_run_raise_the_exception(overrides):
    with pytest.raises(TrainingError) as error:
        gptlab.train(overrides)
    assert error.value.exit_code == 2


def test_a_component_of_the_calling_script_is_refused_with_what_to_do(here):
    with pytest.raises(TrainingError, match=r"__main__\.Mine .* Move it .* to a module"):
        gptlab.train([*SMALL, "+callbacks.mine._target_=__main__.Mine"])


def test_gptlab_train_is_imported_without_torch_and_also_as_a_module(here):
    code = "import sys, gptlab.train; from gptlab import train; assert train is gptlab.train; assert callable(train)"
    assert_success(here.run(sys.executable, "-c", f"{code}; assert 'torch' not in sys.modules"))


@pytest.mark.slow
def test_a_run_in_python_is_that_of_the_command_and_changes_nothing_in_the_caller(here, capsys):
    assert_success(here.train("name=command"))
    torch.set_default_dtype(torch.float64)  # of the caller: the run has its own
    try:
        before = state()
        run = gptlab.train([*SMALL, "name=python"])
        assert state() == before
    finally:
        torch.set_default_dtype(torch.float32)
    assert run.directory == here.only_run("python")
    command = here.only_run("command")
    for name in ("train/loss", "val/loss", "grad_norm"):
        assert metrics(run.directory, name) == metrics(command, name)
    assert all(torch.equal(value, weights(command)[name]) for name, value in weights(run.directory).items())
    losses = metrics(command, "val/loss")
    assert (run.metrics["step"], run.metrics["val/loss"]) == (6, losses[6])
    assert run.best_checkpoint == run.directory / "checkpoints" / f"step_{min(losses, key=losses.get):06}"
    assert "step 6/6 · loss" in capsys.readouterr().out
    recorded = json.loads((run.directory / "environment.json").read_text())["command"]
    assert recorded.split()[1:4] == ["-m", "gptlab.train", SMALL[0]]


@pytest.mark.slow
def test_a_failing_callback_raises_the_exception_with_the_run_directory(here, capsys):
    (here.folder / "mine.py").write_text(
        "import lightning as L\n\n\nclass Failing(L.Callback):\n"
        "    def on_train_batch_end(self, *args):\n        raise RuntimeError('boom')\n"
    )
    with pytest.raises(TrainingError, match="boom") as error:
        gptlab.train([*SMALL, "+callbacks.mine._target_=mine.Failing"])
    assert (error.value.exit_code, error.value.run_dir) == (1, here.only_run())
    assert "RuntimeError: boom" in capsys.readouterr().out
    assert children(os.getpid()) == []


@pytest.mark.slow
def test_a_run_can_be_trained_in_a_thread(here):
    found = []
    thread = threading.Thread(target=lambda: found.append(gptlab.train([*SMALL, "train.max_steps=3"])))
    thread.start()
    thread.join()
    assert found[0].metrics["step"] == 3


@pytest.mark.slow
def test_a_notebook_trains_twice_and_goes_on_after_a_mistake(user):
    cells = [
        f"import gptlab\noverrides = {[*SMALL, 'train.max_steps=3']}",
        "first = gptlab.train(overrides)",
        "second = gptlab.train(overrides)",
        "try:\n    gptlab.train(['model=nono'])\nexcept gptlab.TrainingError as error:\n    print(error)",
        "print(first.metrics['val/loss'] == second.metrics['val/loss'], first.directory != second.directory)",
    ]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
    environment = {name: user.environment[name] for name in ("GPTLAB_CACHE", "OMP_NUM_THREADS")}
    kernel = NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(user.folder)}})
    kernel.execute(env=os.environ | environment)
    texts = ["".join(output.get("text", "") for output in cell.outputs) for cell in notebook.cells]
    assert "step 3/3 · loss" in texts[1]
    assert "step 3/3 · loss" in texts[2]
    assert "Unknown option model=nono" in texts[3]
    assert texts[4] == "True True\n"


@pytest.mark.slow
def test_an_interrupt_saves_the_run_and_tells_how_to_resume_it(user):
    run, directory = begin(user)
    run.send_signal(signal.SIGINT)
    output = run.ended().stdout
    saved = sorted(directory.glob("checkpoints/step_*"))[-1]
    assert f'message: Interrupted. To resume: gptlab.train(["resume={directory}"])' in output
    assert f"at step {int(saved.name.removeprefix('step_'))}. To resume" in output


@pytest.mark.slow
def test_the_run_ends_if_the_caller_is_killed(user):
    run, _ = begin(user)
    (child,) = children(run.pid)
    run.kill()
    run.communicate()
    limit = time.monotonic() + 20
    while Path(f"/proc/{child}").exists():
        assert time.monotonic() < limit
        time.sleep(0.05)


def begin(user):
    """Starts a long run in a script; returns the script and the run directory, when the run is training."""
    (user.folder / "script.py").write_text(INTERRUPTED.format(overrides=[*SMALL, "train.max_steps=100000"]))
    run = user.begin("script")
    run.until(lambda: any(user.folder.glob("outputs/*/*/metrics.csv")))
    return run, user.only_run()
