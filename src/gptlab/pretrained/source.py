"""Where a trained model comes from: a run directory, or weights of other programs, on disk or on the Hugging Face hub.

Imports no torch.
"""

import os
from pathlib import Path
from typing import Any, NamedTuple

from gptlab.config.schema import GPT2_REPOSITORIES, HUB_PREFIX, is_on_hub
from gptlab.data.shards.manifest import load_manifest
from gptlab.data.tokenizers.external import META_FILE, tokenizer_record
from gptlab.data.tokenizers.tokenizer import GPT2Tokenizer, Tokenizer, load_tokenizer
from gptlab.errors import UserError, first_line
from gptlab.model.config import EXTERNAL_DEFAULTS, GPT2_OPTIONS, GPTConfig
from gptlab.pretrained.external import (
    check_archive,
    check_external,
    fits_vocabulary,
    is_external,
    nanogpt_shape,
    read_hf_shape,
)
from gptlab.tracking.run_directory import load_config, require_checkpoint
from gptlab.tracking.run_store.runs import CONFIG

HUB_FILES = [  # of a repository; never a pickle
    *("config.json", "generation_config.json", "model*.safetensors", "model.safetensors.index.json"),
    *("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"),
]


class ModelSource(NamedTuple):
    """Where a trained model is, and what it is.

    Attributes:
        name: Name by which it was opened.
        path: Run directory, Hugging Face folder, or nanoGPT's file.
        model: Shape and options.
        record: Record of its tokenizer; None if the tokenizer is unknown.
        vocab_dir: Folder of GPT-2's vocabulary, if known.
    """

    name: str
    path: Path
    model: GPTConfig
    record: dict[str, Any] | None
    vocab_dir: str | None

    @property
    def is_run(self) -> bool:
        """Whether it is a run of gptlab."""
        return (self.path / CONFIG).is_file()

    def tokenizer(self) -> Tokenizer:
        """Builds its tokenizer; raises UserError if that is unknown."""
        if self.record is None:
            raise UserError(
                f"Nothing says what the {self.model.vocab_size} ids of {self.name} mean: "
                + (
                    f"put nanoGPT's {META_FILE} beside it."
                    if self.path.is_file()
                    else "there is no tokenizer.json in that folder."
                )
            )
        return load_tokenizer(self.record, self.vocab_dir)


def resolve_path(name: str) -> Path:
    """Returns the path that ``name`` means; downloads a model of the hub, and raises UserError if it cannot."""
    return _hub_folder(name) if is_on_hub(name) else Path(name).expanduser()


def open_model_source(name: str) -> ModelSource:
    """Describes a trained model, without reading its weights.

    Args:
        name: A run directory, a folder that transformers' ``save_pretrained`` wrote, a checkpoint of nanoGPT, gpt2,
            gpt2-medium, gpt2-large, gpt2-xl, or hf://<owner>/<name>.

    Raises:
        UserError: There is none, it has another architecture, or its vocabulary does not fit its tokenizer.
    """
    path = resolve_path(name)
    if not is_external(path):
        if not path.exists():
            raise UserError(
                f"{name}: there is no such run directory, folder or file (looked from {Path.cwd()}), and of the hub's "
                f"models {', '.join(GPT2_REPOSITORIES)} have names of their own; any other is hf://<owner>/<name>."
            )
        config = load_config(path)
        require_checkpoint(path)
        return ModelSource(name, path, config.model, load_manifest(path).tokenizer, config.tokenizer.vocab_dir)
    shape = _nanogpt_shape(path) if path.is_file() else read_hf_shape(path)
    record = tokenizer_record(path, shape["vocab_size"])
    if record is not None:
        shape["vocab_size"] = _vocabulary(name, shape["vocab_size"], record)
    source = ModelSource(
        name, path, GPTConfig.model_validate({**EXTERNAL_DEFAULTS, **GPT2_OPTIONS, **shape}), record, None
    )
    check_external(path, source.model)
    return source


def _vocabulary(name: str, rows: int, record: dict[str, Any]) -> int:
    """Returns the vocabulary size of a tokenizer; raises UserError if an embedding of ``rows`` does not fit it."""
    size = GPT2Tokenizer.vocab_size if record["name"] == "gpt2" else load_tokenizer(record, None).vocab_size
    if not fits_vocabulary(rows, size):
        raise UserError(f"{name} has an embedding of {rows} ids, and its tokenizer {size}: one of them is another's.")
    return size


def _nanogpt_shape(path: Path) -> dict[str, Any]:
    check_archive(path)
    from gptlab.pretrained.nanogpt import read_nanogpt_checkpoint  # imports torch

    return nanogpt_shape(path, read_nanogpt_checkpoint(path).get("model_args"))


def _hub_folder(name: str) -> Path:
    """Returns the folder of a model in the Hugging Face cache, downloaded if it is missing.

    Raises:
        UserError: It is not there and cannot be downloaded.
    """
    from huggingface_hub import snapshot_download  # takes half a second to import
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    repository = GPT2_REPOSITORIES.get(name) or name.removeprefix(HUB_PREFIX)
    try:
        folder = Path(snapshot_download(repository, allow_patterns=HUB_FILES, local_files_only=True))
        if any(folder.glob("*.safetensors")):
            return folder
    except (LocalEntryNotFoundError, HFValidationError):
        pass  # the network says what is wrong with a name
    try:
        return Path(snapshot_download(repository, allow_patterns=HUB_FILES))
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        home = os.environ.get("HF_HOME", "~/.cache/huggingface")
        raise UserError(
            f"{name} is neither in the cache of the Hugging Face hub ({home}) nor to be had through the network: "
            f"{first_line(error)}\nTo get it: on a machine with internet, hf download {repository} config.json "
            "model.safetensors tokenizer.json --local-dir <folder>; copy that folder here, and name it instead."
        ) from error
