"""Components of a user's own package, end to end: train, resume, DDP, FSDP, sweeps, proofs, sampling, evaluation."""

import json
from pathlib import Path

import pytest
import torch
import yaml

from commands import assert_same_run, assert_success, metrics
from gptlab.config.components import TRUST
from gptlab.pretrained.source import open_model_source
from gptlab.pretrained.weights import load_model
from own_package import NODES, OPTIONS, add_to_path, write_groups, write_package
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


@pytest.fixture
def lab(user, monkeypatch):
    """User with the package ``mylab`` outside of the working directory, and group files in the directory ``mine``."""
    write_package(user.folder / "lab")
    write_groups(user.folder / "mine")
    add_to_path(user.environment, user.folder / "lab")
    monkeypatch.syspath_prepend(user.folder / "lab")
    return user


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
def test_all_components_train_and_resume_bit_identically_by_group_files_and_on_the_command_line(lab, trainer):
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
def test_a_sweep_varies_a_component_and_its_argument(lab):
    (lab.folder / "mine" / "optimizer" / "sign_half.yaml").write_text("defaults: [sign]\nmomentum: 0.5\n")
    fixed = ("name=sweep", *(option for option in OPTIONS if option != "optimizer=sign"), "train.max_steps=2")
    train(lab, "-m", *fixed, "optimizer=sign,sign_half,adamw", "hydra.launcher.at_once=2", timeout=300)
    directory = lab.only_run("sweep")
    trials = [json.loads(path.read_text()) for path in sorted(directory.glob("*/trial.json"))]
    names = ("sign", "sign_half", "adamw")
    assert [(trial["overrides"], trial["state"]) for trial in trials] == [({"optimizer": n}, "done") for n in names]
    assert len({trial["value"] for trial in trials}) == 3
    configs = [yaml.safe_load((directory / str(number) / "config.yaml").read_text()) for number in range(3)]
    assert [config["optimizer"].get("momentum") for config in configs] == [0.8, 0.5, None]
    assert (lab.folder / "steps.txt").read_text().split() == ["2"] * 3


@pytest.mark.slow
def test_a_run_with_all_components_passes_all_proofs(lab):
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
