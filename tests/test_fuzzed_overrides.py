"""Random overrides of every command: it works or ends in a sentence, within seconds and without a traceback."""

import os
import random
import subprocess
from collections.abc import Iterator

import pytest

from conftest import SMALL
from gptlab.benchmarks.config import BenchCommand
from gptlab.config.base import known_keys
from gptlab.config.command import configuration_folder
from gptlab.config.option_groups import OptionGroups
from gptlab.config.schema import RunConfig
from gptlab.dashboard import DashboardConfig
from gptlab.evaluators.settings import EvaluateConfig
from gptlab.exit_codes import CONFIG_ERROR, DONE
from gptlab.export import ExportConfig
from gptlab.launch.prepare_data import PrepareCommand
from gptlab.planning.settings import KEYS
from gptlab.report import ReportConfig
from gptlab.runs import RunsCommand
from gptlab.sample import SampleConfig
from gptlab.sweeps.config import LocalLauncherConfig, SweeperConfig
from gptlab.verification.configs import ProveArguments

CASES = int(os.environ.get("FUZZ_CASES", "8"))  # of each command
SECONDS = 20  # before a command begins to train, generate, score or measure

# Ends a command where that would begin.
STUBS = """
import sys
import gptlab.launch.launcher as launcher
import gptlab.pretrained.weights as weights

def begin(*arguments, **named):
    raise SystemExit(0)

def check(config, *arguments, **named):
    launcher.preflight(config)
    begin()

launcher.launch, weights.load_model = check, begin
if "-m" in sys.orig_argv[3:]:
    import gptlab.sweeps.sweep_runner as sweep_runner
    sweep_runner.SweepRunner.run = begin
if "gptlab.prove" in sys.orig_argv:
    import gptlab.verification.proofs as proofs
    proofs.prove_all = begin
if "gptlab.bench" in sys.orig_argv:
    from gptlab.benchmarks import data, forecasts, generation, overhead, speedrun, training
    training.measure = data.measure = generation.measure = speedrun.time_to_loss = speedrun.ladder = begin
    overhead.measure_overhead = overhead.measure_guards = forecasts.compare_forecasts = begin
if "gptlab.plan" in sys.orig_argv:
    import gptlab.planning.calibration as calibration
    calibration.calibrate = begin
if "gptlab.dashboard" in sys.orig_argv:
    import gptlab.dashboards.workspace as workspace
    workspace.save_workspace = begin
"""
TRAINING = {*known_keys(RunConfig)}
COMMANDS = {
    "train": (TRAINING, SMALL),
    "train -m": (
        {*TRAINING, *known_keys(SweeperConfig, "hydra.sweeper."), *known_keys(LocalLauncherConfig, "hydra.launcher.")},
        (*SMALL, "-m"),
    ),
    "plan": ({*TRAINING, *KEYS}, SMALL),
    "prove": ({*TRAINING, *known_keys(ProveArguments)}, SMALL),
    "prepare": ({*known_keys(PrepareCommand)}, ("data=text", "data.source=text.txt")),
    "sample": ({*known_keys(SampleConfig)}, ("run=run",)),
    "evaluate": ({*known_keys(EvaluateConfig)}, ("run=run",)),
    "export": ({*known_keys(ExportConfig)}, ("run=run", "format=hf", "out=export")),
    "report": ({*known_keys(ReportConfig)}, ("runs=run",)),
    "runs": ({*known_keys(RunsCommand)}, ("runs=run",)),
    "bench": ({*known_keys(BenchCommand)}, ()),
    "dashboard": ({*known_keys(DashboardConfig)}, ("dry_run=true", "entity=me")),
}
VALUES = (
    *("null", "true", "false", "''", "'  '", "abc", "é", "a/b", ".", "..", "/", "~", "a" * 300, "${nothing}"),
    *("0", "1", "2", "7", "-1", "0.5", "1e-3", "1e-300", "1e300", "nan", "inf", "-inf", "-0.0", f"{2**31}", f"{2**63}"),
    *("[]", "[1]", "[null]", "[[1]]", "[a,b]", "[1,two,3.0]", "{}", "{a:1}", "{a:{b:null}}", "1,2", "1,x", "range(3)"),
    *("interval(0,1)", "choice(1,2)", "glob(*)", "int(3.7)", "auto", "none", "default", "'it''s'", "\\", "???", "*"),
)  # fmt: skip


def draw(rng: random.Random, command: str, keys: list[str]) -> Iterator[str]:
    """Yields one to three overrides."""
    groups = OptionGroups(command, [configuration_folder()])
    for _ in range(rng.randint(1, 3)):
        key = rng.choice(keys)
        if options := groups.options(key.partition(".")[0]):
            key = rng.choice((key, key.partition(".")[0]))
            value = rng.choice((*options, *VALUES)) if "." not in key else rng.choice(VALUES)
        else:
            value = rng.choice(VALUES)
        kind = rng.random()
        if kind < 0.05:
            yield f"~{key}"
        elif kind < 0.1:
            yield f"{key[:-1]}={value}"
        else:
            yield f"{rng.choice(('', '', '', '+', '++'))}{key}={value}"


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_random_overrides_work_or_end_in_a_sentence(user, runs, command):
    keys, base = COMMANDS[command]
    module = command.partition(" ")[0]
    runs.give(user, "halted", "train.max_steps=2", "callbacks=checkpoint").rename(user.folder / "run")
    (user.folder / "stubs").mkdir()
    (user.folder / "stubs" / "sitecustomize.py").write_text(STUBS)
    user.environment["PYTHONPATH"] = os.pathsep.join(
        (str(user.folder / "stubs"), user.environment.get("PYTHONPATH", ""))
    )
    rng, problems = random.Random(f"{command} {os.environ.get('FUZZ_SEED', '')}"), []  # noqa: S311
    for _ in range(CASES):
        overrides = list(draw(rng, module, sorted(keys)))
        try:
            done = user.python(f"gptlab.{module}", *base, *overrides, timeout=SECONDS)
        except subprocess.TimeoutExpired:
            problems.append(f"{overrides}: no end after {SECONDS} s")
            continue
        said = done.stderr.strip()
        if "Traceback" in said or done.returncode not in (DONE, CONFIG_ERROR) or (done.returncode and not said):
            problems.append(f"{overrides}: exit code {done.returncode}: {said[-600:]}")
    assert not problems, f"{len(problems)} of {CASES}:\n" + "\n".join(problems)
