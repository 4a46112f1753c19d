"""Files of a run directory that were made to cause errors: a sentence and exit code 2, and no access to memory."""

import copy
import json
import random
import shutil
from pathlib import Path

import pytest
import torch
import yaml
from torch import nn

from commands import assert_config_error
from conftest import defaults
from gptlab.config.base import validate
from gptlab.config.locations import TRUST_PATHS
from gptlab.data.tokenizers.external import tokenizer_record
from gptlab.errors import UserError
from gptlab.exit_codes import CONFIG_ERROR, DIVERGED, DONE
from gptlab.exporters.model_card import ModelCardInfo
from gptlab.pretrained.source import open_model_source
from gptlab.pretrained.weights import load_model
from gptlab.reporting.reading import RunReader
from gptlab.tracking.loggers import _read_rows
from gptlab.tracking.run_directory import load_config
from gptlab.tracking.run_store.listing import format_table, list_runs, split_unreadable
from gptlab.tracking.run_store.runs import Run, find_runs
from gptlab.training.checkpoints.reading import read_checkpoint, read_weights
from gptlab.training.checkpoints.records import list_checkpoints
from gptlab.training.config import AdamWConfig
from gptlab.training.optim.optimizers import build_optimizer
from mutations import mutate, record_again

STORED = Path(__file__).parents[1] / "compatibility"


def copy_run(folder: Path, name: str = "single") -> Path:
    """Copies a run, with the paths in its configuration replaced by those of the folder."""
    run = folder / "run"
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(STORED / name, run)
    shutil.copy(STORED / "text.txt", folder / "text.txt")
    for path in (*run.glob("*.yaml"), *run.glob("*.json")):
        path.write_text(path.read_text().replace("/home/someone/gptlab", str(folder)))
    return run


def newest(run: Path) -> Path:
    return max((run / "checkpoints").iterdir())


def read_everything(run: Path) -> None:
    """Reads all files of a run as the commands do; raises nothing but UserError if those of the model are damaged."""
    readable, _ = split_unreadable([Run(run)])
    if readable:
        format_table(list_runs(readable, [], "run", descending=False), ["run", "state", "step", "loss"], left_out=0)
    RunReader(100, "val/loss").read([run])
    try:
        _read_rows(run / "metrics.csv", 40)
        source = open_model_source(str(run))
        source.tokenizer()
        load_model(source)
    except UserError:
        pass


@pytest.mark.parametrize("seed", [0, 1, 2, *(pytest.param(seed, marks=pytest.mark.slow) for seed in range(3, 8))])
def test_damaged_files_raise_no_other_error(tmp_path, monkeypatch, seed):
    monkeypatch.setenv(TRUST_PATHS, "1")
    choose = random.Random(seed)  # noqa: S311
    for _ in range(15):
        run = copy_run(tmp_path, choose.choice(["single", "sharded"]))
        files = sorted(path for path in run.rglob("*") if path.is_file())
        done = mutate(choose.choice([*files, newest(run) / "state.pt", run / "config.yaml"]), choose)
        try:
            read_everything(run)
        except Exception as error:
            raise AssertionError(done) from error


COMMANDS = (
    ("gptlab.sample", "run=run", "max_new_tokens=2"),
    ("gptlab.evaluate", "run=run", "windows=1"),
    ("gptlab.export", "run=run", "format=hf", "out=hf"),
    ("gptlab.train", "resume=run", "train.max_steps=41"),
)


def test_names_that_only_look_like_numbers_are_no_checkpoints_and_no_samples(tmp_path):
    for name in ("checkpoints/step_\u00b2", "samples/step_\u00b2.txt", "\u00b2/config.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert list_checkpoints(tmp_path / "checkpoints") == []
    assert Run(tmp_path).samples() == ([], [])
    assert len(find_runs(str(tmp_path))) == 1


def test_metrics_that_are_not_text_are_named(tmp_path):
    run = copy_run(tmp_path)
    (run / "metrics.csv").write_bytes(bytes(range(256)) * 4)
    with pytest.raises(UserError, match=r"/metrics\.csv cannot be read: it is not UTF-8 text"):
        ModelCardInfo.of(open_model_source(str(run)))


def test_a_missing_item_of_a_list_is_refused(tmp_path):
    run = copy_run(tmp_path)
    values = yaml.safe_load((run / "config.yaml").read_text())
    values["optimizer"]["betas"] = [0.9]
    (run / "config.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(UserError, match=r"optimizer\.betas"):
        load_config(run)


@pytest.mark.slow
def test_commands_on_damaged_files_end_with_a_sentence(user):
    choose = random.Random(1)  # noqa: S311
    user.environment[TRUST_PATHS] = "1"
    for number in range(8):
        run = copy_run(user.folder)
        path = choose.choice(
            [newest(run) / "state.pt", run / "config.yaml", run / "manifest.json", run / "metrics.csv"]
        )
        damage = mutate(path, choose)
        shutil.rmtree(user.folder / "hf", ignore_errors=True)
        done = user.python(*COMMANDS[number % len(COMMANDS)])
        assert done.returncode in (DONE, CONFIG_ERROR, DIVERGED), damage + done.stderr
        assert "Traceback" not in done.stderr, damage + done.stderr


@pytest.mark.parametrize(
    "damage", ["missing weights", "other shape", "missing moment", "state of a callback", "version", "metrics"]
)
def test_a_run_with_a_damaged_checkpoint_or_metrics_is_not_resumed(user, damage):
    run = copy_run(user.folder)
    path = newest(run) / "state.pt"
    checkpoint = torch.load(path, weights_only=True)
    if damage == "missing weights":
        del checkpoint["state_dict"]["wte.weight"]
    elif damage == "other shape":
        checkpoint["state_dict"]["wte.weight"] = torch.zeros(3, 3)
    elif damage == "missing moment":
        del checkpoint["optimizer_states"][0]["state"]["wte.weight"]["exp_avg"]
    elif damage == "version":
        checkpoint["pytorch-lightning_version"] = "new"
    elif damage == "state of a callback":
        checkpoint["callbacks"]["Recorder"]["seconds"] = "soon"
    else:
        (run / "metrics.csv").write_text("step,val/loss\n1,x\0y\n")
    torch.save(checkpoint, path)
    record_again(path.parent)
    before = (run / "metrics.csv").read_bytes()
    done = user.python("gptlab.train", "resume=run", "train.max_steps=41", "trust_paths=true")
    assert_config_error(done, "metrics.csv cannot be read" if damage == "metrics" else "checkpoint")
    assert damage != "metrics" or (run / "metrics.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("key", "message"),
    [("global_step", "'global_step': Input should be less than"), ("best", "it lacks the entry 'best'")],
)
def test_a_huge_step_or_a_missing_entry_is_named(user, key, message):
    path = newest(copy_run(user.folder)) / "state.pt"
    checkpoint = torch.load(path, weights_only=True)
    if key == "best":
        del checkpoint["callbacks"]["Recorder"]["best"]
    else:
        checkpoint["global_step"] = 2**126
    torch.save(checkpoint, path)
    record_again(path.parent)
    assert_config_error(user.python("gptlab.train", "resume=run", "train.max_steps=41", "trust_paths=true"), message)


def test_missing_weights_are_named_when_a_model_is_loaded(tmp_path, monkeypatch):
    monkeypatch.setenv(TRUST_PATHS, "1")
    run = copy_run(tmp_path)
    path = newest(run) / "state.pt"
    checkpoint = torch.load(path, weights_only=True)
    del checkpoint["state_dict"]["wte.weight"]
    torch.save(checkpoint, path)
    record_again(path.parent)
    with pytest.raises(UserError, match=r"do not fit this model: it lacks the entry 'wte\.weight'"):
        load_model(open_model_source(str(run)))


@pytest.mark.parametrize("name", ["train.log", "state.json", "samples", "checkpoints/.unfinished-step_000041"])
def test_a_file_in_the_place_of_a_directory_or_the_reverse_is_refused(user, name):
    path = copy_run(user.folder) / name
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    if path.suffix:
        path.mkdir()
        (path / "file").touch()
    else:
        path.touch()
    done = user.python("gptlab.train", "resume=run", "train.max_steps=41", "trust_paths=true")
    assert_config_error(done, f"{path} cannot be written")


@pytest.mark.parametrize("change", [{"n_layer": 9999}, {"n_embd": 10**6}, {"vocab_size": 2**31 - 1}])
def test_a_model_that_is_much_larger_than_its_checkpoint_is_not_built(tmp_path, monkeypatch, change):
    monkeypatch.setenv(TRUST_PATHS, "1")
    run = copy_run(tmp_path)
    values = yaml.safe_load((run / "config.yaml").read_text())
    (run / "config.yaml").write_text(yaml.safe_dump(values | {"model": values["model"] | change}))
    with pytest.raises(UserError, match=r"parameters, but its weights have only [0-9,]+ bytes"):
        load_model(open_model_source(str(run)))


def adamw(parameter_size: int):
    """Builds gptlab's fused AdamW for a model with two vectors of different sizes."""
    model = nn.Module()
    model.a, model.b = (nn.Parameter(torch.zeros(size)) for size in (parameter_size, 1))
    return build_optimizer(model, validate(AdamWConfig, defaults("optimizer/adamw.yaml") | {"lr": 0.1}), fused=True)


def step(optimizer) -> None:
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()


def test_a_moment_that_is_smaller_than_its_parameter_is_not_used_by_a_fused_kernel():
    memory = torch.zeros(8)
    small = {"step": torch.tensor(1.0), "exp_avg": memory[:1], "exp_avg_sq": torch.zeros(8)}
    parameter = nn.Parameter(torch.zeros(8))
    plain = torch.optim.AdamW([parameter], fused=True)
    plain.load_state_dict({"state": {0: small}, "param_groups": plain.state_dict()["param_groups"]})
    step(plain)
    assert memory[1:].any(), "the kernel did not write outside of the tensor, so the test would prove nothing"
    memory.zero_()
    ours = adamw(8)
    groups = ours.state_dict()["param_groups"]
    with pytest.raises(UserError, match="exp_avg of a parameter of shape"):
        ours.load_state_dict({"state": {0: small}, "param_groups": groups})
    step(ours)
    assert not memory.any()


def test_a_moment_of_another_parameter_is_refused():
    optimizer = adamw(8)
    step(optimizer)
    state = copy.deepcopy(optimizer.state_dict())
    optimizer.load_state_dict(state)
    state["param_groups"][0]["params"].reverse()
    with pytest.raises(UserError, match="exp_avg"):
        optimizer.load_state_dict(state)


@pytest.mark.parametrize("key", ["wte.weight", "exp_avg"])
def test_a_tensor_with_more_elements_than_its_file_is_refused(tmp_path, key):
    path = newest(copy_run(tmp_path)) / "state.pt"
    checkpoint = torch.load(path, weights_only=True)
    group = (
        checkpoint["state_dict"] if key == "wte.weight" else checkpoint["optimizer_states"][0]["state"]["wte.weight"]
    )
    group[key] = torch.zeros(1).expand(10**12)  # 4 TB when it is copied
    torch.save(checkpoint, path)
    assert path.stat().st_size < 10**6
    read = read_weights if key == "wte.weight" else read_checkpoint
    with pytest.raises(UserError, match=f"{key}.* is not a dense tensor"):
        read(path.parent)


@pytest.mark.parametrize(
    "part", [{"merges": ["NaN"]}, {"merges": [[1, 2]]}, {"vocab": {"a": "x"}}, {"vocab": {"a": 2**70}}]
)
def test_a_damaged_tokenizer_of_a_hugging_face_model_is_refused(tmp_path, part):
    vocabulary = {**{character: i for i, character in enumerate("abcd")}, "<|endoftext|>": 4}
    model = {"type": "BPE", "vocab": vocabulary, "merges": [["a", "b"]]}
    described = {"model": model | part, "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False}}
    (tmp_path / "tokenizer.json").write_text(json.dumps(described))
    with pytest.raises(UserError):
        tokenizer_record(tmp_path, 5)


@pytest.mark.parametrize(
    "change",
    [{"activation_function": {}}, {"n_layer": "x"}, {"vocab_size": 10**30}, {"n_embd": -1}, {"architectures": 1}, []],
)
def test_a_damaged_description_of_a_hugging_face_model_is_refused(tmp_path, change):
    about = {"model_type": "gpt2", "n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(about | change if isinstance(change, dict) else change))
    with pytest.raises(UserError):
        load_model(open_model_source(str(tmp_path)))
