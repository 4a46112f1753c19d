"""Weights of other programs: a GPT-2 of Hugging Face, a checkpoint of nanoGPT. Imports no torch.

| what         | layout                                                                                            |
|--------------|---------------------------------------------------------------------------------------------------|
| Hugging Face | a folder: config.json, and model.safetensors or the files that model.safetensors.index.json lists |
| nanoGPT      | a file of ``torch.save``: a dict with model (the parameters) and model_args (their shape)         |

Files that could only be read by running what they say (pytorch_model.bin) are refused.
"""

import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open

from gptlab.data.tokenizers.external import read_json
from gptlab.errors import UserError
from gptlab.model.config import GPT2_OPTIONS, GPTConfig
from gptlab.tracking.run_directory import check_shape
from gptlab.tracking.run_store.runs import CONFIG

DESCRIPTION, WEIGHTS, INDEX = "config.json", "model.safetensors", "model.safetensors.index.json"
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
SIZES = ("vocab_size", "n_layer", "n_head", "n_embd")  # the same names everywhere
ROUNDED_TO = (1, 64, 128)  # rows of an embedding, by those who pad it: nanoGPT has 50304 for 50257
ACTIVATIONS = {"gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu"}
# What else a GPT-2 of transformers may be, with what it is here; a config.json that does not say means the same
# (transformers, configuration_gpt2.py).
FIXED = {
    "layer_norm_epsilon": 1e-5,
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "n_inner": None,
}


def is_external(path: Path) -> bool:
    """Whether ``path`` is no run directory but weights of others."""
    names = (DESCRIPTION, WEIGHTS, INDEX, *PICKLED)
    return path.is_file() or (not (path / CONFIG).exists() and any((path / name).exists() for name in names))


def check_external(path: Path, model: GPTConfig) -> dict[str, Any] | None:
    """Checks without torch that weights can be read and fit a model, whose vocabulary may be unknown yet.

    Returns:
        The shape of the weights, for ``check_external_shape``; None for a checkpoint of nanoGPT, which needs torch.

    Raises:
        UserError: Names the file, and what is wrong with it.
    """
    if path.is_file():
        check_archive(path)
        return None
    shape = read_hf_shape(path)
    check_external_shape(path, shape, model)
    for file in weight_files(path):
        with open_safetensors(file, "numpy"):
            pass  # its header is right, and it is as long as that says
    return shape


def check_archive(path: Path) -> None:
    """Raises UserError if a file cannot be a checkpoint of nanoGPT."""
    if not zipfile.is_zipfile(path):
        raise UserError(f"{path} is not a checkpoint of nanoGPT: that is an archive. Nothing in it was run.")


def check_external_shape(path: Path, there: Mapping[str, Any], model: GPTConfig) -> None:
    """Checks that weights of a shape fit a model; extra rows that only pad the vocabulary are allowed."""
    wanted = model.vocab_size
    if wanted is None or fits_vocabulary(there["vocab_size"], wanted):
        there = {**there, "vocab_size": wanted}
    check_shape(path, {**GPT2_OPTIONS, **there}, model)


def fits_vocabulary(rows: int, vocab_size: int) -> bool:
    """Whether an embedding of so many rows is that of a vocabulary: of its size, or padded."""
    return rows in (-(-vocab_size // multiple) * multiple for multiple in ROUNDED_TO)


def nanogpt_shape(path: Path, arguments: Any) -> dict[str, Any]:
    """Converts nanoGPT's model_args to gptlab's names; its head is always tied and its GELU exact."""
    bias = arguments.get("bias", True) if isinstance(arguments, dict) else None  # it was no choice at first
    sizes = _sizes(f"model_args of {path}", arguments, "block_size")
    return {**sizes, "bias": bias, "tie_weights": True, "activation": "gelu"}


@contextmanager
def open_safetensors(file: Path, framework: Literal["numpy", "pt"]) -> Iterator[Any]:
    """Opens a safetensors file; raises UserError if it is invalid or incomplete."""
    try:
        with safe_open(file, framework=framework) as tensors:
            yield tensors
    except (SafetensorError, OSError) as error:
        raise UserError(f"{file} is not a whole safetensors file: {error}.") from error


def weight_files(folder: Path) -> list[Path]:
    """Returns the safetensors files of a Hugging Face folder; raises UserError if one is missing."""
    if (folder / WEIGHTS).exists():
        return [folder / WEIGHTS]
    if not (folder / INDEX).exists():
        if pickled := [name for name in PICKLED if (folder / name).exists()]:
            raise UserError(
                f"{folder / pickled[0]} is a pickle, which can run any code when it is read; convert it to safetensors "
                "where it is trusted: transformers' save_pretrained writes them."
            )
        raise UserError(f"{folder} has neither {WEIGHTS} nor {INDEX}.")
    table = read_json(folder / INDEX).get("weight_map")
    names = list(table.values()) if isinstance(table, dict) else []
    if not names or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise UserError(f"{folder / INDEX} does not list files of its own folder in weight_map.")
    files = [folder / name for name in sorted(set(names))]
    if missing := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{folder} lacks {', '.join(missing)}, which {INDEX} lists.")
    return files


def read_hf_shape(folder: Path) -> dict[str, Any]:
    """Converts config.json of a Hugging Face GPT-2 to gptlab's names."""
    path = folder / DESCRIPTION
    config = read_json(path)
    if (kind := config.get("model_type")) != "gpt2":
        raise UserError(f"{path} describes a model of type {kind}; gptlab reads gpt2.")
    sizes = _sizes(str(path), config, "n_positions")
    activation = config.get("activation_function", "gelu_new")
    if config.get("n_inner") == 4 * sizes["n_embd"]:  # which None means
        del config["n_inner"]
    other = {key: config[key] for key, value in FIXED.items() if config.get(key, value) != value}
    if activation not in ACTIVATIONS:
        other["activation_function"] = activation
    if other:
        named = ", ".join(f"{key}={value}" for key, value in other.items())
        raise UserError(f"{path} has {named}, which gptlab's GPT cannot be.")
    tied = config.get("tie_word_embeddings", True)
    return {**sizes, "bias": True, "tie_weights": tied, "activation": ACTIVATIONS[activation]}


def _sizes(origin: str, values: Any, block_size: str) -> dict[str, int]:
    """Reads the sizes of a model, as integers; raises UserError for one that is missing."""
    names = {key: key for key in SIZES} | {"block_size": block_size}
    found = {key: values.get(name) if isinstance(values, dict) else None for key, name in names.items()}
    sizes = {key: size for key, size in found.items() if isinstance(size, int)}
    if missing := [names[key] for key in found if key not in sizes]:
        raise UserError(f"{origin} does not give {', '.join(missing)} as whole numbers.")
    return sizes
