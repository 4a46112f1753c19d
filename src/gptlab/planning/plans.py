"""A plan, put together. Imports no torch."""

from typing import Any, NamedTuple

from gptlab.config.schema import RunConfig
from gptlab.data.shards.manifest import Manifest
from gptlab.model.config import flops_per_token, parameter_count
from gptlab.planning.budget import TOKENS_PER_PARAMETER, Choice, choose
from gptlab.planning.calibration import Measured, known
from gptlab.planning.memory import Memory, Spread, largest_micro_batch, memory
from gptlab.planning.parameters import by_part
from gptlab.planning.target import Target, chunk_of, target_here, target_on
from gptlab.planning.timing import Length, Time, as_measured, at_mfu, length
from gptlab.planning.traffic import Disk, disk, traffic
from gptlab.training.gpu_specs import named

COMPARED = ("h100", "a100", "l4", "rtx4090")  # where no GPU is named
OTHERS = 8  # devices of the strategies that the run does not use, where it uses one


class Alternative(NamedTuple):
    """A way to spread the model, and what a device then needs.

    Attributes:
        spread: The way.
        batch: Sequences at once.
        total: Bytes of a device at its fullest.
        checkpointed: The same, if every block is computed again in the backward pass.
        whole_logits: The same, if the logits of a micro-batch are there at once.
        traffic: Bytes that a device sends in a step.
    """

    spread: Spread
    batch: int
    total: float
    checkpointed: float
    whole_logits: float
    traffic: float


class Plan(NamedTuple):
    """What a run will be and need.

    Attributes:
        config: Of the run, with the vocabulary.
        target: What its memory is planned for.
        parameters: By part.
        length: How much there is to do.
        batch: Sequences of a device at once.
        spread: How the model is spread.
        memory: Of one device, at its fullest.
        largest: Sequences of a device at once that fit; None where its memory is not known.
        alternatives: Other ways to spread it.
        times: How long it takes, on what.
        disk: What it needs there.
        manifest: Of the data; None where it is not prepared.
        measured: Of such a run, here.
    """

    config: RunConfig
    target: Target
    parameters: dict[str, int]
    length: Length
    batch: int
    spread: Spread
    memory: Memory
    largest: int | None
    alternatives: list[Alternative]
    times: list[Time]
    disk: Disk
    manifest: Manifest | None
    measured: Measured | None

    @property
    def flops(self) -> float:
        """Of the whole training, forward and backward."""
        return float(flops_per_token(self.config.model)) * self.length.tokens

    @property
    def tokens_per_parameter(self) -> float:
        """Of the run."""
        return self.length.tokens / parameter_count(self.config.model)


def make_plan(config: RunConfig, manifest: Manifest | None, gpus: list[str], mfu: float) -> Plan:
    """Put a plan together.

    Args:
        config: Of the run, with the vocabulary.
        manifest: Of its data, where that is prepared.
        gpus: That were named; the first is what the memory is planned for. None: it is this machine.
        mfu: Share of its peak that a GPU is taken to reach.

    Raises:
        UserError: A GPU is not known, or the batch cannot be dealt out.
    """
    target = target_of(config, gpus)
    spread = spread_of(config, target)
    batch = config.train.plan(spread.copies).micro_batch_size
    done = length(config, manifest.tokens("val") if manifest else None)
    chunk = chunk_of(config)
    measured = known(config, target)
    own = [as_measured(done, target, measured)] if measured else []
    return Plan(
        config=config,
        target=target,
        parameters=by_part(config.model),
        length=done,
        batch=batch,
        spread=spread,
        memory=memory(config, target, spread, batch, chunk),
        largest=largest_micro_batch(config, target, spread, chunk),
        alternatives=_alternatives(config, target, spread),
        times=own + [at_mfu(config, done, target_on(config, named(gpu)), mfu) for gpu in gpus or COMPARED],
        disk=disk(config, target.precision, _tokens(done, manifest)),
        manifest=manifest,
        measured=measured,
    )


def choose_for(config: RunConfig, budget: float, gpus: list[str]) -> Choice:
    """Choose a run for a budget, and a micro-batch that fits; see ``choose``, and for ``gpus`` ``make_plan``."""
    choice = choose(config, budget, spread_of(config, target_of(config, gpus)).copies)
    config = choice.config
    target = target_of(config, gpus)
    spread = spread_of(config, target)
    share = config.train.global_batch_size // spread.copies
    largest = largest_micro_batch(config, target, spread, chunk_of(config))
    if largest is None or largest >= share:
        return choice
    fitting = max(size for size in range(1, max(1, largest) + 1) if share % size == 0)
    train = config.train.model_copy(update={"micro_batch_size": fitting})
    overrides = [*choice.overrides, f"train.micro_batch_size={fitting}"]
    return choice._replace(config=config.model_copy(update={"train": train}), overrides=overrides)


def target_of(config: RunConfig, gpus: list[str]) -> Target:
    """Say what a plan is for: the first of the GPUs that were named, or this machine; UserError: it is not known."""
    return target_on(config, named(gpus[0])) if gpus else target_here(config)


def spread_of(config: RunConfig, target: Target) -> Spread:
    """Say how a run's model is spread."""
    trainer = config.trainer
    trainer.data_parallel(target.devices, target.nodes)  # says what cannot be
    return Spread(trainer.strategy, target.world_size, trainer.tensor_parallel)


def peak(config: RunConfig, target: Target) -> Memory:
    """Say what one device of a run needs at its fullest."""
    spread = spread_of(config, target)
    return memory(config, target, spread, config.train.plan(spread.copies).micro_batch_size, chunk_of(config))


def as_json(plan: Plan) -> dict[str, Any]:
    """Write a plan as plain data: bytes, seconds, tokens a second."""
    model = plan.config.model
    return {
        "target": {**plan.target._asdict(), "gpu": plan.target.gpu and plan.target.gpu._asdict()},
        "parameters": {"total": parameter_count(model), **plan.parameters},
        "flops_per_token": flops_per_token(model),
        "flops": plan.flops,
        **plan.length._asdict(),
        "tokens_per_parameter": plan.tokens_per_parameter,
        "compute_optimal_tokens": TOKENS_PER_PARAMETER * parameter_count(model),
        "batch": {"global": plan.config.train.global_batch_size, "micro": plan.batch, "largest_micro": plan.largest},
        "memory": {**plan.memory._asdict(), "total": plan.memory.total},
        "measured": plan.measured and plan.measured.model_dump(),
        "spreads": [{**way._asdict(), "spread": way.spread._asdict()} for way in plan.alternatives],
        "times": [time._asdict() for time in plan.times],
        "disk": plan.disk._asdict(),
        "config": plan.config.model_dump(mode="json"),
    }


def _alternatives(config: RunConfig, target: Target, own: Spread) -> list[Alternative]:
    """Spread the model in every way, over the run's devices, or over eight where it has one."""
    devices = own.devices if own.devices > 1 else OTHERS
    split = max(2, own.split)
    ways = [Spread("single", 1), Spread("ddp", devices), Spread("fsdp", devices), Spread("fsdp_tp", devices, split)]
    if config.model.value_residual or config.model.value_embeddings or config.model.n_head % split or devices % split:
        ways = ways[:-1]  # what tensor parallelism cannot split
    return [_alternative(config, target, way) for way in ways]


def _alternative(config: RunConfig, target: Target, way: Spread) -> Alternative:
    batch = _share(config, way)
    model = config.model.model_copy(update={"activation_checkpointing": True})
    chunk = chunk_of(config)
    there = target._replace(compile=_compiled(target, way))
    return Alternative(
        way,
        batch,
        memory(config, there, way, batch, chunk).total,
        memory(config.model_copy(update={"model": model}), there, way, batch, chunk).total,
        memory(config, there, way, batch, None).total,
        traffic(config, way, target.precision, batch),
    )


def _share(config: RunConfig, way: Spread) -> int:
    """Sequences of a device at once, as named or as nearly as the batch can be dealt out."""
    train = config.train
    return max(1, min(train.micro_batch_size or train.global_batch_size, train.global_batch_size // way.copies))


def _compiled(target: Target, way: Spread) -> Any:
    return "blocks" if target.compile and way.is_sharded else target.compile


def _tokens(done: Length, manifest: Manifest | None) -> int:
    """Tokens on the disk: those of the corpus, or those that the run reads at most."""
    if manifest is None:
        return done.tokens
    return manifest.tokens("train") + manifest.tokens("val")
