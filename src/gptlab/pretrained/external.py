"""Models of other programs: Hugging Face GPT-2 and nanoGPT checkpoints. Imports no torch.

| program      | layout                                                                                               |
|--------------|------------------------------------------------------------------------------------------------------|
| Hugging Face | a directory: config.json, and model.safetensors or the files that model.safetensors.index.json lists |
| nanoGPT      | a file of ``torch.save``: a dict with model (the parameters) and model_args (the hyperparameters)    |

Pickled weights (pytorch_model.bin) are rejected, because unpickling them can run arbitrary code.
"""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from gptlab.data.tokenizers.file import read_json
from gptlab.errors import UserError
from gptlab.files import open_regular
from gptlab.model.config import GPT2_OPTIONS, GPTConfig
from gptlab.tracking.run_directory import check_shape
from gptlab.tracking.run_store.runs import CONFIG

DESCRIPTION, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SIZES = ("vocab_size", "n_layer", "n_head", "n_embd")  # same names in all programs
ROUNDED_TO = (1, 64, 128)  # multiples to which the vocabulary is padded: nanoGPT has 50304 rows for 50257
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# Options of transformers' GPT-2 with the only values that gptlab supports, which are also the defaults for a missing
# key (transformers, configuration_gpt2.py).
FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "n_inner": None,
    "quantization_config": None,
}


def is_external(path: Path) -> bool:
    """Whether ``path`` is a model of another program and not a run directory."""
    names = (DESCRIPTION, WEIGHTS, INDEX, *PICKLED)
    return path.is_file() or (not (path / CONFIG).exists() and any((path / name).exists() for name in names))


def check_external(path: Path, model: GPTConfig, named: str | None = None) -> dict[str, Any] | None:
    """Checks, without importing torch, that weights can be read and fit a model.

    Args:
        path: Directory of a Hugging Face model, or a nanoGPT checkpoint.
        model: Config of the model. Its ``vocab_size`` may still be None.
        named: Override that selects the model, for messages.

    Returns:
        The shape of the weights, for ``check_external_shape``. None for a nanoGPT checkpoint, whose shape can only be
        read with torch.

    Raises:
        UserError: A file is missing or damaged, or the weights do not fit the model.
    """
    if path.is_file():
        check_archive(path, named)
        return None
    shape = read_hf_shape(path)
    check_external_shape(path, shape, model)
    for file in weight_files(path):
        with open_safetensors(file, "numpy"):
            pass  # opening the file validates its header and its length
    return shape


def check_archive(path: Path, named: str | None = None) -> None:
    """Raises UserError, with ``named`` as in ``check_external``, if a file cannot be a nanoGPT checkpoint."""
    if not path.is_file():
        problem = "it is a directory" if path.is_dir() else "no such file"
        raise UserError(f"{named or path} is not a nanoGPT checkpoint: {problem} (working directory: {Path.cwd()}).")
    if not zipfile.is_zipfile(path):
        raise UserError(
            f"{named or path} is not a nanoGPT checkpoint, because it is not a zip archive. It was not unpickled."
        )


def check_external_shape(path: Path, shape: Mapping[str, Any], model: GPTConfig) -> None:
    """Checks that weights of shape ``shape`` fit a model. Padding of the vocabulary is allowed.

    Raises:
        UserError: The shape or an option differs.
    """
    vocab_size = model.vocab_size
    if vocab_size is None or fits_vocabulary(shape["vocab_size"], vocab_size):
        shape = {**shape, "vocab_size": vocab_size}
    check_shape(path, {**GPT2_OPTIONS, **shape}, model)


def fits_vocabulary(rows: int, vocab_size: int) -> bool:
    """Whether an embedding with ``rows`` rows fits a vocabulary, with or without padding."""
    return rows in (-(-vocab_size // multiple) * multiple for multiple in ROUNDED_TO)


def nanogpt_shape(path: Path, arguments: Any) -> dict[str, Any]:
    """Converts nanoGPT's model_args to gptlab's config keys. nanoGPT always uses weight tying and the exact GELU."""
    bias = arguments.get("bias", True) if isinstance(arguments, dict) else None  # missing in old checkpoints
    sizes = _sizes(f"model_args of {path}", arguments, "block_size")
    return {**sizes, "bias": bias, "tie_weights": True, "activation": "gelu"}


@contextmanager
def open_safetensors(file: Path, framework: Literal["numpy", "pt"]) -> Iterator[Any]:
    """Opens a safetensors file. Raises UserError if it is invalid or incomplete."""
    try:
        open_regular(file, follow=True).close()  # it would wait at a FIFO; a link in the cache of huggingface_hub
        with safe_open(file, framework=framework) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a complete safetensors file: {error}.") from error


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a Hugging Face model. Raises UserError if one is missing."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        if pickled := [name for name in PICKLED if (folder / name).exists()]:
            raise UserError(
                f"{folder / pickled[0]} is a pickle, which can run arbitrary code when it is loaded. If you trust it, "
                "convert it to safetensors with transformers' save_pretrained."
            )
        raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}.")
    table = read_json(folder / INDEX).get("weight_map")
    names = list(table.values()) if isinstance(table, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"weight_map of {folder / INDEX} must list files in the same directory.")
    files = [folder / name for name in sorted(set(names))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which {INDEX} lists.")
    return files


def read_hf_shape(folder: Path) -> dict[str, Any]:
    """Converts config.json of a Hugging Face GPT-2 to gptlab's config keys.

    Raises:
        UserError: The model is not a GPT-2, lacks a size, or has an option that gptlab does not support.
    """
    path = folder / DESCRIPTION
    config = read_json(path)
    if (kind := config.get("model_type")) != "gpt2":
        raise UserError(f"{path} has model_type={kind}, but gptlab only supports gpt2.")
    sizes = _sizes(str(path), config, "n_positions")
    activation = config.get("activation_function", "gelu_new")
    if config.get("n_inner") == 4 * sizes["n_embd"]:  # equivalent to None
        del config["n_inner"]
    other = {key: config[key] for key, value in FIXED.items() if config.get(key, value) != value}
    if not isinstance(activation, str) or activation not in ACTIVATIONS:
        other["activation_function"] = activation
    if other:
        options = ", ".join(f"{key}={value}" for key, value in other.items())
        raise UserError(f"{path} has {options}, which gptlab does not support.")
    tied = config.get("tie_word_embeddings", True)
    if not isinstance(tied, bool):
        raise UserError(f"{path} has tie_word_embeddings={tied!r:.50}, which should be true or false.")
    return {**sizes, "bias": True, "tie_weights": tied, "activation": ACTIVATIONS[activation]}


def _sizes(origin: str, values: Any, block_size: str) -> dict[str, int]:
    """Reads the sizes of a model. Raises UserError if one is missing or not a positive integer."""
    names = {key: key for key in SIZES} | {"block_size": block_size}
    found = {key: values.get(name) if isinstance(values, dict) else None for key, name in names.items()}
    sizes = {key: size for key, size in found.items() if type(size) is int and size > 0}  # True is no size
    if wrong := [f"{names[key]}={size!r:.50}" for key, size in found.items() if key not in sizes]:
        raise UserError(f"{origin} has {', '.join(wrong)}, which should be an integer greater than 0.")
    if sizes["n_embd"] % sizes["n_head"]:
        raise UserError(f"{origin} has n_head={sizes['n_head']}, which does not divide n_embd={sizes['n_embd']}.")
    return sizes
