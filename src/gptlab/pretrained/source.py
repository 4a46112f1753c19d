"""Sources of trained models: run directories, models of other programs on disk, and the Hugging Face Hub.

Imports no torch.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.config.base import validate
from gptlab.config.locations import check_locations
from gptlab.config.schema import GPT2_REPOSITORIES, HUB_PREFIX, is_on_hub
from gptlab.config.trust import check_trusted
from gptlab.data.hub import use_cache_if_unreachable
from gptlab.data.shards.manifest import load_manifest
from gptlab.data.tokenizers.external import META_FILE, tokenizer_record
from gptlab.data.tokenizers.tokenizer import GPT2Tokenizer, Tokenizer, load_tokenizer
from gptlab.errors import UserError, first_line
from gptlab.model.config import EXTERNAL_DEFAULTS, GPT2_OPTIONS, GPTConfig
from gptlab.pretrained.external import (
    DESCRIPTION,
    check_archive,
    check_external,
    fits_vocabulary,
    is_external,
    nanogpt_shape,
    read_hf_shape,
    weight_files,
)
from gptlab.tracking.run_directory import (
    check_is_saved,
    check_run_size,
    check_weights_size,
    load_config,
    require_checkpoint,
    split_checkpoint,
)
from gptlab.tracking.run_store.runs import CONFIG

HUB_FILES = [  # files to download from a repository; none is a pickle
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
]

MODEL_SOURCES = (
    f"a run directory, one of its checkpoints (<run>/checkpoints/step_<n>), {', '.join(GPT2_REPOSITORIES)}, "
    f"{HUB_PREFIX}<owner>/<name>, the directory of a Hugging Face model, or nanoGPT's ckpt.pt"
)


class ModelSource(NamedTuple):
    """Location and description of a trained model.

    Attributes:
        name: Name with which the model was opened.
        path: Run directory (also if a checkpoint was named), directory of a Hugging Face model, or nanoGPT checkpoint.
        model: Config of the model.
        record: Record of the tokenizer, or None if it is unknown.
        vocab_dir: Directory of GPT-2's vocabulary, if known.
        checkpoint: Checkpoint that was named, <run>/checkpoints/step_<n>; None for the best one of a run.
    """

    name: str
    path: Path
    model: GPTConfig
    record: dict[str, Any] | None
    vocab_dir: str | None
    checkpoint: Path | None = None

    @property
    def is_run(self) -> bool:
        """Whether the source is a run of gptlab."""
        return (self.path / CONFIG).is_file()

    def tokenizer(self) -> Tokenizer:
        """Builds the tokenizer of the model. Raises UserError if it is unknown or not trusted."""
        if self.record is None:
            raise UserError(
                f"The tokenizer of {self.name} (vocab_size={self.model.vocab_size}) is unknown. "
                + (
                    f"Copy nanoGPT's {META_FILE} to the directory of the checkpoint."
                    if self.path.is_file()
                    else "Its directory has no tokenizer.json."
                )
            )
        return load_tokenizer(self.record, self.vocab_dir, self.name)


def resolve_path(name: str) -> Path:
    """Returns the local path of a model, and downloads it first if it is on the Hub and not in the cache.

    Raises:
        UserError: The download fails.
    """
    return _hub_folder(name) if is_on_hub(name) else Path(name).expanduser()


def check_model_exists(path: Path, named: str) -> None:
    """Raises UserError, which lists the valid sources, if ``path`` is neither a run directory nor an external model.

    Args:
        path: Local path of the model.
        named: Override or name that selects the model, for the message, such as ``init_from=outputs/run``.
    """
    if is_external(path) or (split_checkpoint(path)[0] / CONFIG).is_file():
        return
    problem = f"is not a model: it has neither {CONFIG} nor {DESCRIPTION}" if path.is_dir() else "does not exist"
    raise UserError(f"{named} {problem} (working directory: {Path.cwd()}). Use {MODEL_SOURCES}.")


def open_model_source(name: str, key: str | None = None) -> ModelSource:
    """Opens a trained model without reading its weights.

    Args:
        name: A run directory, a checkpoint <run>/checkpoints/step_<n>, a directory written by transformers'
            ``save_pretrained``, a nanoGPT checkpoint, gpt2, gpt2-medium, gpt2-large, gpt2-xl, or hf://<owner>/<name>.
        key: Config key that contains the name. Used in error messages.

    Raises:
        UserError: The model does not exist, has an unsupported architecture, or its vocabulary does not fit its
            tokenizer.
    """
    named = name if key is None else f"{key}={name}"
    path = resolve_path(name)
    check_model_exists(path, named)
    if not is_external(path):
        path, checkpoint = split_checkpoint(path)
        config = load_config(path)
        check_trusted({"model": config.model.model_dump(mode="json")}, path)
        check_locations(config, path, used=("model", "tokenizer"))
        require_checkpoint(path, named)
        check_is_saved(checkpoint, named)
        check_run_size(path, config.model)
        vocab_dir = config.tokenizer.vocab_dir
        return ModelSource(name, path, config.model, load_manifest(path).tokenizer, vocab_dir, checkpoint)
    shape = _nanogpt_shape(path, named) if path.is_file() else read_hf_shape(path)
    record = tokenizer_record(path, shape["vocab_size"])
    if record is not None:
        shape["vocab_size"] = _vocabulary(name, shape["vocab_size"], record)
    source = ModelSource(name, path, validate(GPTConfig, {**EXTERNAL_DEFAULTS, **GPT2_OPTIONS, **shape}), record, None)
    check_external(path, source.model)
    check_weights_size(path, [path] if path.is_file() else weight_files(path), source.model)
    return source


def _vocabulary(name: str, rows: int, record: dict[str, Any]) -> int:
    """Returns the vocabulary size of a tokenizer. Raises UserError if an embedding with ``rows`` rows does not fit."""
    size = GPT2Tokenizer.vocab_size if record["name"] == "gpt2" else load_tokenizer(record, None).vocab_size
    if not fits_vocabulary(rows, size):
        raise UserError(
            f"{name} has an embedding with {rows} rows, which does not fit its tokenizer with {size} token IDs."
        )
    return size


def _nanogpt_shape(path: Path, named: str) -> dict[str, Any]:
    check_archive(path, named)
    from gptlab.pretrained.nanogpt import read_nanogpt_checkpoint  # imports torch

    return nanogpt_shape(path, read_nanogpt_checkpoint(path).get("model_args"))


def _hub_folder(name: str) -> Path:
    """Returns the directory of a model in the Hugging Face cache, and downloads it first if it is missing.

    Raises:
        UserError: The model is not in the cache and cannot be downloaded.
    """
    unreachable = use_cache_if_unreachable()
    from huggingface_hub import snapshot_download  # takes half a second to import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = GPT2_REPOSITORIES.get(name) or name.removeprefix(HUB_PREFIX)
    try:
        folder = Path(snapshot_download(repository, allow_patterns=HUB_FILES, local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass  # the download reports invalid names
    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        home = os.environ.get("HF_HOME", "~/.cache/huggingface")
        raise UserError(
            f"{name} is not in the cache of the Hugging Face Hub ({home}) and could not be downloaded: "
            f"{unreachable or first_line(error)}\nOn a machine with internet access, run hf download {repository} "
            "config.json model.safetensors tokenizer.json --local-dir <directory>. Copy that directory to this machine "
            f"and pass its path instead of {name}."
        ) from error
