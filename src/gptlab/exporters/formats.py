"""Export formats and their capabilities. Imports no torch.

| format  | for                                          | implementation of the model                             |
|---------|----------------------------------------------|---------------------------------------------------------|
| hf      | transformers and compatible servers          | transformers, modeling_gpt2.py                          |
| nanogpt | karpathy/nanoGPT                             | nanoGPT, model.py: head tied to ``wte``, exact GELU     |
| llmc    | karpathy/llm.c                               | llm.c, train_gpt2.c: head tied to ``wte``, tanh GELU    |
| gguf    | llama.cpp                                    | llama.cpp, LLM_ARCH_GPT2: tanh GELU                     |
| onnx    | onnxruntime and other graph runtimes         | the exported graph of gptlab's model                    |
"""

from importlib.util import find_spec
from typing import Any, Literal, NamedTuple

from gptlab.config.components import TARGET
from gptlab.errors import UserError, install_extra
from gptlab.model.config import GPT2_OPTIONS, GPTConfig

FormatName = Literal["hf", "nanogpt", "llmc", "gguf", "onnx"]
DtypeName = Literal["float32", "bfloat16", "float16"]


class FormatCapabilities(NamedTuple):
    """Capabilities of a format.

    Attributes:
        dtypes: Supported dtypes of the weights.
        activations: Supported values of ``model.activation``, or None for all.
        tied_only: Whether the format requires weight tying.
        biases: Whether the format always has biases. If so, zeros are written for a model without biases.
        tokenizers: Supported tokenizers, or None if any tokenizer, or an unknown one, is supported.
        packages: Packages required to write the format.
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
        name: Name of the format.
        dtype: dtype of the weights.
        model: Config of the model.
        record: Record of the model's tokenizer, or None if it is unknown.

    Raises:
        UserError: A package is missing, or the format does not support the dtype, an option or the tokenizer.
    """
    form = FORMATS[name]
    if missing := [package for package in form.packages if find_spec(package) is None]:
        raise UserError(
            f"format={name} requires {' and '.join(f'the {package} package' for package in missing)}. Install with: "
            f"{install_extra('export')}"
        )
    if dtype not in form.dtypes:
        raise UserError(f"format={name} does not support dtype={dtype}. Use dtype={' or '.join(form.dtypes)}.")
    if foreign := _unsupported_options(form, model):
        raise UserError(
            f"format={name} does not support {', '.join(foreign)} of this model. format=onnx supports every model."
        )
    if name == "gguf" and model.block_size == 1:
        raise UserError("format=gguf does not support model.block_size=1: llama.cpp needs a context of two tokens.")
    if form.tokenizers is not None and (record is None or record["name"] not in form.tokenizers):
        kind = "an unknown tokenizer" if record is None else f"tokenizer={record['name']}"
        raise UserError(
            f"format={name} includes the tokenizer, which must be {' or '.join(form.tokenizers)}, but this model has "
            f"{kind}."
        )


def _unsupported_options(form: FormatCapabilities, model: GPTConfig) -> list[str]:
    """Returns the options of a model that a format does not support, with their values."""
    if form.activations is None:
        return []
    values = model.model_dump()
    names = [name for name, plain in GPT2_OPTIONS.items() if values[name] != plain]
    if model.activation not in form.activations and "activation" not in names:
        names.append("activation")
    if form.tied_only and not model.tie_weights:
        names.append("tie_weights")
    components = {name: values[TARGET] for name, values in model.components.items()}
    own = [f"model.{TARGET}={components['']}"] if "" in components else []
    return own + [
        f"model.{name}.{TARGET}={components[name]}"
        if name in components
        else f"model.{name}={str(values[name]).lower()}"
        for name in names
    ]
