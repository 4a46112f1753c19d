"""Where a run's processes come from. Imports no torch.

Where torchrun or srun has started the ranks already, each runs here, and so does a single run on one device. All others
run in workers (``supervisor``), one a device: their environment cannot leak into the next job of a sweep, and Hydra is
not asked twice.
"""

import logging
from importlib.util import find_spec
from pathlib import Path

from gptlab.config.resume import with_val_split
from gptlab.config.schema import Config
from gptlab.data.order import training_order
from gptlab.data.prepare.splitting import check_val_split
from gptlab.data.prepare.tasks import PrepareOptions
from gptlab.data.shards.manifest import SPLITS, Split, load_manifest
from gptlab.data.shards.token_dataset import TokenDataset
from gptlab.data.tokenizers.tokenizer import prompt_ids
from gptlab.errors import UserError
from gptlab.evaluation.hellaswag import read_examples_cached
from gptlab.launch.prepare_data import prepare_with_progress
from gptlab.launch.requeued import go_on
from gptlab.launch.signals import stoppable
from gptlab.launch.supervisor import supervise
from gptlab.pretrained.external import check_external, is_external
from gptlab.pretrained.source import resolve_path
from gptlab.tracking.run_directory import CHECKPOINTS, check_weights_fit, has_checkpoint, load_config
from gptlab.tracking.wandb.opt_outs import check_mode
from gptlab.training.distributed.processes import launched_externally

log = logging.getLogger(__name__)


def launch(config: Config, place: Path | None, *, alone: bool = True) -> int:
    """Run a checked configuration to its end.

    Args:
        config: From ``gptlab.config.schema.check``.
        place: The run directory that a sweep has set apart; None names one by the time.
        alone: Whether this process runs nothing else.

    Returns:
        The exit status.
    """
    config, place = go_on(config, place)
    if config.resume:
        try:
            check_val_split(config.data)
        except UserError as error:
            log.warning("This run keeps the split that it began with. %s", error)
    config, prepared = make_ready(config)
    if launched_externally() or (config.trainer.strategy == "single" and alone):
        from gptlab.launch.train_run import run  # torch is needed from here on

        return stoppable(lambda: run(config, prepared, place))
    read_examples_cached.cache_clear()  # the workers have their own
    return supervise(config, place)


def make_ready(config: Config) -> tuple[Config, TokenDataset]:
    """Prepare the data and complete the configuration; UserError for what can be known without torch."""
    config = with_val_split(config.with_absolute_paths())
    if isinstance(config.trainer.devices, int) and not launched_externally():
        shares = config.trainer.data_parallel(config.trainer.devices, config.trainer.num_nodes)
        config.train.plan(shares)
    origin = resolve_path(config.init_from) if config.init_from else None
    if origin and is_external(origin):
        check_external(origin, config.model)
    elif earlier := Path(config.resume) if config.resume else origin:
        load_config(earlier)
        if not has_checkpoint(earlier):
            raise UserError(f"{earlier} has no checkpoint yet: nothing is in {earlier / CHECKPOINTS}.")
    if config.lora and not (origin or config.resume):
        raise UserError("lora adapts weights that are learnt already, and there are none: name them with init_from=.")
    if config.logger.tensorboard is not None and find_spec("tensorboard") is None:
        raise UserError("logger=tensorboard needs the tensorboard package: pip install tensorboard")
    if config.logger.wandb is not None:
        check_mode(config.logger.wandb)
    if not config.resume:
        check_val_split(config.data)
    prepared = prepare_with_progress(config.data, config.tokenizer, PrepareOptions())
    if config.callbacks.samples is not None:
        prompt_ids(prepared.tokenizer, config.callbacks.samples.prompt)  # says what it cannot encode
    if (wanted := config.callbacks.hellaswag) is not None:
        read_examples_cached(Path(wanted.path), prepared.tokenizer, wanted.limit)  # so does this
    if config.resume:
        _check_same_run(config, prepared, Path(config.resume))
    block_size, manifest = config.model.block_size, prepared.manifest
    needed: dict[Split, int] = {"train": 2 * block_size, "val": block_size + 1}
    for split in SPLITS:
        if (tokens := manifest.tokens(split)) < needed[split]:
            raise UserError(
                f"{manifest.origin} is too short: it has {tokens} tokens for {split}, and "
                f"model.block_size={block_size} needs at least {needed[split]}. A smaller block or more text would do"
                f"{', or a larger data.val_fraction' if split == 'val' and config.data.corpus != 'shards' else ''}."
            )
    _check_order(config, prepared)
    config = config.with_vocabulary(manifest.vocab_size)
    if origin and is_external(origin):
        check_external(origin, config.model)  # with the vocabulary
    elif origin:
        _check_same_tokens(prepared, origin)
        check_weights_fit(origin, config.model)
    return config, prepared


def _check_order(config: Config, prepared: TokenDataset) -> None:
    """See that the data can be read in the order that is asked for."""
    if config.data.documents == "masked" and prepared.tokenizer.end_of_text is None:
        raise UserError(
            f"data.documents=masked: tokenizer={config.tokenizer.name} has no end of text that documents could be told "
            "apart by; data.documents=packed needs none."
        )
    try:
        order = training_order(prepared.manifest, config.data, config.model.block_size, config.seed)
    except ValueError as error:
        raise UserError(
            f"data.order={config.data.order}, model.block_size={config.model.block_size}: {error}."
        ) from None
    train, val = prepared.stream("train"), prepared.manifest.splits["val"]
    prepared.store.check_room([*val, *(train.shards[number] for number in train.within(order.ahead(0)))])


def _check_same_run(config: Config, prepared: TokenDataset, directory: Path) -> None:
    """Refuse to go on with other data: the order would be another, and nothing would say so."""
    was, now = load_manifest(directory).fingerprint(), prepared.manifest.fingerprint()
    if was != now:
        sentence = (
            f"The data in {prepared.folder} is not what {directory} was trained on: its fingerprint is {now[:12]}, the "
            f"run's is {was[:12]}."
        )
        if not config.force_resume:
            raise UserError(
                f"{sentence} For a new run on it from these weights: init_from={directory}. To go on all the same: "
                "force_resume=true"
            )
        log.warning("%s The run goes on all the same.", sentence)
    if config.force_resume:
        check_weights_fit(directory, config.model, cropped=False)


def _check_same_tokens(prepared: TokenDataset, directory: Path) -> None:
    """Refuse weights whose ids mean other text."""
    if load_manifest(directory).tokenizer != prepared.manifest.tokenizer:
        raise UserError(
            f"{directory} was trained on other tokens than tokenizer={prepared.manifest.tokenizer['name']} has here."
        )
