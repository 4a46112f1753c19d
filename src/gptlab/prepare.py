"""Prepares a corpus as verified token shards: python -m gptlab.prepare [group=option ...] [key=value ...]."""

from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from gptlab.config.base import known_keys, validate
from gptlab.config.command import command
from gptlab.config.locations import check_locations
from gptlab.config.resolve import replace_built_ins, resolve_to_dict
from gptlab.config.schema import RunConfig
from gptlab.config.trust import check_trusted
from gptlab.data.order import training_order
from gptlab.data.prepare.prepare import prepare
from gptlab.data.prepare.splitting import check_val_split
from gptlab.data.prepare.tasks import PrepareOptions
from gptlab.data.shards.formats import convert
from gptlab.data.shards.manifest import Manifest
from gptlab.data.shards.streams import ShardStore
from gptlab.data.shards.token_dataset import TokenDataset, batch_texts, verify_shards
from gptlab.data.tokenizers.tokenizer import load_tokenizer
from gptlab.errors import UserError
from gptlab.exit_codes import DONE
from gptlab.launch.prepare_data import (
    PrepareCommand,
    find_existing_shards,
    prepare_with_progress,
    print_batch,
    print_prepared,
    stored_tokenizer,
)
from gptlab.terminal import print_message
from gptlab.tracking.run_directory import load_config, split_checkpoint
from gptlab.tracking.run_store.runs import CONFIG


@command("prepare", keys=set(known_keys(PrepareCommand)))
def main(values: DictConfig) -> int:
    """Prepares data, or inspects, converts or replays prepared data."""
    overrides = list(HydraConfig.get().overrides.task)
    config = validate(PrepareCommand, replace_built_ins(resolve_to_dict(values), overrides))
    if config.replay is not None:
        _replay(config, config.replay)
    elif config.convert is not None:
        _convert(config, config.convert)
    elif config.inspect is not None:
        _inspect(config, config.inspect)
    else:
        check_val_split(config.data)
        part, parts = (0, 1) if config.merge else (config.prepare.part, config.prepare.parts)
        work = PrepareOptions(workers=config.prepare.workers or PrepareOptions().workers, part=part, parts=parts)
        print_prepared(prepare_with_progress(config.data, config.tokenizer, work))
    return DONE


def _inspect(config: PrepareCommand, path: str) -> None:
    """Prints a summary of prepared data, or of the data of a run."""
    if (split_checkpoint(Path(path).expanduser())[0] / CONFIG).is_file():
        _, prepared = _data_of_run(config, "inspect", path)
        if config.verify:
            _verify(prepared.store, prepared.manifest)
        print_prepared(prepared)
        return
    store, manifest = find_existing_shards(config, "inspect", path)
    if config.verify:
        _verify(store, manifest)
    tokenizer = load_tokenizer(manifest.tokenizer, config.tokenizer.vocab_dir, path)
    print_prepared(TokenDataset(store, manifest, tokenizer))


def _convert(config: PrepareCommand, path: str) -> None:
    if config.out is None:
        raise UserError("convert requires an output directory: out=<dir>")
    store, manifest = find_existing_shards(config, "convert", path)
    has_characters = manifest.tokenizer["name"] == "characters"  # others are not built, since one may be a stranger's
    tokenizer = load_tokenizer(manifest.tokenizer, None, path) if has_characters else None
    out = Path(config.out).expanduser()
    for written in convert(store, manifest, tokenizer, config.format, out, overwrite=config.overwrite):
        print_message(written)


def _verify(store: ShardStore, manifest: Manifest) -> None:
    number = verify_shards(store, manifest)
    print_message(f"Verified {number} shard{'' if number == 1 else 's'}: the SHA-256 of each is unchanged.")


def _data_of_run(given: PrepareCommand, key: str, path: str) -> tuple[RunConfig, TokenDataset]:
    """Returns the configuration of a run, and its data, which is prepared again if it is not in the cache."""
    run_dir, _ = split_checkpoint(Path(path).expanduser())
    config = load_config(run_dir, f"{key}={path}")
    check_trusted(config.model_dump(mode="json", include={"data", "tokenizer"}), path)
    check_locations(config, run_dir, used=("data", "tokenizer"), given=given.model_dump())
    return config, prepare(config.data, config.tokenizer, trained=stored_tokenizer(run_dir, config.tokenizer))


def _replay(given: PrepareCommand, path: str) -> None:
    """Prints the global batch of one step of a run."""
    config, prepared = _data_of_run(given, "replay", path)
    order = training_order(prepared.manifest, config.data, config.model.block_size, config.seed)
    print_batch(batch_texts(prepared, order, given.step, config.train.stages))


if __name__ == "__main__":
    main()
