"""Where a trained model is taken from: a run directory, or what another program wrote. Imports no torch."""

from pathlib import Path
from typing import Any, NamedTuple

from gptlab.config.schema import GPT2_REPOSITORIES, is_on_hub
from gptlab.data.shards.manifest import load_manifest
from gptlab.data.tokenizers.huggingface import tokenizer_record
from gptlab.data.tokenizers.nanogpt_meta import META_FILE, read_meta
from gptlab.data.tokenizers.tokenizer import GPT2Tokenizer, Tokenizer, load_tokenizer
from gptlab.errors import UserError
from gptlab.model.config import EXTERNAL_DEFAULTS, GPT2_OPTIONS, GPTConfig
from gptlab.pretrained.external import (
    check_archive,
    check_external,
    fits_vocabulary,
    is_external,
    nanogpt_shape,
    read_hf_shape,
)
from gptlab.pretrained.hub import hub_folder
from gptlab.tracking.run_directory import load_config, require_checkpoint
from gptlab.tracking.run_store.runs import CONFIG


class ModelSource(NamedTuple):
    """A trained model.

    Attributes:
        name: As it was named.
        path: The run directory, the Hugging Face folder or nanoGPT's file.
        model: Its shape and options.
        record: Of its tokenizer; None where nothing says what its ids mean.
        vocab_dir: Where GPT-2's vocabulary is, if that is known.
    """

    name: str
    path: Path
    model: GPTConfig
    record: dict[str, Any] | None
    vocab_dir: str | None

    @property
    def is_run(self) -> bool:
        """Whether it was trained here."""
        return (self.path / CONFIG).is_file()

    def tokenizer(self) -> Tokenizer:
        """Build its tokenizer; UserError where nothing says what its ids mean."""
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
    """Find what ``name`` means, and download it if it is to be had from the hub; UserError where there is nothing."""
    return hub_folder(name) if is_on_hub(name) else Path(name).expanduser()


def open_model_source(name: str) -> ModelSource:
    """See what a trained model is, without its weights.

    Args:
        name: A run directory, a folder that transformers' ``save_pretrained`` wrote, a checkpoint of nanoGPT, gpt2,
            gpt2-medium, gpt2-large, gpt2-xl, or hf://<owner>/<name>.

    Raises:
        UserError: There is none, it is of another architecture, or its vocabulary is not its tokenizer's.
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
    shape = _nanogpt(path) if path.is_file() else read_hf_shape(path)
    record = _meta(path, shape["vocab_size"]) if path.is_file() else tokenizer_record(path, shape["vocab_size"])
    if record is not None:
        shape["vocab_size"] = _vocabulary(name, shape["vocab_size"], record)
    source = ModelSource(
        name, path, GPTConfig.model_validate({**EXTERNAL_DEFAULTS, **GPT2_OPTIONS, **shape}), record, None
    )
    check_external(path, source.model)
    return source


def _vocabulary(name: str, rows: int, record: dict[str, Any]) -> int:
    """Count the ids of a tokenizer; UserError where an embedding of so many ``rows`` is not for it."""
    size = GPT2Tokenizer.vocab_size if record["name"] == "gpt2" else load_tokenizer(record, None).vocab_size
    if not fits_vocabulary(rows, size):
        raise UserError(f"{name} has an embedding of {rows} ids, and its tokenizer {size}: one of them is another's.")
    return size


def _nanogpt(path: Path) -> dict[str, Any]:
    check_archive(path)
    from gptlab.pretrained.nanogpt_file import read_nanogpt_checkpoint  # torch

    return nanogpt_shape(path, read_nanogpt_checkpoint(path).get("model_args"))


def _meta(path: Path, rows: int) -> dict[str, Any] | None:
    """Say what the ids of nanoGPT's checkpoint mean as its own sample.py does: by meta.pkl, or they are GPT-2's."""
    if (meta := path.parent / META_FILE).is_file():
        return read_meta(meta).record()
    return {"name": "gpt2"} if rows in (50257, 50304) else None
