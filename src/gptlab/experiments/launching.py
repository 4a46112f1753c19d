"""Where a run's processes come from. Imports no torch.

One process with one device runs here. A run over several devices gets a process of its own, from which Lightning
starts the other ranks: so its environment cannot leak into the next job of a sweep, and Hydra is not asked twice.
Where torchrun or SLURM has started the ranks already, each runs here.
"""

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from gptlab.data.order import training_order
from gptlab.data.prepared import Prepared
from gptlab.data.remote import RemoteFolder
from gptlab.data.shards import SPLITS, Split, load_manifest
from gptlab.data.tasks import Work
from gptlab.data.tokenizers import prompt_ids
from gptlab.errors import UserError
from gptlab.experiments.directory import check_fit, find_checkpoint, load_config
from gptlab.experiments.preparing import prepare_with_progress
from gptlab.experiments.schema import Config
from gptlab.training.batch import plan_batch
from gptlab.training.config import BEST, LAST
from gptlab.training.processes import started_from_outside

WORKER = "gptlab.experiments.worker"
PATIENCE = 5.0  # seconds a worker has to end by itself


def launch(config: Config, place: Path | None) -> int:
    """Run a checked configuration to its end.

    Args:
        config: From ``gptlab.experiments.schema.check``.
        place: The run directory that a sweep has set apart; None names one by the time.

    Returns:
        The exit status.
    """
    config, prepared = make_ready(config)
    if started_from_outside() or (config.trainer.strategy == "single" and place is None):
        from gptlab.experiments.job import run  # torch is needed from here on

        run(config, prepared, place)
        return 0
    return _run_in_process(config, place)


def make_ready(config: Config) -> tuple[Config, Prepared]:
    """Prepare the data and complete the configuration; UserError for what can be known without torch."""
    config = config.with_absolute_paths()
    if isinstance(config.trainer.devices, int) and not started_from_outside():
        world_size = config.trainer.devices * config.trainer.num_nodes
        plan_batch(config.train.global_batch_size, config.train.micro_batch_size, world_size)
    for earlier in filter(None, (config.resume, config.init_from)):
        load_config(Path(earlier))
        find_checkpoint(Path(earlier), BEST, LAST)
    if config.logger.tensorboard is not None and find_spec("tensorboard") is None:
        raise UserError("logger=tensorboard needs the tensorboard package: pip install tensorboard")
    prepared = prepare_with_progress(config.data, config.tokenizer, Work())
    if config.callbacks.samples is not None:
        prompt_ids(prepared.tokenizer, config.callbacks.samples.prompt)  # says what it cannot encode
    if config.resume:
        _check_same_data(prepared, Path(config.resume))
    block_size, manifest = config.model.block_size, prepared.manifest
    needed: dict[Split, int] = {"train": 2 * block_size, "val": block_size + 1}
    for split in SPLITS:
        if (tokens := manifest.tokens(split)) < needed[split]:
            raise UserError(
                f"{manifest.origin} is too short: it has {tokens} tokens for {split}, and "
                f"model.block_size={block_size} needs at least {needed[split]}. A smaller block or more text would do."
            )
    _check_order(config, prepared)
    config = config.with_vocabulary(manifest.vocab_size)
    if config.init_from:
        _check_same_tokens(prepared, Path(config.init_from))
        check_fit(Path(config.init_from), config.model)
    return config, prepared


def _check_order(config: Config, prepared: Prepared) -> None:
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
    if isinstance(prepared.store, RemoteFolder):
        train, val = prepared.stream("train"), prepared.manifest.splits["val"]
        at_once = [train.shards[number] for number in train.within(order.ahead(0))]
        prepared.store.check_room([*val, *at_once])


def _check_same_data(prepared: Prepared, directory: Path) -> None:
    """Refuse to go on with other data: the order would be another, and nothing would say so."""
    was, now = load_manifest(directory).fingerprint(), prepared.manifest.fingerprint()
    if was != now:
        raise UserError(
            f"The data in {prepared.folder} is not what {directory} was trained on: its fingerprint is {now[:12]}, the "
            f"run's is {was[:12]}. For a new run on it from these weights: init_from={directory}"
        )


def _check_same_tokens(prepared: Prepared, directory: Path) -> None:
    """Refuse weights whose ids mean other text."""
    if load_manifest(directory).tokenizer != prepared.manifest.tokenizer:
        raise UserError(
            f"{directory} was trained on other tokens than tokenizer={prepared.manifest.tokenizer['name']} has here."
        )


def _run_in_process(config: Config, place: Path | None) -> int:
    """Start the worker, and wait for it; what ends this process ends the worker, which ends its ranks."""
    with tempfile.NamedTemporaryFile("w", prefix="gptlab-", suffix=".json") as file:
        json.dump({"config": config.model_dump(mode="json"), "place": place and str(place.absolute())}, file)
        file.flush()
        worker = subprocess.Popen((sys.executable, "-m", WORKER, file.name))
        signal.signal(signal.SIGTERM, lambda *_: worker.terminate())
        while True:
            try:
                return _status(worker.wait())
            except KeyboardInterrupt:  # which a terminal has sent to the worker as well, but `kill` has not
                with contextlib.suppress(subprocess.TimeoutExpired):
                    return _status(worker.wait(PATIENCE))
                worker.send_signal(signal.SIGINT)


def _status(returned: int) -> int:
    """Make an exit status of what a process returned, as shells do: 128 + n for one that signal n has ended."""
    return returned if returned >= 0 else 128 - returned
