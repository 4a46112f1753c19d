"""Proofs of a configuration: one function per proof, which yields its results."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import torch

from gptlab.config.schema import RunConfig
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.errors import UserError
from gptlab.terminal import get_console
from gptlab.tracking.run_store.runs import CHECKPOINTS
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.callbacks.determinism_trace import format_sums, hash_tensor, hash_windows, zero_sums
from gptlab.training.checkpoints.reading import read_checkpoint
from gptlab.training.checkpoints.records import checkpoint_path, find_corruption
from gptlab.training.datamodule import TokenDataModule
from gptlab.training.devices import choose_devices
from gptlab.verification.comparison import TraceStep, first_difference, largest_difference
from gptlab.verification.configs import (
    ProveConfig,
    comparable,
    extended,
    on_ranks,
    plan_ranks,
    shortened,
    with_deterministic_algorithms,
)
from gptlab.verification.report import ProofResult
from gptlab.verification.runs import ProofRuns, RunFailed

WHOLE = "uninterrupted"  # name of the reference run of most proofs


class ProofCase:
    """Configuration to verify.

    Args:
        config: Configuration of the run, including the vocabulary size.
        prepared: Prepared data of the run.
        prove: Configuration of the proofs.

    Raises:
        UserError: This machine does not have the devices, or the run cannot be shortened.
    """

    def __init__(self, config: RunConfig, prepared: TokenDataset, prove: ProveConfig) -> None:
        self.prepared, self.prove = prepared, prove
        devices = choose_devices(config.trainer, config.train, config.model)
        shares = config.trainer.data_parallel(devices.devices, devices.num_nodes)
        self.plan = config.train.plan(shares)
        if devices.accelerator == "cuda":  # by default, only a run on a CPU is deterministic
            config = with_deterministic_algorithms(config)
        self.config = shortened(config, prove.steps)


def prove_all(case: ProofCase, runs: ProofRuns) -> Iterator[ProofResult]:
    """Runs all proofs one after the other; a proof fails if one of its runs fails."""
    for name, prove in PROOFS.items():
        try:
            yield from prove(case, runs)
        except RunFailed as error:
            yield _failed(name, error)


def killed_and_resumed(case: ProofCase, runs: ProofRuns) -> Iterator[ProofResult]:
    """Verifies that a killed and resumed run is bit-identical to an uninterrupted run."""
    name, after, steps = "killed and resumed", case.prove.kill_after, case.prove.steps
    whole = runs.trace(WHOLE, case.config)
    run_dir = runs.kill("killed", extended(case.config), after)
    resumed = runs.trace("resumed", case.config.model_copy(update={"resume": str(run_dir), "init_from": None}))
    difference = first_difference(whole, resumed)
    details: dict[str, Any] = {"killed_after": after, "steps": steps, "difference": difference and difference._asdict()}
    if difference is None:
        tensors = len(whole[-1].tensors)
        yield ProofResult(
            name, True, f"killed after step {after}; {steps} steps, {tensors} tensors bit-identical", details
        )
        return
    what = f"killed after step {after}; {difference}"
    if other := first_difference(whole, runs.trace("repeated", case.config)):
        details["repeated"] = other._asdict()
        what += f". Two uninterrupted runs differ as well, so training is not deterministic ({other})"
    yield ProofResult(name, False, what, details)


def same_tokens(case: ProofCase, runs: ProofRuns) -> Iterator[ProofResult]:
    """Verifies that the tokens of every step do not depend on the number of ranks and data loader workers."""
    expected = [line.tokens for line in runs.trace(WHOLE, case.config)]
    for ranks in case.prove.ranks:
        name = f"tokens of {ranks} rank{'s' if ranks > 1 else ''}"
        try:
            plan = plan_ranks(case.config.train, ranks, case.plan.micro_batch_size)
        except UserError as error:
            yield _impossible(name, error)
            continue
        details: dict[str, Any] = {**plan._asdict(), "hashes": {}}
        failures = []
        for workers in case.prove.workers:
            with get_console().status(f"loading: {name}, {workers} workers"):
                found = loaded_tokens(case.config, case.prepared, plan, workers=workers, steps=case.prove.steps)
            details["hashes"][f"{workers} workers"] = found
            if differing := [
                step for step, pair in enumerate(zip(found, expected, strict=True), 1) if len({*pair}) > 1
            ]:
                failures.append(f"with {workers} workers, first at step {differing[0]}")
        with_workers = " and ".join(map(str, case.prove.workers))
        what = f"equal to the tokens of the run at every step, with {with_workers} workers"
        if failures:
            what = f"different from the tokens of the run: {'; '.join(failures)}"
        yield ProofResult(name, not failures, what, details)


def same_losses(case: ProofCase, runs: ProofRuns) -> Iterator[ProofResult]:
    """Verifies that gradient accumulation and training on two devices give the losses of a run on one device."""
    accelerator: Literal["cpu", "gpu"] = "gpu" if torch.cuda.device_count() >= 2 else "cpu"
    single = comparable(case.config, accelerator)
    size = case.plan.micro_batch_size
    ways = {"accumulated": ("single", 1, size // 2), "ddp": ("ddp", 2, size), "fsdp": ("fsdp", 2, size)}
    for way, (strategy, ranks, at_most) in ways.items():
        name = f"losses, {way}" if ranks == 1 else f"losses, {way} on {ranks}"
        try:
            if at_most == 0:
                raise UserError("micro_batch_size=1 cannot be halved.")
            plan = plan_ranks(case.config.train, ranks, at_most)
        except UserError as error:
            yield _impossible(name, error)
            continue
        try:
            expected = runs.trace("one-process", on_ranks(single, "single", case.plan._replace(world_size=1)))
            found = runs.trace(way, on_ranks(single, strategy, plan))
        except RunFailed as error:
            yield _failed(name, error)
            continue
        yield compare_losses(name, expected, found, case.prove.tolerance, plan._asdict() | {"on": accelerator})


def checkpoint_round_trip(case: ProofCase, runs: ProofRuns) -> Iterator[ProofResult]:
    """Verifies that the tensors of a checkpoint are bit-identical to those that the run had in memory."""
    name, last = "checkpoint round trip", runs.trace(WHOLE, case.config)[-1]
    path = checkpoint_path(runs.run_dir(WHOLE) / CHECKPOINTS, last.step)
    details: dict[str, Any] = {"checkpoint": str(path), "step": last.step, "tensors": len(last.tensors)}
    if problem := find_corruption(path):
        yield ProofResult(name, False, f"{path.name} is damaged: {problem}", details)
        return
    checkpoint = read_checkpoint(path)
    saved = dict(checkpoint["state_dict"])
    for optimizer in checkpoint["optimizer_states"]:
        for parameter, moments in optimizer["state"].items():
            saved |= {f"{parameter}.{moment}": tensor for moment, tensor in moments.items()}
    differing = [key for key, hashed in last.tensors.items() if key not in saved or hash_tensor(saved[key]) != hashed]
    details["differing"] = differing
    if differing:
        what = f"{len(differing)} of {len(last.tensors)} tensors differ from those in memory, first {differing[0]}"
    else:
        what = f"{path.name}: {len(last.tensors)} tensors bit-identical, all files intact"
    yield ProofResult(name, not differing, what, details)


PROOFS = {
    "killed and resumed": killed_and_resumed,
    "tokens": same_tokens,
    "losses": same_losses,
    "checkpoint round trip": checkpoint_round_trip,
}


def compare_losses(
    name: str, expected: list[TraceStep], found: list[TraceStep], tolerance: float, details: dict[str, Any]
) -> ProofResult:
    """Compares the losses of two runs; fails if they were trained on different tokens.

    Args:
        name: Name of the proof.
        expected: Trace of the run on one device.
        found: Trace of the other run.
        tolerance: Largest allowed absolute difference of a loss, in nats.
        details: Details of the result, with the accelerator under "on"; the comparison is added.
    """
    largest, step = largest_difference(expected, found)
    details |= {"largest_difference": largest if largest < math.inf else None, "step": step, "tolerance": tolerance}
    for key, lines in (("losses", found), ("losses_of_one_process", expected)):
        details[key] = [line.loss for line in lines]
    if others := [ours.step for ours, theirs in zip(expected, found, strict=False) if ours.tokens != theirs.tokens]:
        return ProofResult(name, False, f"trained on different tokens, first at step {others[0]}", details)
    passed = largest <= tolerance
    limit = f"{'within' if passed else 'exceeds'} tolerance {tolerance:.0e}"
    what = f"largest difference {largest:.1e} at step {step}, {limit}"
    return ProofResult(name, passed, f"{what} ({details['on']}, float32, no dropout)", details)


def loaded_tokens(config: RunConfig, prepared: TokenDataset, plan: BatchPlan, *, workers: int, steps: int) -> list[str]:
    """Returns a hash of the tokens of each step, as in the trace of a run, from the data loaders of all ranks."""
    data = TokenDataModule(
        prepared,
        config.data.model_copy(update={"num_workers": workers}),
        plan=plan,
        block_size=config.model.block_size,
        seed=config.seed,
        eval_windows=None,
    )
    sums = [zero_sums() for _ in range(steps)]
    for rank in range(plan.world_size):
        loader = data.micro_batches(rank, first_step=0)
        for number, batch in enumerate(islice(loader, steps * plan.accumulation)):
            sums[number // plan.accumulation] += hash_windows(batch)
    return [format_sums(total) for total in sums]


def _failed(name: str, error: RunFailed) -> ProofResult:
    return ProofResult(name, False, str(error), {"tail": error.tail})


def _impossible(name: str, error: UserError) -> ProofResult:
    return ProofResult(name, None, f"not possible: {error}", {})
