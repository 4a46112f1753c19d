"""The proofs of a configuration, one function each, which yields its results."""

import math
from collections.abc import Iterator
from itertools import islice
from typing import Any, Literal

import torch
from rich import get_console

from gptlab.config.schema import RunConfig
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.errors import UserError
from gptlab.tracking.run_directory import CHECKPOINTS
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.callbacks.determinism_trace import format_sums, hash_tensor, hash_windows, zero_sums
from gptlab.training.checkpoints.reading import read_checkpoint
from gptlab.training.checkpoints.records import checkpoint_path, find_corruption
from gptlab.training.datamodule import TokenDataModule
from gptlab.training.devices import choose_devices
from gptlab.verification.comparison import TraceStep, first_difference, largest_difference
from gptlab.verification.configs import ProveConfig, comparable, extended, on_ranks, plan_ranks, shortened
from gptlab.verification.report import ProofResult
from gptlab.verification.runs import ProofRuns, RunFailed

WHOLE = "uninterrupted"  # the run that most proofs compare with


class ProofCase:
    """A configuration to verify.

    Args:
        config: The completed configuration.
        prepared: Its data.
        wanted: How much is verified.

    Raises:
        UserError: This machine lacks its devices, or it cannot be shortened.
    """

    def __init__(self, config: RunConfig, prepared: TokenDataset, wanted: ProveConfig) -> None:
        self.prepared, self.wanted = prepared, wanted
        devices = choose_devices(config.trainer, config.train, config.model)
        shares = config.trainer.data_parallel(devices.devices, devices.num_nodes)
        self.plan = config.train.plan(shares)
        self.config = shortened(config, wanted.steps)


def prove_all(case: ProofCase, runs: ProofRuns) -> Iterator[ProofResult]:
    """Runs one proof after the other; a proof whose run fails has failed."""
    for name, prove in PROOFS.items():
        try:
            yield from prove(case, runs)
        except RunFailed as error:
            yield _failed(name, error)


def killed_and_resumed(case: ProofCase, runs: ProofRuns) -> Iterator[ProofResult]:
    """Verifies that a run that was killed and resumed is bit-identical to an uninterrupted one."""
    name, after, steps = "killed and resumed", case.wanted.kill_after, case.wanted.steps
    whole = runs.trace(WHOLE, case.config)
    run_dir = runs.kill("killed", extended(case.config), after)
    resumed = runs.trace("resumed", case.config.model_copy(update={"resume": str(run_dir), "init_from": None}))
    difference = first_difference(whole, resumed)
    details: dict[str, Any] = {"killed_after": after, "steps": steps, "difference": difference and difference._asdict()}
    if difference is None:
        tensors = len(whole[-1].tensors)
        yield ProofResult(name, True, f"killed after step {after}; {steps} steps, {tensors} tensors bit-equal", details)
        return
    what = f"killed after step {after}; it differs {difference}"
    if other := first_difference(whole, runs.trace("repeated", case.config)):
        details["repeated"] = other._asdict()
        what += f". Two runs that were never killed differ, too, {other}: the arithmetic itself does not repeat"
    yield ProofResult(name, False, what, details)


def same_tokens(case: ProofCase, runs: ProofRuns) -> Iterator[ProofResult]:
    """Verifies that any number of ranks and workers loads, for every step, the tokens that were trained on."""
    expected = [line.tokens for line in runs.trace(WHOLE, case.config)]
    for ranks in case.wanted.ranks:
        name = f"tokens of {ranks} rank{'s' if ranks > 1 else ''}"
        try:
            plan = plan_ranks(case.config.train, ranks, case.plan.micro_batch_size)
        except UserError as error:
            yield _impossible(name, error)
            continue
        details: dict[str, Any] = {**plan._asdict(), "hashes": {}}
        wrong = []
        for workers in case.wanted.workers:
            with get_console().status(f"loading: {name}, {workers} workers"):
                found = loaded_tokens(case.config, case.prepared, plan, workers=workers, steps=case.wanted.steps)
            details["hashes"][f"{workers} workers"] = found
            if differing := [
                step for step, pair in enumerate(zip(found, expected, strict=True), 1) if len({*pair}) > 1
            ]:
                wrong.append(f"with {workers} workers first at step {differing[0]}")
        with_workers = " and ".join(map(str, case.wanted.workers))
        same = f"every step as trained on, with {with_workers} workers"
        yield ProofResult(name, not wrong, f"other than trained on: {', '.join(wrong)}" if wrong else same, details)


def same_losses(case: ProofCase, runs: ProofRuns) -> Iterator[ProofResult]:
    """Verifies that a run with accumulation or on two processes has the losses of one process."""
    on: Literal["cpu", "gpu"] = "gpu" if torch.cuda.device_count() >= 2 else "cpu"
    alone = comparable(case.config, on)
    size = case.plan.micro_batch_size
    ways = {"accumulated": ("single", 1, size // 2), "ddp": ("ddp", 2, size), "fsdp": ("fsdp", 2, size)}
    for way, (strategy, ranks, at_most) in ways.items():
        name = f"losses, {way}" if ranks == 1 else f"losses, {way} on {ranks}"
        try:
            if at_most == 0:
                raise UserError("the micro-batch is one sequence, which cannot be halved.")
            plan = plan_ranks(case.config.train, ranks, at_most)
        except UserError as error:
            yield _impossible(name, error)
            continue
        try:
            expected = runs.trace("one-process", on_ranks(alone, "single", case.plan._replace(world_size=1)))
            found = runs.trace(way, on_ranks(alone, strategy, plan))
        except RunFailed as error:
            yield _failed(name, error)
            continue
        yield compare_losses(name, expected, found, case.wanted.tolerance, plan._asdict() | {"on": on})


def checkpoint_round_trip(case: ProofCase, runs: ProofRuns) -> Iterator[ProofResult]:
    """Verifies that a checkpoint, as it is read, has the tensors that the run had in memory."""
    name, last = "checkpoint round trip", runs.trace(WHOLE, case.config)[-1]
    path = checkpoint_path(runs.run_dir(WHOLE) / CHECKPOINTS, last.step)
    details: dict[str, Any] = {"checkpoint": str(path), "step": last.step, "tensors": len(last.tensors)}
    if what := find_corruption(path):
        yield ProofResult(name, False, f"{path.name} is damaged: {what}", details)
        return
    checkpoint = read_checkpoint(path)
    saved = dict(checkpoint["state_dict"])
    for optimizer in checkpoint["optimizer_states"]:
        for parameter, moments in optimizer["state"].items():
            saved |= {f"{parameter}.{moment}": tensor for moment, tensor in moments.items()}
    differing = [key for key, hashed in last.tensors.items() if key not in saved or hash_tensor(saved[key]) != hashed]
    details["differing"] = differing
    if differing:
        what = f"{len(differing)} of {len(last.tensors)} tensors are not saved as they were, first {differing[0]}"
    else:
        what = f"{path.name}: {len(last.tensors)} tensors and every file as they were written"
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
    """Compares the losses of two runs, after verifying that their tokens are the same."""
    largest, step = largest_difference(expected, found)
    details |= {"largest_difference": largest if largest < math.inf else None, "step": step, "tolerance": tolerance}
    for key, lines in (("losses", found), ("losses_of_one_process", expected)):
        details[key] = [line.loss for line in lines]
    if others := [ours.step for ours, theirs in zip(expected, found, strict=False) if ours.tokens != theirs.tokens]:
        return ProofResult(name, False, f"trained on other tokens, first at step {others[0]}", details)
    passed = largest <= tolerance
    what = f"largest difference {largest:.1e} at step {step}, {'within' if passed else 'beyond'} {tolerance:.0e}"
    return ProofResult(name, passed, f"{what} ({details['on']}, float32, no dropout)", details)


def loaded_tokens(config: RunConfig, prepared: TokenDataset, plan: BatchPlan, *, workers: int, steps: int) -> list[str]:
    """Returns a hash of each step's tokens, as in a run's trace, from the loaders of all ranks alone."""
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
