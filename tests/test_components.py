"""Components of a user's own package, end to end: train, resume, DDP, FSDP, sweeps, proofs, sampling, evaluation."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from commands import assert_config_error, assert_same_run, assert_success, metrics
from gptlab.config.trust import TRUST
from gptlab.pretrained.source import open_model_source
from gptlab.pretrained.weights import load_model
from own_package import NODES, OPTIONS, make_importable
from processes import TWO

LENGTH = ("train.eval_every=2", "train.eval_windows=6", "train.log_every=1", "train.max_steps=4")
SMALL = ("data=text", "data.source=text.txt", *LENGTH)
BLOCK = (
    *("model=tiny", "model.block_size=32", "callbacks=checkpoint"),
    "model.block={_target_:mylab.model.ScaledBlock,alpha:0.5}",
)
BIGRAM = (
    *("model=gpt", "model.block_size=32", "model.n_layer=1", "model.n_head=1", "model.n_embd=8", "optimizer.lr=0.1"),
    *("+model._target_=mylab.model.Bigram", "+model.std=0.1", "callbacks=checkpoint"),
)
DECAY = (
    *("model=tiny", "model.block_size=32", "callbacks=checkpoint", "optimizer.lr=0.01"),
    "model.attention={_target_:mylab.model.DecayAttention,decay:0.9}",
)
CONSTANT = ("schedule=constant", "schedule.warmup_steps=0")
TRUSTED = "trust=[mylab]"


make_importable()


def train(lab, *arguments: str, **options):
    """Trains with --config-dir=mine, and checks that the run succeeds."""
    flags = [argument for argument in arguments if argument.startswith("-")]  # in front of overrides, for argparse
    overrides = [argument for argument in arguments if not argument.startswith("-")]
    done = lab.python("gptlab.train", "--config-dir=mine", *flags, *SMALL, *overrides, **options)
    assert_success(done)
    return done


def resume(lab, directory: Path, *arguments: str) -> None:
    assert_success(lab.python("gptlab.train", f"resume={directory}", "train.max_steps=4", TRUSTED, *arguments))


@pytest.mark.slow
@pytest.mark.parametrize("trainer", [(), TWO], ids=["one device", "ddp"])
def test_all_components_train_and_resume_bit_identically_by_group_files_and_on_the_command_line(installed_lab, trainer):
    lab = installed_lab
    # ddp replaces the option trainer=anomalies, but not the flag on the command line
    train(lab, "name=whole", *OPTIONS, *trainer, *(["+trainer.flags.detect_anomaly=true"] if trainer else []))
    train(lab, "name=halted", *NODES, *trainer, "train.max_steps=2")
    whole, halted = lab.only_run("whole"), lab.only_run("halted")
    resume(lab, halted)
    assert_same_run(whole, halted)
    configs = [yaml.safe_load((directory / "config.yaml").read_text()) for directory in (whole, halted)]
    for group in ("model", "optimizer", "schedule", "loss", "callbacks", "logger", "trainer"):
        assert configs[0][group] == configs[1][group], group
    assert configs[0]["trainer"]["flags"] == {"detect_anomaly": True}
    assert metrics(whole, "lr") == pytest.approx({step: 0.001 * step**-0.25 for step in range(1, 5)})
    # every second step: of the whole run, of the halted run, and of the resumed one
    assert (lab.folder / "steps.txt").read_text().split() == ["2", "4", "2", "4"]
    lines = [json.loads(line) for line in (whole / "lines.jsonl").read_text().splitlines()]
    assert lines[0] == {"run": "whole", "lr": 0.001}
    logged = {line["step"]: line["own/train/loss"] for line in lines if "own/train/loss" in line}
    assert logged == metrics(whole, "train/loss")


@pytest.mark.slow
def test_a_sweep_varies_a_component_and_its_argument(installed_lab):
    lab = installed_lab
    (lab.folder / "mine" / "optimizer" / "sign_half.yaml").write_text("defaults: [sign]\nmomentum: 0.5\n")
    fixed = (
        "name=sweep",
        *(option for option in OPTIONS if option != "optimizer=sign"),
        "train.max_steps=2",
        "optimizer.lr=0.001",
    )
    train(lab, "-m", *fixed, "optimizer=sign,sign_half,sgd", "hydra.launcher.at_once=2", timeout=300)
    directory = lab.only_run("sweep")
    trials = [json.loads(path.read_text()) for path in sorted(directory.glob("*/trial.json"))]
    names = ("sign", "sign_half", "sgd")
    assert [(trial["overrides"], trial["state"]) for trial in trials] == [({"optimizer": n}, "done") for n in names]
    assert len({trial["value"] for trial in trials}) == 3
    configs = [yaml.safe_load((directory / str(number) / "config.yaml").read_text()) for number in range(3)]
    assert [config["optimizer"].get("momentum") for config in configs] == [0.8, 0.5, 0.9]
    assert (lab.folder / "steps.txt").read_text().split() == ["2"] * 3


@pytest.mark.slow
def test_a_run_with_all_components_passes_all_proofs(installed_lab):
    lab = installed_lab
    few = ("prove.ranks=[1]", "prove.workers=[0]", "prove.steps=2", "prove.kill_after=1")
    done = lab.python("gptlab.prove", "--config-dir=mine", *SMALL, *OPTIONS, *few, timeout=300)
    assert_success(done)
    (path,) = lab.folder.glob("outputs/prove/*/prove.json")
    proofs = json.loads(path.read_text())["proofs"]
    assert {proof["passed"] for proof in proofs} == {True}
    assert {"killed and resumed", "checkpoint round trip"} <= {proof["name"] for proof in proofs}


def greedy(directory: Path, prompt: str, tokens: int) -> str:
    """Decodes greedily by a plain loop over the logits of the whole context."""
    source = open_model_source(str(directory))
    model, tokenizer = load_model(source), source.tokenizer()
    ids = [int(number) for number in tokenizer.encode(prompt)]
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return tokenizer.decode(ids)


@pytest.mark.slow
@pytest.mark.parametrize("model", [DECAY, BIGRAM, BLOCK], ids=["attention without cache", "bigram table", "block"])
def test_an_own_model_trains_resumes_samples_and_evaluates(lab, monkeypatch, model):
    train(lab, "name=whole", *model, *CONSTANT)
    train(lab, "name=halted", *model, *CONSTANT, "train.max_steps=2")
    whole, halted = lab.only_run("whole"), lab.only_run("halted")
    resume(lab, halted)
    assert_same_run(whole, halted)
    monkeypatch.setenv(TRUST, "mylab")
    sampled = lab.python(
        "gptlab.sample", f"run={whole}", "prompt=line 7", "temperature=0", "max_new_tokens=16", "num_samples=1", TRUSTED
    )
    assert_success(sampled)
    assert greedy(whole, "line 7", 16) in sampled.stdout
    evaluated = lab.python("gptlab.evaluate", f"run={whole}", "windows=6", "batch_size=3", TRUSTED)
    assert_success(evaluated)
    (found,) = whole.glob("evaluations/*.json")
    assert json.dumps(metrics(whole, "val/loss")[4])[:6] in found.read_text()


LAYOUTS = {
    "fsdp, recomputed": ("trainer=fsdp", *TWO[1:], "model.activation_checkpointing=true"),
    "compiled blocks": ("train.compile=blocks",),
}


@pytest.mark.slow
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_own_blocks_train_sharded_recomputed_and_compiled_with_the_losses_of_a_plain_run(lab, layout):
    masked = (*BLOCK, *CONSTANT, "data.documents=masked", "train.max_steps=2")
    train(lab, "name=plain", *masked)
    train(lab, "name=other", *masked, *layout, timeout=300)
    plain, other = lab.only_run("plain"), lab.only_run("other")
    for name in ("train/loss", "val/loss", "grad_norm"):
        assert metrics(other, name) == pytest.approx(metrics(plain, name), rel=1e-5), name


@pytest.mark.slow
def test_a_neutral_block_trains_like_the_builtin_one(lab):
    plain = ("model=tiny", "model.block_size=32", "callbacks=checkpoint", *CONSTANT)
    train(lab, "name=builtin", *plain)
    train(lab, "name=own", *plain, "model.block={_target_:mylab.model.ScaledBlock,alpha:1.0}")
    assert_same_run(lab.only_run("builtin"), lab.only_run("own"))


def change(lab, name: str) -> None:
    """Adds a comment to a module of ``mylab``."""
    with (lab.folder / "lab" / "mylab" / name).open("a") as file:
        file.write("# changed\n")


@pytest.mark.slow
def test_a_run_is_not_resumed_with_changed_code_unless_forced(lab):
    lab.environment["SLURM_JOB_ID"] = "7"
    same = ("model=tiny", "model.block_size=32", "optimizer=sign", "callbacks=[checkpoint,step_log]", *CONSTANT)
    train(lab, *same, "train.max_steps=2")
    directory = lab.only_run()
    recorded = json.loads((directory / "environment.json").read_text())["components"]
    source = (lab.folder / "lab" / "mylab" / "optimizers.py").read_bytes()
    assert recorded["optimizer"] == {
        "target": "mylab.optimizers.SignSGD",
        "package": "mylab",
        "version": None,
        "sha256": hashlib.sha256(source).hexdigest(),
    }
    assert recorded.keys() == {"optimizer", "callbacks.step_log"}
    change(lab, "optimizers.py")
    kept = (directory / "metrics.csv").read_bytes()
    refused = "optimizer._target_=mylab.optimizers.SignSGD has changed since "
    by_path = ("gptlab.train", f"resume={directory}", TRUSTED)
    by_name = ("gptlab.train", "--config-dir=mine", *SMALL, *same)
    assert_config_error(lab.python(*by_path), refused)
    assert_config_error(lab.python(*by_path, *TWO), refused)
    assert_config_error(lab.python(*by_name, "resume=auto"), refused)
    lab.environment["SLURM_RESTART_COUNT"] = "1"  # as in a requeued job
    assert_config_error(lab.python(*by_name, "train.max_steps=2"), refused)
    del lab.environment["SLURM_RESTART_COUNT"]
    assert (directory / "metrics.csv").read_bytes() == kept
    forced = lab.python(*by_path, "force_resume=true", "train.max_steps=3", "train.eval_every=1")
    assert_success(forced)
    assert "has changed since" in forced.stderr + forced.stdout
    change(lab, "callbacks.py")  # may change
    resumed = lab.python(*by_path, "train.max_steps=4")
    assert_success(resumed)
    assert "callbacks.step_log._target_=mylab.callbacks.StepLog has changed since" in resumed.stderr + resumed.stdout
    assert max(metrics(directory, "train/loss")) == 4


CONFIG_ERRORS = {
    "module": ("+callbacks.x._target_=nolab.X", "callbacks.x._target_=nolab.X cannot be imported: ModuleNotFoundError"),
    "no callback": ("+callbacks.x._target_=os.system", "os.system is not a subclass of lightning.pytorch.callbacks."),
    "unknown argument": (
        "+callbacks.x={_target_:mylab.callbacks.StepLog,file:a,evry:2}",
        "Unknown argument callbacks.x.evry: StepLog has no such argument. Did you mean every?",
    ),
    "wrong type": ("+callbacks.x={_target_:mylab.callbacks.StepLog,file:a,every:b}", "callbacks.x.every='b' is not"),
    "no component": ("+callbacks.x={every:1}", "Unknown config key `callbacks.x`"),
    "owned flag": ("+trainer.flags.max_steps=3", "the Trainer's max_steps is set by train.max_steps."),
}


@pytest.mark.slow
@pytest.mark.parametrize(("override", "message"), CONFIG_ERRORS.values(), ids=CONFIG_ERRORS)
def test_an_invalid_component_is_a_config_error_before_anything_is_written(lab, override, message):
    done = lab.python("gptlab.train", *SMALL, "model=tiny", override)
    assert_config_error(done, message)
    assert done.stderr.count("\n") == 1
    assert not (lab.folder / "outputs").exists()


def test_a_missing_module_is_reported_with_the_searched_directory_and_without_torch(without_torch):
    done = without_torch.python("gptlab.train", *SMALL, "model=tiny", "~schedule", "+schedule._target_=nolab.rate")
    assert_config_error(done, "schedule._target_=nolab.rate cannot be imported: ModuleNotFoundError")
    assert f"working directory ({without_torch.folder})" in done.stderr


def test_a_run_without_components_imports_nothing_for_them():
    code = """
import sys
from gptlab.config.trust import check_trusted
from gptlab.launch.components import check_components, count_components
from configs import resolved
config = resolved("data=text", "data.source=text.txt", "model=tiny")
before = {*sys.modules}
check_trusted(config.model_dump(mode="json"), "run")
check_components(config)
count_components(config)
print(*sorted({*sys.modules} - before))
print("torch" in sys.modules, "pytorch_optimizer" in sys.modules)
"""
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        (sys.executable, "-c", code), env=os.environ | {"PYTHONPATH": path}, capture_output=True, text=True, check=False
    )
    assert done.stdout == "\nFalse False\n", done.stderr
