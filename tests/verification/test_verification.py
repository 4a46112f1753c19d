"""Proofs: comparison of traces, shortened configurations, and runs that are killed or fail."""

import json
import math
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from configs import resolved
from gptlab.errors import UserError
from gptlab.launch import supervisor
from gptlab.training.hardware import Hardware
from gptlab.training.optim.schedules import learning_rate
from gptlab.verification import proofs
from gptlab.verification.comparison import TraceStep, first_difference, largest_difference, read_trace
from gptlab.verification.configs import ProveConfig, extended, plan_ranks, shortened
from gptlab.verification.proofs import ProofCase, compare_losses, killed_and_resumed, prove_all
from gptlab.verification.report import ProofResult, all_passed
from gptlab.verification.runs import ProofRuns, RunFailed
from processes import is_alive


def trace(*losses: float, **changes: str) -> list[TraceStep]:
    """Returns a trace with these losses, with changed tensor hashes at the last step."""
    lines = [
        TraceStep(step, f"t{step}", repr(loss), "1.0", {"wte": f"a{step}", "wte.step": f"b{step}", "h.0": f"c{step}"})
        for step, loss in enumerate(losses, 1)
    ]
    return [*lines[:-1], lines[-1]._replace(tensors=lines[-1].tensors | changes)]


def test_first_difference_names_step_and_tensor():
    same = trace(3.0, 2.0, 1.0)
    assert first_difference(same, trace(3.0, 2.0, 1.0)) is None
    found = first_difference(same, trace(3.0, 2.0, 1.0, **{"h.0": "x", "wte.step": "x"}))
    assert (found.step, found.values, found.tensors) == (3, [], ["wte.step", "h.0"])
    assert str(found) == "first difference at step 3: 2 of 3 tensors differ, first wte.step"
    assert str(first_difference(same, trace(3.0, 2.5, 1.0))) == "first difference at step 2: loss 2.5 instead of 2.0"
    assert str(first_difference(same, same[:2])) == "first difference at step 3: missing in one of the runs"
    assert first_difference(trace(math.nan), trace(math.nan)) is None
    without = [same[0]._replace(tensors={"wte": "a1", "h.0": "c1"}), *same[1:]]
    assert first_difference(same, without).tensors == ["wte.step"]


def test_largest_loss_difference_is_infinite_for_nan_and_missing_steps():
    assert largest_difference(trace(3.0, 2.0, 1.0), trace(3.0, 1.5, 1.25)) == (0.5, 2)
    assert largest_difference(trace(3.0, 2.0), trace(3.0, math.nan)) == (math.inf, 2)
    assert largest_difference(trace(3.0, 2.0), trace(3.0)) == (math.inf, 2)
    assert largest_difference(trace(3.0), trace(3.0)) == (0.0, 1)


def test_impossible_proof_is_not_a_failure():
    passed, failed, impossible = (ProofResult("p", result, "", {}) for result in (True, False, None))
    assert all_passed([passed, impossible])
    assert not all_passed([passed, failed, impossible])


def test_trace_round_trip(tmp_path):
    (tmp_path / "trace.jsonl").write_text("".join(json.dumps(line._asdict()) + "\n" for line in trace(2.0, 1.0)))
    assert read_trace(tmp_path / "trace.jsonl") == trace(2.0, 1.0)
    assert read_trace(tmp_path / "nothing") == []


@pytest.mark.parametrize(
    "schedule",
    [
        ("schedule=cosine", "schedule.warmup_steps=2"),
        ("schedule=linear", "schedule.warmup_steps=2", "schedule.decay_steps=9"),
        ("schedule=wsd", "schedule.warmup_steps=3"),
        ("schedule=constant", "schedule.warmup_steps=9"),
    ],
    ids=["cosine", "linear", "wsd", "constant"],
)
@pytest.mark.parametrize("length", ["train.max_steps=20", "train.max_tokens=30000"])
def test_shortened_run_has_the_learning_rates_of_the_whole_run(schedule, length):
    config = resolved(*schedule, length)
    for short in (shortened(config, 6), extended(shortened(config, 6))):
        for step in range(6):
            expected = learning_rate(step, config.schedule, lr=1.0, max_steps=config.steps)
            assert learning_rate(step, short.schedule, lr=1.0, max_steps=short.steps) == expected
    assert shortened(config, 6).steps == 6


def test_shortening_a_run_into_its_wsd_decay_raises():
    config = resolved("schedule=wsd", "schedule.warmup_steps=1", "train.max_steps=6")
    with pytest.raises(UserError, match=r"prove\.steps=6 is too large"):
        shortened(config, 6)


def test_shortened_run_saves_every_step_and_uses_no_loggers():
    short = shortened(
        resolved("logger=[csv,wandb]", "callbacks=early_stopping", "callbacks.early_stopping.patience=1"), 6
    )
    assert short.callbacks.checkpoint.every == 1
    assert (short.callbacks.early_stopping, short.logger.wandb) == (None, None)
    kept = shortened(resolved("callbacks.checkpoint.asynchronous=true"), 6)
    assert (kept.callbacks.checkpoint.every, kept.callbacks.checkpoint.asynchronous) == (1, True)  # as configured


def test_micro_batches_are_at_most_the_given_size():
    def plan(batch, *arguments, earlier=()):
        train = resolved(f"train.global_batch_size={batch}", f"train.batch_schedule={[list(s) for s in earlier]}").train
        return plan_ranks(train, *arguments)[:3]

    assert plan(12, 2, 4) == (2, 3, 2)
    assert plan(12, 1, 6) == (1, 6, 2)
    assert plan(480, 4, 12) == (4, 12, 10)
    assert plan(14, 2, 5) == (2, 1, 7)
    with pytest.raises(UserError, match="is not divisible by 4"):
        plan(14, 4, 14)
    assert plan(24, 2, 11, earlier=[(3, 8), (6, 16)]) == (2, 6, 2)  # 2 divides 4, 8 and 12, but 3 does not
    assert plan(24, 2, 5, earlier=[(3, 8), (6, 16)]) == (2, 3, 4)
    with pytest.raises(UserError, match="no micro-batch size up to 2 divides"):
        plan(24, 2, 2, earlier=[(3, 8), (6, 16)])


def replace_training(monkeypatch, code: str) -> None:
    """Runs Python code instead of training; its argument is the run directory."""

    prelude = "import json, sys; sys.argv[1] = json.load(open(sys.argv[1]))['run_dir']\n"
    monkeypatch.setattr(supervisor, "WORKER_COMMAND", (sys.executable, "-c", prelude + code))


def test_failed_run_raises_with_its_last_output_and_is_not_repeated(tmp_path, monkeypatch):
    replace_training(monkeypatch, "print('hello\\nan error'); raise SystemExit(3)")
    runs, config = ProofRuns(tmp_path), resolved()
    for _ in range(2):
        with pytest.raises(RunFailed, match="'whole' ended with exit code 3") as failure:
            runs.trace("whole", config)
        assert failure.value.tail == "hello\nan error"
        replace_training(monkeypatch, "")  # the second call does not run again


def test_killed_run_leaves_no_process_and_no_later_checkpoint(tmp_path, monkeypatch):
    code = """
import pathlib, subprocess, sys, time
run_dir = pathlib.Path(sys.argv[1])
child = subprocess.Popen((sys.executable, '-c', 'import time; time.sleep(60)'))
(run_dir.parent / 'child').write_text(str(child.pid))
for step in range(1, 6):
    (run_dir / 'checkpoints' / f'step_{step:06d}').mkdir(parents=True)
time.sleep(60)
"""
    replace_training(monkeypatch, code)
    run_dir = ProofRuns(tmp_path).kill("killed", resolved(), after=3)
    left = sorted(path.name for path in (run_dir / "checkpoints").iterdir())
    assert left == ["step_000001", "step_000002", "step_000003"]
    child, until = int((tmp_path / "child").read_text()), time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < until
        time.sleep(0.05)


def test_run_that_ends_before_its_checkpoint_raises(tmp_path, monkeypatch):
    replace_training(monkeypatch, "print('no')")
    with pytest.raises(RunFailed, match="'killed' ended with exit code 0"):
        ProofRuns(tmp_path).kill("killed", resolved(), after=3)


def test_losses_are_compared_only_for_equal_tokens():
    expected = trace(3.0, 2.0)
    found = [compare_losses("", expected, trace(3.0, 2.5), tolerance, {"on": "cpu"}) for tolerance in (0.5, 0.4)]
    assert [proof.passed for proof in found] == [True, False]
    assert [(proof.details["largest_difference"], proof.details["step"]) for proof in found] == [(0.5, 2), (0.5, 2)]
    other = [expected[0], expected[1]._replace(tokens="others")]
    proof = compare_losses("", expected, other, 1.0, {"on": "cpu"})
    assert (proof.passed, proof.what) == (False, "trained on different tokens, first at step 2")


class FakeRuns:
    """ProofRuns with given traces; runs without a trace fail."""

    def __init__(self, **traces: list[TraceStep]) -> None:
        self.traces = traces

    def trace(self, name, config):
        if name not in self.traces:
            raise RunFailed(f"no {name}", "the tail")
        return self.traces[name]

    def kill(self, name, config, after):
        return Path(name)


@pytest.fixture
def case():
    values = {
        "steps": 2,
        "kill_after": 1,
        "ranks": [1],
        "workers": [0],
        "tolerance": 1e-5,
        "keep": False,
        "out": None,
        "overwrite": False,
    }
    return ProofCase(resolved(), None, ProveConfig(**values))


def test_nondeterministic_training_is_distinguished_from_a_wrong_resume(case):
    same, other, third = trace(3.0, 2.0), trace(3.0, 2.0, wte="x"), trace(3.0, 2.5)
    (passed,) = killed_and_resumed(case, FakeRuns(uninterrupted=same, resumed=same))
    assert (passed.passed, passed.details["difference"]) == (True, None)
    (failed,) = killed_and_resumed(case, FakeRuns(uninterrupted=same, resumed=other, repeated=same))
    assert (failed.passed, failed.details["difference"]["tensors"]) == (False, ["wte"])
    assert "Two uninterrupted runs" not in failed.what
    (failed,) = killed_and_resumed(case, FakeRuns(uninterrupted=same, resumed=other, repeated=third))
    assert not failed.passed
    assert "training is not deterministic (first difference at step 2: loss 2.5" in failed.what


def test_failed_run_fails_every_proof_that_needs_it(case):
    proofs = list(prove_all(case, FakeRuns()))
    assert [proof.passed for proof in proofs] == [False] * 6
    assert [proof.what for proof in proofs] == ["no uninterrupted"] * 2 + ["no one-process"] * 3 + ["no uninterrupted"]
    assert {proof.details["tail"] for proof in proofs} == {"the tail"}


@pytest.mark.parametrize("accelerator", ["cpu", "cuda"])
def test_proofs_on_a_gpu_use_deterministic_algorithms(monkeypatch, accelerator):
    hardware = Hardware(accelerator, "", 1, 1, "32-true", compile=False)
    monkeypatch.setattr(proofs, "choose_devices", lambda *_: hardware)
    prove: Any = SimpleNamespace(steps=6)
    case = proofs.ProofCase(resolved("trainer=cpu", "train.max_steps=20"), None, prove)  # type: ignore[arg-type]
    assert case.config.trainer.deterministic == (accelerator == "cuda")
