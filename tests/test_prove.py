"""End-to-end tests of python -m gptlab.prove, with proofs that pass and one that fails."""

import json
import os
import signal

import pytest

from commands import assert_config_error, assert_success
from processes import is_alive

TINY = ("data=text", "data.source=text.txt", "model=tiny", "model.block_size=32")


CONFIG_ERRORS = {
    "an unknown key": (["prove.step=3"], "Unknown config key `prove.step`. Did you mean prove.steps?"),
    "an unknown key of the run": (["modle.n_layer=3"], "Unknown config key `modle.n_layer`. Did you mean"),
    "no steps to resume": (["prove.kill_after=6"], "kill_after=6 leaves no steps to resume"),
    "too many processes": (["prove.ranks=[1,9999]"], "prove.ranks=9999: this machine has no GPU and"),
    "a resume": (["resume=text.txt"], "cannot be used with resume="),
}


@pytest.mark.parametrize(("arguments", "message"), CONFIG_ERRORS.values(), ids=CONFIG_ERRORS)
def test_config_errors_name_the_key(user, arguments, message):
    assert_config_error(user.python("gptlab.prove", *arguments), message)
    assert not (user.folder / "outputs").exists()


@pytest.mark.slow
def test_fsdp_run_passes_all_proofs(user):
    few = ("prove.ranks=[1,2,4,5]", "prove.workers=[0,2]", "prove.steps=4", "prove.kill_after=2")
    done = user.python("gptlab.prove", *TINY, *few, "trainer=fsdp", "trainer.devices=2", timeout=900)
    assert_success(done)
    (folder,) = (user.folder / "outputs" / "prove").iterdir()
    assert done.stdout.endswith(f"Passed: {folder.relative_to(user.folder) / 'prove.json'}\n")
    assert sorted(path.name for path in folder.iterdir() if path.suffix != ".diff") == [
        "environment.json",
        "prove.json",
    ]
    report = json.loads((folder / "prove.json").read_text())
    assert report["passed"] is True
    assert report["environment"]["packages"]["torch"].startswith("2.")
    proofs = {proof["name"]: proof for proof in report["proofs"]}
    assert {name: proof["passed"] for name, proof in proofs.items()} == {
        "killed and resumed": True,
        **{f"tokens of {ranks} ranks": True for ranks in (2, 4)},
        "tokens of 1 rank": True,
        "tokens of 5 ranks": None,
        "losses, accumulated": True,
        "losses, ddp on 2": True,
        "losses, fsdp on 2": True,
        "checkpoint round trip": True,
    }
    assert "not possible: train.global_batch_size=12 is not divisible by 5" in proofs["tokens of 5 ranks"]["what"]
    for name in ("tokens of 1 rank", "tokens of 4 ranks"):
        hashes = proofs[name]["details"]["hashes"]
        assert len({*hashes["0 workers"]}) == 4
        assert (
            hashes["0 workers"] == hashes["2 workers"] == proofs["tokens of 2 ranks"]["details"]["hashes"]["0 workers"]
        )
    assert 0 <= proofs["losses, fsdp on 2"]["details"]["largest_difference"] < 1e-5
    # a weight, its two moments and their step count
    assert proofs["checkpoint round trip"]["details"]["tensors"] == 4 * 28


@pytest.mark.slow
def test_terminated_proof_leaves_no_process(user):
    proof = user.begin("gptlab.prove", *TINY, "prove.out=proof")
    proof.until((user.folder / "proof" / "runs" / "uninterrupted" / "train.log").exists)
    children = proof.children()
    assert children
    proof.terminate()
    proof.ended(128 + signal.SIGTERM)
    assert not any(is_alive(child) for child in children)


PERTURBED = """
import sys
if "gptlab.worker" in sys.orig_argv:
    from gptlab.training.checkpoints import writing
    read = writing.read_checkpoint
    def perturbed(place):
        checkpoint = read(place)
        moments = checkpoint["optimizer_states"][0]["state"]["h.1.ln_2.bias"]
        moments["exp_avg"] = moments["exp_avg"] + 1e-3
        return checkpoint
    writing.read_checkpoint = perturbed
"""


@pytest.mark.slow
def test_resume_that_changes_a_moment_fails_with_step_and_tensor(user):
    (user.folder / "elsewhere").mkdir()
    (user.folder / "elsewhere" / "sitecustomize.py").write_text(PERTURBED)
    paths = [str(user.folder / "elsewhere"), *filter(None, [os.environ.get("PYTHONPATH")])]
    user.environment["PYTHONPATH"] = os.pathsep.join(paths)
    few = ("prove.ranks=[1]", "prove.workers=[0]", "prove.out=proof", "model.dropout=0.1", "train.global_batch_size=1")
    done = user.python("gptlab.prove", *TINY, *few, timeout=900)
    assert done.returncode == 1, done.stdout + done.stderr
    assert done.stdout.endswith("Failed: proof/prove.json\nThe runs are in proof/runs\n")
    report = json.loads((user.folder / "proof" / "prove.json").read_text())
    assert report["passed"] is False
    (resumed,) = (proof for proof in report["proofs"] if proof["passed"] is False)
    assert resumed["name"] == "killed and resumed"
    assert resumed["details"]["difference"]["tensors"] == ["h.1.ln_2.bias", "h.1.ln_2.bias.exp_avg"]
    named = "first difference at step 4: 2 of 112 tensors differ, first h.1.ln_2.bias"
    assert resumed["what"] == f"killed after step 3; {named}"  # two uninterrupted runs are equal
    assert (user.folder / "proof" / "runs" / "killed" / "trace.jsonl").exists()
    assert "not possible: micro_batch_size=1" in " ".join(done.stdout.split())
