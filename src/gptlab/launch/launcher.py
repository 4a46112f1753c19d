"""Launches a run from a validated configuration. Imports no torch before training starts.

Ranks started by torchrun or srun train in their own process, and so does a single run on one device. All other runs
train in workers (``supervisor``), one per device: environment variables of a run cannot leak into the next job of a
sweep, and Hydra and the checks run only once.
"""

import logging
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.config.components import TARGET, component_record, iter_targets
from gptlab.config.resolve import resolve_model, resolve_split
from gptlab.config.resume import START_KEYS, may_change
from gptlab.config.schema import RunConfig, is_on_hub
from gptlab.data.config import TokenizerConfig
from gptlab.data.order import training_order
from gptlab.data.prepare.splitting import check_val_split
from gptlab.data.prepare.tasks import PrepareOptions
from gptlab.data.shards.manifest import SPLITS, Manifest, Split, load_manifest
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.data.sources.corpora import check_source
from gptlab.data.tokenizers.text import unescape_line_breaks
from gptlab.data.tokenizers.tokenizer import load_tokenizer, prompt_ids
from gptlab.errors import UserError, install_extra
from gptlab.evaluation.hellaswag import read_examples_cached
from gptlab.files import check_no_links
from gptlab.launch.components import check_components, preflight_components, try_components
from gptlab.launch.prepare_data import prepare_with_progress, stored_tokenizer
from gptlab.launch.requeue import find_resumable_run
from gptlab.launch.signals import run_stoppable
from gptlab.launch.supervisor import Job, supervise
from gptlab.pretrained.external import check_archive, check_external, check_external_shape, is_external
from gptlab.pretrained.source import check_model_exists, resolve_path
from gptlab.tracking.environment import read_components
from gptlab.tracking.run_directory import (
    check_is_saved,
    check_run_size,
    check_weights_fit,
    load_config,
    newest_step,
    require_checkpoint,
    split_checkpoint,
)
from gptlab.tracking.wandb.opt_outs import check_mode
from gptlab.training.batch_plan import BatchPlan
from gptlab.training.config import TrainerConfig
from gptlab.training.distributed.processes import (
    check_cpu_processes,
    external_devices,
    launched_externally,
    may_have_gpu,
)

log = logging.getLogger(__name__)


class ReadyRun(NamedTuple):
    """Run that has passed all checks that need no torch.

    Attributes:
        config: Completed configuration, with absolute paths, the val split and the vocabulary size.
        prepared: Prepared data.
        plan: Batch plan; None if the number of devices is not known yet.
    """

    config: RunConfig
    prepared: TokenDataset
    plan: BatchPlan | None


def launch(
    config: RunConfig, run_dir: Path | None, *, extra_callbacks: Callable[..., Any], in_process: bool = True
) -> int:
    """Runs a validated configuration to its end.

    Args:
        config: Validated configuration.
        run_dir: Run directory assigned by a sweep; None creates ``outputs/<name>/<time>``.
        extra_callbacks: See ``gptlab.launch.train_run.train_run``; used if the run trains in this process.
        in_process: Whether a run on one device may train in this process; False if the process runs other jobs as well.

    Returns:
        The exit code.

    Raises:
        UserError: The run cannot be started; see ``preflight`` and ``gptlab.launch.train_run.train_run``.
    """
    config, run_dir = find_resumable_run(config, run_dir)
    if config.resume:
        try:
            check_val_split(config.data)
        except UserError as error:
            log.warning("The resumed run keeps its original val split. %s", error)
    ready = preflight(config)
    if launched_externally() or (ready.config.trainer.strategy == "single" and in_process):
        from gptlab.launch.train_run import train_run  # imports torch

        return run_stoppable(lambda: train_run(*ready, run_dir, extra_callbacks=extra_callbacks))
    read_examples_cached.cache_clear()  # the workers read the examples themselves
    return supervise(Job(ready.config, run_dir, ready.plan))


class CheckedStart(NamedTuple):
    """Result of ``check_start``.

    Attributes:
        config: Configuration with absolute paths and a resolved split.
        plan: Batches per device; None if the number of devices is not known yet.
        origin: Checkpoint or weights from which the run starts, if any.
        foreign_shape: Shape of the model if the weights are not those of a run.
        origin_config: Configuration of the run if they are.
    """

    config: RunConfig
    plan: BatchPlan | None
    origin: Path | None
    foreign_shape: dict[str, Any] | None
    origin_config: RunConfig | None


def check_start(config: RunConfig) -> CheckedStart:
    """Runs the checks that need neither torch nor the prepared data.

    Raises:
        UserError: The run cannot be started.
    """
    start = next((f"{key}={value}" for key in START_KEYS if (value := getattr(config, key))), "")
    config = resolve_split(config.with_absolute_paths())
    plan = None
    if isinstance(config.trainer.devices, int) and not launched_externally():
        plan = config.train.plan(config.trainer.data_parallel(config.trainer.devices, config.trainer.num_nodes))
    origin, checkpoint = split_checkpoint(resolve_path(config.init_from)) if config.init_from else (None, None)
    if origin:
        check_model_exists(origin, start)
        check_is_saved(checkpoint, start)
    if config.resume_from_nanogpt:
        check_archive(Path(config.resume_from_nanogpt), start)
    foreign_shape = check_external(origin, config.model, start) if origin and is_external(origin) else None
    origin_config = load_config(origin) if origin and not is_external(origin) else None
    config = resolve_model(config, origin_config)
    if config.resume:
        _check_start(config, Path(config.resume), f"resume={config.resume}")
    else:
        _check_start(config, origin, start)
    _check_loggers(config)
    check_components(config)
    if config.resume:
        _check_same_components(config, Path(config.resume))
    if not config.resume:
        check_source(config.data)
    return CheckedStart(config, plan, origin, foreign_shape, origin_config)


def preflight(config: RunConfig) -> ReadyRun:
    """Runs all checks that need no torch, prepares the data and completes the configuration.

    Raises:
        UserError: The run cannot be started. Checks that do not depend on the data run before it is prepared.
    """
    _check_processes(config.trainer)
    config, plan, origin, foreign_shape, origin_config = check_start(config)
    prepared = open_data(config)
    if config.callbacks.samples is not None:
        prompt = unescape_line_breaks(config.callbacks.samples.prompt)
        prompt_ids(prepared.tokenizer, prompt)  # raises if the prompt cannot be encoded
    if (hellaswag := config.callbacks.hellaswag) is not None:
        read_examples_cached(Path(hellaswag.path), prepared.tokenizer, hellaswag.limit)  # raises if it cannot be read
    preflight_components(config, prepared)
    if config.resume:
        _check_same_data(config, prepared, Path(config.resume))
    _check_length(config, prepared.manifest)
    _check_order(config, prepared)
    config = config.with_vocabulary(prepared.manifest.vocab_size)
    try_components(config)
    if foreign_shape is not None and origin:
        check_external_shape(origin, foreign_shape, config.model)  # with the vocabulary size
    elif origin_config is not None and origin:
        _check_same_tokens(prepared, origin, resized=config.model.resize_embeddings)
        check_weights_fit(origin, origin_config.model, config.model)
    return ReadyRun(config, prepared, plan)


def _check_processes(trainer: TrainerConfig) -> None:
    """Raises UserError if the run has too many processes for the CPU of this machine, before torch is imported."""
    processes = external_devices()[0] if launched_externally() else trainer.devices
    if processes != "auto" and (trainer.accelerator == "cpu" or not may_have_gpu()):
        check_cpu_processes(processes)


def open_data(config: RunConfig) -> TokenDataset:
    """Opens the data of a run, and prepares it first if necessary; see ``prepare_with_progress``.

    A run that resumes, or that starts from a run with the same ``tokenizer.path``, has the tokenizer of that run, also
    if the file has changed since.
    """
    start, stored = config.resume or config.init_from, None
    if config.tokenizer.name == "file" and start and not is_on_hub(start):
        run_dir = split_checkpoint(Path(start))[0]
        if config.resume or _has_tokenizer(run_dir, config.tokenizer):
            stored = stored_tokenizer(run_dir, config.tokenizer)
    return prepare_with_progress(config.data, config.tokenizer, PrepareOptions(), stored)


def _has_tokenizer(run_dir: Path, tokenizer: TokenizerConfig) -> bool:
    """Whether a path is a run directory, and its tokenizer has the same configuration."""
    return not is_external(run_dir) and load_config(run_dir).tokenizer == tokenizer


def _check_start(config: RunConfig, start: Path | None, named: str) -> None:
    """Checks that the checkpoint or weights from which the run starts exist."""
    if start and not is_external(start):
        require_checkpoint(start, named)
    if config.resume:
        check_no_links(Path(config.resume))
        check_run_size(Path(config.resume), config.model)
        _check_steps_left(config, Path(config.resume))
    if config.lora and not start:
        raise UserError("lora adapts trained weights, but none are given. Set init_from=<weights>.")
    if not config.resume:
        check_val_split(config.data)


def _check_steps_left(config: RunConfig, run_dir: Path) -> None:
    """Checks that a run to resume has not been trained for more steps than its new length."""
    if (step := newest_step(run_dir)) is not None and step > config.steps:
        given, needed = f"train.max_steps={config.steps}", f"train.max_steps={step}"
        if (tokens := config.train.max_tokens) is not None:
            given = f"train.max_tokens={tokens}, which is {config.steps} steps"
            needed = f"train.max_tokens={config.train.stages.first(step) * config.model.block_size}"
        raise UserError(
            f"{given}: {run_dir} has been trained for {step} steps already, and resuming cannot shorten it. Use "
            f"{needed} or more."
        )


def _check_loggers(config: RunConfig) -> None:
    """Checks that the loggers are installed and allowed."""
    if config.logger.tensorboard is not None and find_spec("tensorboard") is None:
        raise UserError(f"logger=tensorboard needs the tensorboard package: {install_extra('tensorboard')}")
    if config.logger.wandb is not None:
        check_mode(config.logger.wandb)


def _check_length(config: RunConfig, manifest: Manifest) -> None:
    """Checks that each split is long enough for the block size."""
    block_size = config.model.block_size
    needed: Mapping[Split, int] = {"train": 2 * block_size, "val": block_size + 1}
    for split in SPLITS:
        if (tokens := manifest.tokens(split)) < needed[split]:
            larger_val = split == "val" and config.data.corpus != "shards"
            raise UserError(
                f"{manifest.origin} is too short: its {split} split has {tokens} tokens, but "
                f"model.block_size={block_size} needs at least {needed[split]}. Use a smaller model.block_size or more "
                f"text{', or a larger data.val_fraction' if larger_val else ''}."
            )


def _check_order(config: RunConfig, prepared: TokenDataset) -> None:
    """Checks that the data can be read in the configured order."""
    if config.data.documents == "masked" and prepared.tokenizer.end_of_text is None:
        raise UserError(
            f"data.documents=masked: tokenizer={config.tokenizer.name} has no end-of-text token to separate "
            "documents. Use data.documents=packed."
        )
    try:
        order = training_order(prepared.manifest, config.data, config.model.block_size, config.seed)
    except ValueError as error:
        raise UserError(
            f"data.order={config.data.order}, model.block_size={config.model.block_size}: {error}."
        ) from None
    train, val = prepared.stream("train"), prepared.manifest.splits["val"]
    prepared.store.check_room([*val, *(train.shards[number] for number in train.within(order.ahead(0)))])


def _check_same_data(config: RunConfig, prepared: TokenDataset, run_dir: Path) -> None:
    """Checks that a resumed run has the same data; other data would silently change the data order."""
    was, now = load_manifest(run_dir).fingerprint(), prepared.manifest.fingerprint()
    if was == now:
        return
    sentence = (
        f"The data in {prepared.folder} differs from the training data of {run_dir}: its fingerprint is {now[:12]}, "
        f"the run's is {was[:12]}."
    )
    if not config.force_resume:
        raise UserError(
            f"{sentence} To start a new run on this data from these weights: init_from={run_dir}. To resume anyway: "
            "force_resume=true"
        )
    log.warning("%s Resuming anyway, because force_resume=true.", sentence)


def _check_same_components(config: RunConfig, run_dir: Path) -> None:
    """Checks that the code of a resumed run's components is unchanged, if it is part of what the run computes."""
    recorded = read_components(run_dir)
    for key, target in iter_targets(config.model_dump(mode="json")):
        now, earlier = component_record(key, target), recorded.get(key)
        if earlier is None or earlier == now or earlier.get("target") != target:
            continue
        part = "version" if earlier.get("version") != now["version"] else "sha256"
        sentence = (
            f"{key}.{TARGET}={target} has changed since {run_dir} was trained: {part}={now[part]}, but was "
            f"{earlier.get(part)}."
        )
        if not config.force_resume and not may_change(key):
            raise UserError(f"{sentence} Restore the earlier code. To resume anyway: force_resume=true")
        log.warning("%s", sentence)


def _check_same_tokens(prepared: TokenDataset, run_dir: Path, *, resized: bool) -> None:
    """Checks that weights were trained with the same tokenizer, or, if they are resized, with the same first tokens."""
    record, ours = load_manifest(run_dir).tokenizer, prepared.tokenizer
    if record == prepared.manifest.tokenizer:
        return
    sentence = f"{run_dir} was trained with a different tokenizer than tokenizer={ours.record()['name']}"
    if not resized:
        raise UserError(f"{sentence}. If only token IDs at the end differ: model.resize_embeddings=true")
    theirs = load_tokenizer(record, None, run_dir)
    common = range(min(ours.vocab_size, theirs.vocab_size))
    if other := [i for i in common if ours.to_bytes([i]) != theirs.to_bytes([i])]:
        raise UserError(
            f"{sentence}: {len(other):,} of their first {len(common):,} token IDs are other tokens. The first is "
            f"{other[0]}: {ours.decode([other[0]])!r:.40} instead of {theirs.decode([other[0]])!r:.40}. "
            "model.resize_embeddings can only add or drop token IDs at the end."
        )
