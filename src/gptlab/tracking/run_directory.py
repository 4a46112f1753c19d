"""Run directories outputs/<name>/<time>/, which contain everything about a run. Imports no torch."""

import errno
import functools
import json
import os
import re
import sys
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import yaml

from gptlab.config.base import validate
from gptlab.config.components import component_record, is_component, iter_targets
from gptlab.config.locations import outputs_folder
from gptlab.config.schema import RunConfig
from gptlab.config.stored import complete
from gptlab.data.shards.manifest import Manifest
from gptlab.errors import UserError, failure_reason
from gptlab.files import check_no_link, open_append, read_regular, write_durably
from gptlab.model.config import SHAPE_KEYS, GPTConfig, parameter_count
from gptlab.parsing import parse_yaml
from gptlab.terminal import print_message
from gptlab.tracking.environment import ENVIRONMENT, record_environment
from gptlab.tracking.run_lock import RunLock
from gptlab.tracking.run_store.runs import CHECKPOINTS, CONFIG, FORECAST, METRICS
from gptlab.tracking.run_store.state import STATE
from gptlab.training.checkpoints.records import (
    PREFIX,
    best_intact,
    checkpoint_path,
    checkpoint_step,
    find_corruption,
    list_checkpoints,
    newest_intact,
)
from gptlab.training.distributed.processes import is_first_rank, is_worker

LOG, TRACE = "train.log", "trace.jsonl"
STACKS = "stacks"  # stack traces of processes that made no progress


def create_run_dir(config: RunConfig, manifest: Manifest, run_dir: Path | None, lock: RunLock) -> Path:
    """Creates and locks the directory of a new run, and writes its configuration, data manifest and environment.

    Args:
        config: Complete configuration, which suffices to repeat the run.
        manifest: Manifest of the data, including the tokenizer.
        run_dir: Run directory; None creates ``outputs/<name>/<time>``.
        lock: Lock to acquire before anything is written.

    Returns:
        The absolute path of the run directory.

    Raises:
        UserError: The directory cannot be created or locked, or another process has written a run there.
    """
    try:
        directory = claim_directory(outputs_folder() / config.name) if run_dir is None else run_dir
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"Cannot create a run directory in {outputs_folder().absolute()}: {failure_reason(error)}."
        ) from error
    lock.acquire(directory)
    if (directory / CONFIG).is_file() and has_checkpoint(directory):  # written by the previous owner of the lock
        raise UserError(
            f"{directory} was written by another process in the meantime. Run the same command again to resume that "
            "run."
        )
    manifest.save(directory)
    record_config(config, directory)
    return directory.absolute()


def record_config(config: RunConfig, directory: Path) -> None:
    """Writes the configuration and the environment of a run; a resume overwrites them."""
    values = without_origin(config)
    write_durably(directory / CONFIG, yaml.safe_dump(values, sort_keys=False, allow_unicode=True))
    record_environment(directory, {key: component_record(key, target) for key, target in iter_targets(values)})


def check_writable(directory: Path) -> None:
    """Checks that a resumed run can replace or append to its files, before it writes any of them.

    Raises:
        UserError: There is a directory in place of a file, or a file to which text is appended is not writable.
    """
    for name in (CONFIG, ENVIRONMENT, FORECAST, METRICS, STATE, LOG, TRACE):
        path = directory / name
        try:
            if path.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
            if name in (LOG, TRACE) and path.exists():
                open_append(path).close()
        except OSError as error:
            raise UserError(f"{path} cannot be written: {failure_reason(error)}. Remove it.") from error


def without_origin(config: RunConfig) -> dict[str, Any]:
    """Returns the configuration as plain data, with ``resume`` and ``force_resume`` at their defaults."""
    return config.model_copy(update={"resume": None, "force_resume": False}).model_dump(mode="json")


def claim_directory(parent: Path) -> Path:
    """Creates a new directory in ``parent`` that is named by the current time, and returns its path.

    Raises:
        UserError: ``parent`` cannot be created, because there is a file or a link to a missing directory in its path,
            or too many directories have been created in the same second.
    """
    try:
        parent.mkdir(parents=True, exist_ok=True)
    except (FileExistsError, NotADirectoryError):
        path = next(path for path in (parent, *parent.parents) if path.is_symlink() or path.is_file())
        reason = "a file" if path.is_file() else f"a link to {path.readlink()}, which does not exist"
        raise UserError(f"{parent} cannot be created: {path} is {reason}.") from None
    stamp = time.strftime("%Y-%m-%d_%H-%M-%S")
    for name in (stamp, *(f"{stamp}-{i}" for i in range(2, 1000))):
        try:
            (parent / name).mkdir(parents=True)
        except FileExistsError:
            continue
        return parent / name
    raise UserError(f"{parent} already contains 999 directories named {stamp} or {stamp}-<number>.")


def load_config(directory: Path, named: str | None = None) -> RunConfig:
    """Reads the configuration of a run. Keys that an earlier version did not have get their defaults in conf/.

    Args:
        directory: Run directory.
        named: Override that selects the directory, for the message, such as ``resume=outputs/run``.

    Raises:
        UserError: The configuration is missing or invalid.
    """
    path = directory / CONFIG
    if not path.is_file():
        missing = f"it has no {CONFIG}" if directory.is_dir() else "the directory does not exist"
        raise UserError(f"{named or directory} is not a run directory: {missing} (working directory: {Path.cwd()}).")
    try:
        text = read_regular(path)
        values = parse_yaml(text)
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {failure_reason(error)}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not the configuration of a run.")
    added: dict[str, Any] = {}
    try:
        config = validate(RunConfig, values)
    except UserError as error:
        completed, added = complete(values)
        if not added or not text.endswith("\n"):
            raise _invalid(path, error, text) from None
        try:
            config = validate(RunConfig, completed)
        except UserError as other:
            raise _invalid(path, other, text) from None
    if added and is_first_rank() and not is_worker():  # the process that started the workers has printed it
        _report_added(path.absolute(), ", ".join(f"{key}={json.dumps(value)}" for key, value in added.items()))
    return config


def _invalid(path: Path, error: UserError, text: str) -> UserError:
    """Returns the error of a file with this text, from that of its values, which is written for the command line."""
    problem = re.sub(r" Set it on the command line: .*", "", str(error))
    hint = "" if text.endswith("\n") else " The file may be truncated: its last line has no line break."
    return UserError(f"{path} is not valid: {problem}{hint}")


@functools.cache
def _report_added(path: Path, added: str) -> None:
    """Prints once which keys a configuration of an earlier version does not have."""
    print_message(f"gptlab: {path} was written by an earlier version; default used: {added}.", file=sys.stderr)


def newest_run(name: str) -> Path | None:
    """Returns the run directory in ``outputs/<name>`` with the newest intact checkpoint; None if there is none."""
    run_dirs = (path for path in (outputs_folder() / name).glob("*/") if (path / CONFIG).is_file())
    saved = {path.absolute(): list_checkpoints(path / CHECKPOINTS) for path in run_dirs}
    runs = sorted((path for path in saved if saved[path]), key=lambda path: saved[path][-1].stat().st_mtime)
    return next((path for path in reversed(runs) if newest_intact(path / CHECKPOINTS)), None)


def has_checkpoint(directory: Path) -> bool:
    """Whether a run has a checkpoint, which may be damaged."""
    return bool(list_checkpoints(directory / CHECKPOINTS))


def newest_step(directory: Path) -> int | None:
    """Returns the step of the newest checkpoint, which may be damaged; None if there is none."""
    steps = [checkpoint_step(checkpoint_dir) for checkpoint_dir in list_checkpoints(directory / CHECKPOINTS)]
    return max(steps, default=None)


def newest_checkpoint(directory: Path) -> Path:
    """Returns the newest intact checkpoint of a run; raises UserError if there is none."""
    return _require(directory, newest_intact(directory / CHECKPOINTS))


def best_checkpoint(directory: Path) -> Path:
    """Returns the best intact checkpoint of a run, by val loss; raises UserError if there is none."""
    return _require(directory, best_intact(directory / CHECKPOINTS))


def split_checkpoint(path: Path) -> tuple[Path, Path | None]:
    """Splits the path of a checkpoint, <run>/checkpoints/step_<n>, into its run directory and the checkpoint.

    Returns:
        The run directory and the checkpoint, with leading zeros in its name; for any other path, ``path`` and None.
    """
    folder, number = path.parent, path.name.removeprefix(PREFIX)
    is_named = folder.name == CHECKPOINTS and number != path.name and number.isdecimal()
    if not is_named or not (folder.parent / CONFIG).is_file():
        return path, None
    return folder.parent, checkpoint_path(folder, int(number))


def check_is_saved(checkpoint_dir: Path | None, named: str) -> None:
    """Raises UserError if a checkpoint is missing or a link. ``named`` is the override that selects it."""
    if checkpoint_dir is not None and checkpoint_dir not in (saved := list_checkpoints(checkpoint_dir.parent)):
        names = ", ".join(path.name for path in saved)
        raise UserError(f"{named} does not exist. Checkpoints of this run: {names}.")


def weights_checkpoint(path: Path) -> Path:
    """Returns the intact checkpoint that ``path`` is or, of a run directory, the best one.

    Raises:
        UserError: It is damaged, or there is none.
    """
    run_dir, checkpoint_dir = split_checkpoint(path)
    if checkpoint_dir is None:
        return best_checkpoint(run_dir)
    if (defect := find_corruption(checkpoint_dir)) is not None:
        raise UserError(f"{checkpoint_dir} is damaged: {defect}. The best intact checkpoint is used with {run_dir}.")
    return checkpoint_dir


def require_checkpoint(directory: Path, named: str | None = None) -> None:
    """Raises UserError if a run has no checkpoint; does not verify checkpoints. ``named`` is as in ``load_config``."""
    check_no_link(directory / CHECKPOINTS)
    if not has_checkpoint(directory):
        raise UserError(f"{named or directory} has no checkpoint: there is none in {directory / CHECKPOINTS}.")


def check_run_size(directory: Path, model: GPTConfig) -> None:
    """Like ``check_weights_size`` for the largest checkpoint of a run; a smaller one may be damaged."""
    checkpoints = (
        [file for file in path.rglob("*") if file.is_file()] for path in list_checkpoints(directory / CHECKPOINTS)
    )
    largest = max(checkpoints, key=_size)
    if _size(largest) < _known_count(model):
        newest_checkpoint(directory)  # raises an error if all are damaged
    check_weights_size(directory, largest, model)


def check_weights_size(path: Path, files: Iterable[Path], model: GPTConfig) -> None:
    """Checks that weights are large enough for a model of this config, before memory is allocated for it.

    Args:
        path: Run directory or model of another program, for the message.
        files: The files with the weights.
        model: Config that is stored with the weights.

    Raises:
        UserError: The files have less than one byte per parameter.
    """
    size, count = _size(files), _known_count(model)
    if count > size:
        raise UserError(
            f"{path} is not valid: a model of its configuration (n_layer={model.n_layer}, n_embd={model.n_embd}, "
            f"vocab_size={model.vocab_size}, block_size={model.block_size}) has {count:,} parameters, but its weights "
            f"have only {size:,} bytes."
        )


def _size(files: Iterable[Path]) -> int:
    return sum(file.stat().st_size for file in files)


def _known_count(model: GPTConfig) -> int:
    """Returns the number of parameters; 0 if it is not known from the configuration."""
    return 0 if model.components or model.vocab_size is None else parameter_count(model)


def _require(directory: Path, checkpoint_dir: Path | None) -> Path:
    if checkpoint_dir is None:
        require_checkpoint(directory)
        raise UserError(f"{directory} has no intact checkpoint: all of those in {directory / CHECKPOINTS} are damaged.")
    return checkpoint_dir


def check_weights_fit(directory: Path, trained: GPTConfig, model: GPTConfig, *, cropped: bool = True) -> None:
    """Checks that the weights of a run fit a model.

    Args:
        directory: Run directory, for the message.
        trained: Model configuration of the run.
        model: Model configuration to load the weights into.
        cropped: Whether ``model.block_size`` may be smaller.

    Raises:
        UserError: The weights do not fit; the message names the keys that differ.
    """
    shape = trained.model_dump(include={*SHAPE_KEYS, "block_size"})
    check_shape(directory, shape, model, cropped=cropped)


def check_shape(path: Path, shape: Mapping[str, Any], model: GPTConfig, *, cropped: bool = True) -> None:
    """Checks that weights of a shape fit a model; raises UserError with the keys that differ."""
    own = model.model_dump()
    # the shapes of a component are known only when its weights are loaded
    keys = [key for key in shape if key != "block_size" and not is_component(shape[key]) and not is_component(own[key])]
    differences = [key for key in keys if shape[key] != own[key]]
    if shape["block_size"] < model.block_size or (shape["block_size"] > model.block_size and not cropped):
        differences.append("block_size")
    if model.resize_embeddings:
        differences = [key for key in differences if key not in ("vocab_size", "pad_vocab_to_multiple_of")]
    if differences:
        named = (f"model.{key}={own[key]}, but the weights have {shape[key]}" for key in differences)
        hint = (
            " To add or drop token IDs at the end: model.resize_embeddings=true" if "vocab_size" in differences else ""
        )
        raise UserError(f"The weights of {path} do not fit this model: {'; '.join(named)}.{hint}")
