"""Files of libraries that contain pickles: those in a directory from somebody else run no code."""

import json
import os
import pickle
import shutil
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

import optuna
import pytest
import submitit
from torch._inductor.runtime.cache_dir_utils import cache_dir

from canary import Canary
from gptlab.errors import UserError
from gptlab.exit_codes import DONE, FAILED
from gptlab.files import COMPILE_CACHE, use_private_compile_cache
from gptlab.parsing import unpickle_plain
from gptlab.sweeps.config import SlurmLauncherConfig
from gptlab.sweeps.search import JOURNAL, STUDY, SafeCmaEsSampler, open_storage
from gptlab.sweeps.slurm_launcher import FOLDER, SlurmLauncher

SPACE = {
    "lr": optuna.distributions.FloatDistribution(1e-4, 1e-2, log=True),
    "x": optuna.distributions.IntDistribution(1, 9),
}


@pytest.fixture
def canary(tmp_path) -> Canary:
    return Canary(tmp_path / "canary")


# --- Optuna


def ask(study: optuna.Study, sampler: type[optuna.samplers.CmaEsSampler], number: int) -> dict[str, float]:
    study.sampler = sampler(seed=number)
    trial = study.ask(SPACE)
    study.tell(trial, trial.params["lr"] + trial.params["x"])
    return trial.params


def replace_states(journal: Path, canary: Canary) -> None:
    """Replaces the states of CMA-ES in a journal, as in one from somebody else."""
    lines, replaced = journal.read_text().splitlines(), 0
    for number, line in enumerate(lines):
        entry = json.loads(line)
        for key in entry.get("system_attr", {}):
            if key.startswith("cma:optimizer"):
                entry["system_attr"][key] = pickle.dumps(canary).hex() if key.endswith(":0") else ""
                replaced += 1
        lines[number] = json.dumps(entry)
    assert replaced
    journal.write_text("\n".join(lines) + "\n")


def test_the_state_of_cmaes_in_the_journal_of_a_sweep_is_not_executed(tmp_path, canary):
    study = optuna.create_study(storage=open_storage(tmp_path), study_name=STUDY)
    for number in range(8):
        ask(study, optuna.samplers.CmaEsSampler, number)
    replace_states(tmp_path / JOURNAL, canary)
    shutil.copytree(tmp_path, tmp_path / "copy")
    ask(optuna.load_study(storage=open_storage(tmp_path / "copy"), study_name=STUDY), optuna.samplers.CmaEsSampler, 8)
    assert canary.was_run(), "the payload has no effect, so the test would prove nothing"
    canary.path.rmdir()
    with pytest.raises(UserError, match=r"CMA-ES in optuna\.journal cannot be read: it refers to posix\.mkdir"):
        ask(optuna.load_study(storage=open_storage(tmp_path), study_name=STUDY), SafeCmaEsSampler, 8)
    assert not canary.was_run()


def test_cmaes_proposes_the_same_points_as_optunas():
    studies = [optuna.create_study() for _ in range(2)]
    for number in range(30):
        points = [
            ask(study, sampler, number)
            for study, sampler in zip(studies, (SafeCmaEsSampler, optuna.samplers.CmaEsSampler), strict=True)
        ]
        assert points[0] == points[1]


# --- submitit


CONFIG = {
    **{"at_once": 1, "timeout_min": 60, "signal_delay_s": 60, "max_num_timeout": 3, "nodes": 1, "tasks_per_node": 1},
    **{"cpus_per_task": None, "gpus_per_node": None, "mem_gb": None, "partition": None, "account": None, "qos": None},
    **{"setup": [], "use_srun": True, "additional_parameters": {}},
}


@pytest.fixture
def launcher(tmp_path, monkeypatch) -> SlurmLauncher:
    (tmp_path / "srun").touch(mode=0o755)  # submitit looks for it
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    return SlurmLauncher(SlurmLauncherConfig(**CONFIG), tmp_path)


def job_with(path: Path, content: bytes) -> SimpleNamespace:
    path.write_bytes(content)
    return SimpleNamespace(job_id="7", paths=SimpleNamespace(result_pickle=path))


def test_the_result_of_a_slurm_job_is_not_executed(tmp_path, launcher, canary):
    job = job_with(tmp_path / "7_0_result.pkl", pickle.dumps(("success", canary)))
    submitit.core.utils.pickle_load(job.paths.result_pickle)
    assert canary.was_run(), "the payload has no effect, so the test would prove nothing"
    canary.path.rmdir()
    assert launcher._result(job) == FAILED
    assert not canary.was_run()


def test_results_of_slurm_jobs_are_read(tmp_path, launcher):
    path = tmp_path / "7_0_result.pkl"
    submitit.core.utils.cloudpickle_dump(("success", DONE), path)
    assert launcher._result(job_with(path, path.read_bytes())) == DONE
    submitit.core.utils.cloudpickle_dump(("error", "Traceback\nValueError: x"), path)
    assert launcher._result(job_with(path, path.read_bytes())) == FAILED


def test_only_the_user_can_write_what_slurm_jobs_unpickle(tmp_path, launcher):
    assert stat.S_IMODE((tmp_path / FOLDER).stat().st_mode) == 0o700


# --- torch.compile


def test_torch_uses_a_compile_cache_that_another_user_can_create_first(monkeypatch):
    monkeypatch.delenv(COMPILE_CACHE, raising=False)
    assert Path(cache_dir()).parent == Path(tempfile.gettempdir())


@pytest.mark.parametrize("kind", ["missing", "own", "writable", "link", "other"])
def test_the_compile_cache_is_private(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.delenv(COMPILE_CACHE, raising=False)
    path = tmp_path / f"gptlab-compiled-{os.getuid()}"
    match kind:
        case "own":
            path.mkdir(mode=0o700)
        case "writable":
            path.mkdir()
            path.chmod(0o777)
        case "link":
            (tmp_path / "elsewhere").mkdir(mode=0o700)
            path.symlink_to(tmp_path / "elsewhere")
        case "other":
            other = os.getuid() + 1
            (tmp_path / f"gptlab-compiled-{other}").mkdir(mode=0o700)
            monkeypatch.setattr(os, "getuid", lambda: other)
    use_private_compile_cache()
    found = Path(os.environ[COMPILE_CACHE])
    assert stat.S_IMODE(found.lstat().st_mode) == 0o700
    assert found.parent == tmp_path
    assert (found == path) == (kind in ("missing", "own"))


def test_a_compile_cache_that_the_user_sets_is_used(monkeypatch):
    monkeypatch.setenv(COMPILE_CACHE, "/mine")
    use_private_compile_cache()
    assert os.environ[COMPILE_CACHE] == "/mine"


def test_only_permitted_names_are_unpickled():
    plain = {"a": [1, "b", 2.5, None, True, (b"c",)]}
    assert unpickle_plain(pickle.dumps(plain)) == plain
    assert unpickle_plain(pickle.dumps(Path), {"pathlib.Path"}) is Path
    for name in ("pathlib.PurePath", "pathlib.Path.cwd", "Path"):
        with pytest.raises(pickle.UnpicklingError, match=r"it refers to pathlib\.Path, which is not plain data"):
            unpickle_plain(pickle.dumps(Path), {name})
