"""Workers do not validate the configuration again, and each process opens the data once."""

import json
import os
import sys
from collections import Counter

import pytest

from commands import assert_success
from configs import resolved
from conftest import SMALL
from gptlab.launch.supervisor import Job, read_job
from gptlab.training.batch_plan import plan_batch

# Pydantic calls a plugin for every validation, in every process that has this folder on its path; Python calls
# sitecustomize as it starts, and the audit hook for every file that is opened.
PLUGIN = """
import os

class OnEnter:
    def on_enter(self, *args, **options):
        os.write(LOG, b"%d validate RunConfig\\n" % os.getpid())

class Plugin:
    def new_schema_validator(self, schema, schema_type, schema_type_path, schema_kind, config, plugin_settings):
        handler = OnEnter() if schema_type_path.name == "RunConfig" else None
        return handler, handler, handler

LOG = os.open(os.path.join(os.path.dirname(__file__), "log.txt"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
plugin = Plugin()
"""
SITECUSTOMIZE = """
import os, sys

LOG = os.open(os.path.join(os.path.dirname(__file__), "log.txt"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)

def audit(event, args):
    if event == "open" and ("r" in args[1] if args[1] else not args[2] & (os.O_WRONLY | os.O_RDWR)):
        name = os.path.basename(str(args[0]))
        if name in ("manifest.json", "config.yaml", "config.json"):
            os.write(LOG, b"%d open %s\\n" % (os.getpid(), name.encode()))

sys.addaudithook(audit)
"""


class Log:
    """Log of what the processes of a command validate and open."""

    def __init__(self, user) -> None:
        self.user, self.folder = user, user.folder / "observer"
        info = self.folder / "observer-1.0.dist-info"
        info.mkdir(parents=True)
        (self.folder / "observer.py").write_text(PLUGIN)
        (self.folder / "sitecustomize.py").write_text(SITECUSTOMIZE)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: observer\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text("[pydantic]\nobserver = observer:plugin\n")
        others = user.environment.get("PYTHONPATH", os.environ.get("PYTHONPATH"))
        user.environment["PYTHONPATH"] = os.pathsep.join(filter(None, (str(self.folder), others)))

    def of(self, *arguments: str) -> dict[str, list[int]]:
        """Trains, and returns how often each process did each of these."""
        (self.folder / "log.txt").unlink(missing_ok=True)
        assert_success(self.user.run(sys.executable, "-m", "gptlab.train", *arguments, timeout=300))
        lines = [line.split(maxsplit=1) for line in (self.folder / "log.txt").read_text().splitlines()]
        counts = Counter((event, pid) for pid, event in lines)
        return {event: sorted(n for (e, _), n in counts.items() if e == event) for event, _ in counts}


@pytest.fixture
def log(user) -> Log:
    return Log(user)


DDP = ("trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu")


@pytest.mark.slow
def test_a_run_of_two_processes_is_validated_once_and_opens_the_data_once_per_process(user, runs, log):
    run = runs.give(user, "first")
    assert_success(user.python("gptlab.prepare", "data=text", "data.source=text.txt"))
    found = log.of(*SMALL, *DDP, "name=two")
    assert found["validate RunConfig"] == [1]
    assert found["open manifest.json"] == [1, 1, 1]  # the launching process and two workers
    found = log.of(f"resume={run}", *DDP, "train.max_steps=7")
    # in the launching process: the recorded configuration, and the new one before and after it is compared with it
    assert found["validate RunConfig"] == [3]
    assert found["open config.yaml"] == [1, 2]  # the first worker records it again


@pytest.mark.slow
def test_the_trials_of_a_sweep_are_validated_only_by_the_sweep(user, log):
    found = log.of("-m", *SMALL, "seed=1,2", "train.max_steps=2", "train.eval_every=1", "trainer.accelerator=cpu")
    assert found["validate RunConfig"] == [2]  # in one process, each point once


@pytest.mark.slow
def test_each_process_reads_external_weights_once(user, runs, log):
    run = runs.give(user, "first")
    assert_success(user.python("gptlab.export", f"run={run}", "format=hf", "out=hf"))
    found = log.of(*SMALL, *DDP, "init_from=hf", "model.activation=gelu_tanh", "name=two")
    assert found["open config.json"] == [1, 1, 1]  # the workers compare it with the weights
    assert found["validate RunConfig"] == [1]


def test_a_job_file_round_trips(tmp_path):
    config = resolved("train.batch_schedule=[[2,4],[4,8]]", "optimizer=muon", "init_from=gpt2")
    for run_dir, plan in ((None, None), (tmp_path / "run", plan_batch(16, 4, 2, [(2, 4), (4, 8)]))):
        Job(config, run_dir, plan).write(tmp_path / "job.json")
        assert read_job(tmp_path / "job.json") == (config, run_dir, plan)


def test_a_job_file_of_an_earlier_version_is_read(tmp_path):
    config = resolved()
    values = {"config": config.model_dump(mode="json"), "place": str(tmp_path / "run")}
    (tmp_path / "job.json").write_text(json.dumps(values))
    assert read_job(tmp_path / "job.json") == (config, tmp_path / "run", None)
