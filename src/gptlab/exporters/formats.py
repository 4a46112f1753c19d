"""Export formats, and what each can hold. Imports no torch.

| format  | for                                          | its network                                             |
|---------|----------------------------------------------|---------------------------------------------------------|
| hf      | transformers, and every server that loads it | transformers, modeling_gpt2.py                          |
| nanogpt | karpathy/nanoGPT                             | nanoGPT, model.py: one matrix with ``wte``, exact GELU  |
| llmc    | karpathy/llm.c                               | llm.c, train_gpt2.c: one matrix with ``wte``, tanh GELU |
| gguf    | llama.cpp                                    | llama.cpp, LLM_ARCH_GPT2: tanh GELU                     |
| onnx    | onnxruntime, and what else runs a graph      | gptlab's own                                            |
"""

from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from gptlab.errors import UserError
from gptlab.model.config import GPT2_OPTIONS, GPTConfig

FormatName = Literal["hf", "nanogpt", "llmc", "gguf", "onnx"]
DtypeName = Literal["float32", "bfloat16", "float16"]


class FormatCapabilities(NamedTuple):
    """Capabilities of a format.

    Attributes:
        dtypes: In which its weights can be.
        activations: Of ``model.activation``; None: all.
        tied_only: Whether its head is always the embedding's matrix.
        biases: Whether it always has biases; zeros are written for a model that has none.
        tokenizers: That it has; None: all, and none is needed.
        packages: That write it.
    """

    dtypes: tuple[DtypeName, ...]
    activations: tuple[str, ...] | None
    tied_only: bool
    biases: bool
    tokenizers: tuple[str, ...] | None = None
    packages: tuple[str, ...] = ()


FORMATS: dict[FormatName, FormatCapabilities] = {
    "hf": FormatCapabilities(("float32", "bfloat16", "float16"), ("gelu", "gelu_tanh"), tied_only=False, biases=True),
    "nanogpt": FormatCapabilities(("float32",), ("gelu",), tied_only=True, biases=False),
    "llmc": FormatCapabilities(("float32", "bfloat16"), ("gelu_tanh",), tied_only=True, biases=True),
    "gguf": FormatCapabilities(
        ("float32", "float16"),
        ("gelu_tanh",),
        tied_only=False,
        biases=True,
        tokenizers=("gpt2", "bytes", "bpe"),
        packages=("gguf",),
    ),
    "onnx": FormatCapabilities(("float32",), None, tied_only=False, biases=False, packages=("onnx", "onnxscript")),
}


def check_format(name: FormatName, dtype: DtypeName, model: GPTConfig, record: dict[str, Any] | None) -> None:
    """Checks that a format can hold a model.

    Args:
        name: Of the format.
        dtype: Of the weights.
        model: Its shape and options.
        record: Of its tokenizer, if that is known.

    Raises:
        UserError: Names the options that have no counterpart, or the package that is missing.
    """
    form = FORMATS[name]
    if missing := [package for package in form.packages if find_spec(package) is None]:
        raise UserError(
            f"format={name} needs {' and '.join(f'the {package} package' for package in missing)}: "
            "pip install 'gptlab[export]'"
        )
    if dtype not in form.dtypes:
        raise UserError(f"dtype={dtype}: format={name} has weights in {' or '.join(form.dtypes)}.")
    if foreign := _unsupported_options(form, model):
        raise UserError(
            f"format={name} has no {', no '.join(foreign)}: this model would be another one there. "
            "format=onnx holds every option."
        )
    if form.tokenizers is not None and (record is None or record["name"] not in form.tokenizers):
        kind = "no tokenizer that is known" if record is None else f"tokenizer={record['name']}"
        raise UserError(
            f"format={name} holds the tokenizer, and this model has {kind}; llama.cpp has {', '.join(form.tokenizers)}."
        )


def _unsupported_options(form: FormatCapabilities, model: GPTConfig) -> list[str]:
    """Returns the options of a model that a format does not have, with their values."""
    if form.activations is None:
        return []
    values = model.model_dump()
    names = [name for name, plain in GPT2_OPTIONS.items() if values[name] != plain]
    if model.activation not in form.activations:
        names.append("activation")
    if form.tied_only and not model.tie_weights:
        names.append("tie_weights")
    return [f"model.{name}={str(values[name]).lower()}" for name in names]
