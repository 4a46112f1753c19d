"""End-to-end tests of python -m gptlab.plan, and of the forecast of a run."""

import json
import shlex
import sys

import pytest
import torch

from commands import assert_config_error, assert_success
from gptlab.config.base import validate
from gptlab.config.schema import RunConfig
from gptlab.model.modern import build_gpt

PLAN = "gptlab.plan"
TEXT = ("data=text", "data.source=text.txt")
SMALL = ("model=tiny", "model.block_size=32", "train.max_steps=30", "train.eval_every=15", "train.eval_windows=10")


def planned(user, *arguments: str, timeout: float = 120) -> dict:
    done = user.python(PLAN, *arguments, "json=plan.json", timeout=timeout)
    assert_success(done)
    return json.loads((user.folder / "plan.json").read_text())


@pytest.mark.parametrize("arguments", [[], ["--help"], ["budget=1e16"], ["gpu=h200", "model=gpt2"], ["gpu=x"]])
def test_plan_imports_no_torch(user, arguments):
    code = f"""
import sys
sys.argv[1:] = {[*arguments]!r}
from gptlab.plan import main
try:
    main()
except SystemExit as end:
    print("status", end.code)
print("torch" in sys.modules, "lightning" in sys.modules)
"""
    done = user.run(sys.executable, "-c", code)
    assert done.stdout.splitlines()[-2:] == [f"status {2 if arguments == ['gpu=x'] else 0}", "False False"], done.stderr


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["model=gpt2_modern"],
        ["experiment=gpt2_openwebtext", "trainer.devices=8"],
        ["experiment=speedrun_cpu", "tokenizer=bytes"],
        ["model.n_layer=3", "trainer=fsdp_tp", "trainer.devices=4", "gpu=[l4,b200]"],
    ],
)
def test_parameters_are_those_of_the_model(user, arguments):
    plan = planned(user, *arguments)
    config = validate(RunConfig, plan["config"])
    with torch.device("meta"):
        count = sum(parameter.numel() for parameter in build_gpt(config.model).parameters())
    assert plan["parameters"].pop("total") == count == sum(plan["parameters"].values())
    # fsdp_tp with four devices: blocks are split over pairs, and everything is sharded over the two pairs. On a GPU,
    # the embedding of 257 tokens has 320 rows.
    sharded = 698_880 + 63 * 128 * 4 // 2
    assert plan["memory"]["weights"] == (sharded if config.trainer.strategy == "fsdp_tp" else 4 * count)


def test_plan_uses_the_overrides_of_a_run_and_writes_nothing(user):
    job = user.python(PLAN, *TEXT, *SMALL, "--cfg", "job")
    assert_success(job)
    assert "budget: null" in job.stdout
    assert "n_embd: 64" in job.stdout or "n_layer" in job.stdout
    plan = planned(user, *TEXT, *SMALL)
    assert (plan["steps"], plan["tokens"], plan["evaluations"], plan["evaluated"]) == (30, 30 * 12 * 32, 2, 320)
    assert not (user.folder / "outputs").exists()
    assert not (user.folder / "cache").exists()  # nothing was prepared


def test_network_is_in_the_time_or_the_time_is_that_of_computing_alone(user):
    job = (*SMALL, "train.global_batch_size=16", "tokenizer=bytes", "trainer=ddp", "trainer.devices=8", "gpu=[l4,h100]")
    done = user.python(PLAN, *job, "json=plan.json")
    assert_success(done)
    assert "computing alone: 40%" in done.stdout
    plan = json.loads((user.folder / "plan.json").read_text())
    assert [time["network"] for time in plan["times"]] == ["excluded", "overlapped", "sequential"]  # H100s have NVLink
    assert plan["times"][1]["step_network"] == pytest.approx(plan["network"]["traffic"] / 450e9)
    plan = planned(user, *job, "network_bandwidth=2", "overwrite=true")
    assert [time["network"] for time in plan["times"]] == ["overlapped", "sequential"] * 2
    assert plan["network"]["bandwidth"] == 2e9
    assert all(time["step_network"] == pytest.approx(plan["network"]["traffic"] / 2e9) for time in plan["times"])


def test_command_for_a_budget_composes_to_the_planned_run(user):
    done = user.python(PLAN, *TEXT, "budget=1e12", "model.block_size=32", "json=plan.json")
    assert_success(done)
    command = shlex.split(done.stdout.splitlines()[-1])
    assert command[:3] == ["python", "-m", "gptlab.train"]
    plan = json.loads((user.folder / "plan.json").read_text())
    assert plan["flops"] == pytest.approx(1e12, rel=0.1)
    again = planned(user, *command[3:])
    assert again["config"] == plan["config"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["gpu=h10"], "gpu=h10 is not in the table of GPUs. Did you mean h100?"),
        (["budget=5"], "budget=5 FLOPs is too small"),
        (["budget=-5"], "budget=-5 is not valid: it should be a number greater than 0"),
        (["mfu=2"], "mfu=2 is not valid: it should be a number greater than 0 and less than or equal to 1"),
        (["network_bandwidth=0"], "network_bandwidth=0 is not valid: it should be a number greater than 0"),
        (["budgt=5"], "Unknown config key `budgt`. Did you mean budget?"),
        (["model.n_head=3"], "model.n_head=3 does not divide n_embd=128"),
        (["model.n_layer=100000000"], "less than or equal to 10,000"),
        (["data=text", "data.source=none.txt"], "data.source=none.txt does not exist"),
        (["tokenizer=characters"], "The vocabulary size of tokenizer=characters is unknown"),
        (["json=/none/plan.json"], "json=/none/plan.json cannot be written"),
        (["trainer=ddp", "trainer.devices=8"], "train.global_batch_size=12 is not divisible by 8"),
    ],
)
def test_config_errors_name_the_key(user, arguments, message):
    assert_config_error(user.python(PLAN, *arguments), message)


@pytest.mark.slow
def test_run_scores_its_forecast_and_the_next_similar_run_has_a_time_forecast(user):
    first = user.train()
    assert_success(first)
    assert "no time forecast" in first.stdout
    directory = user.only_run()
    forecast = json.loads((directory / "forecast.json").read_text())
    assert forecast["score"]["parameters"]["ratio"] == 1
    assert forecast["seconds"] is None
    assert forecast["score"]["peak_memory_bytes"]["measured"] > 1e8
    second = user.train("name=second", "optimizer.lr=1e-3")
    assert_success(second)
    assert "parameters exact; time " in second.stdout
    forecast = json.loads((user.only_run("second") / "forecast.json").read_text())
    assert "measured on this machine: 6 steps of quickstart" in forecast["why"]
    assert forecast["score"]["seconds"]["ratio"] > 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments",
    [
        ["model=mini", "train.global_batch_size=16", "train.max_steps=10", "train.eval_every=5"],
        ["model=nano", "model.block_size=512", "train.global_batch_size=24", "train.max_steps=20"],
    ],
    ids=["mini", "nano"],
)
def test_planned_memory_is_within_ten_percent_of_the_measured_peak(user, arguments):
    """With malloc returning what is freed and MKL matmuls: fragmentation and oneDNN's buffers differ between CPUs."""
    user.environment["MALLOC_MMAP_THRESHOLD_"] = str(2**20)
    arguments = [*TEXT, *arguments, "train.eval_windows=40", "trainer=cpu", "trainer.float32_matmul=default"]
    before = planned(user, *arguments)
    assert before["measured"] is None
    # in a new process: a fork would start with the memory of its parent
    assert_success(user.run(sys.executable, "-m", "gptlab.train", *arguments, timeout=900))
    score = json.loads((user.only_run() / "forecast.json").read_text())["score"]
    expected = before["memory"]["total"] - before["memory"]["holes"]
    assert expected == pytest.approx(score["peak_memory_bytes"]["measured"], rel=0.10)
