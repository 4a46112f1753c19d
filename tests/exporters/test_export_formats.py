"""check_format rejects what a format does not support, and names it."""

import pytest

from conftest import tiny_config
from gptlab.errors import UserError
from gptlab.exporters import formats
from gptlab.exporters.formats import check_format
from gptlab.model.config import ComponentModelConfig

BYTES = {"name": "bytes"}
OPTIONS = {
    "positions": "rotary",
    "norm": "rms",
    "qk_norm": True,
    "embedding_norm": True,
    "logit_soft_cap": 15.0,
    "value_residual": True,
    "value_embeddings": 1,
    "x0_skips": True,
    "unet_skips": True,
    "attention_window": 8,
    "activation": "relu_squared",
}
OF_NANOGPT = {"activation": "gelu"}


@pytest.mark.parametrize(("name", "value"), [*OPTIONS.items(), ("positions", "rotary_half")])
def test_options_beyond_gpt2_are_only_supported_by_onnx(name, value):
    for form in ("hf", "nanogpt", "llmc", "gguf"):
        config = tiny_config(**OF_NANOGPT if form == "nanogpt" else {}).model_copy(update={name: value})
        with pytest.raises(UserError) as error:
            check_format(form, "float32", config, BYTES)
        assert f"format={form} does not support model.{name}={str(value).lower()}" in str(error.value)
    check_format("onnx", "float32", config, None)


def test_all_unsupported_options_are_reported():
    with pytest.raises(UserError, match=r"support model\.norm=rms, model\.positions=rotary, model\.tie_weights=false"):
        check_format("llmc", "float32", tiny_config(norm="rms", positions="rotary", tie_weights=False), BYTES)


@pytest.mark.parametrize(
    ("form", "supported", "unsupported"),
    [
        ("hf", [{}, {"activation": "gelu"}, {"tie_weights": False}, {"bias": False}], []),
        ("nanogpt", [OF_NANOGPT, {**OF_NANOGPT, "bias": False}], [{}, {**OF_NANOGPT, "tie_weights": False}]),
        ("llmc", [{}, {"bias": False}], [{"activation": "gelu"}, {"tie_weights": False}]),
        ("gguf", [{}, {"bias": False}, {"tie_weights": False}], [{"activation": "gelu"}]),
    ],
)
def test_options_of_gpt2_are_accepted_if_the_format_supports_them(form, supported, unsupported):
    padded = {"pad_vocab_to_multiple_of": 64, "zero_init": True, "global_every": 2}  # no effect on a trained model
    for changes in supported:
        check_format(form, "float32", tiny_config(**changes, **padded), BYTES)
    for changes in unsupported:
        with pytest.raises(UserError, match=rf"format={form} does not support model\."):
            check_format(form, "float32", tiny_config(**changes), BYTES)


@pytest.mark.parametrize(
    ("form", "dtype", "supported"),
    [
        ("nanogpt", "bfloat16", "float32"),
        ("llmc", "float16", "float32 or bfloat16"),
        ("gguf", "bfloat16", "float32 or float16"),
        ("onnx", "float16", "float32"),
    ],
)
def test_unsupported_dtype_raises(form, dtype, supported):
    with pytest.raises(UserError, match=rf"format={form} does not support dtype={dtype}\. Use dtype={supported}\."):
        check_format(form, dtype, tiny_config(activation="gelu"), BYTES)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"name": "characters", "characters": "ab"}, "must be gpt2 or bytes or bpe, but .* has tokenizer=characters"),
        (None, "but this model has an unknown tokenizer"),
    ],
)
def test_tokenizer_that_llama_cpp_does_not_support_raises(record, message):
    with pytest.raises(UserError, match=message):
        check_format("gguf", "float32", tiny_config(), record)


def test_a_context_of_one_token_that_llama_cpp_cannot_have_raises():
    model = tiny_config(block_size=1, activation="gelu_tanh")
    with pytest.raises(UserError, match=r"format=gguf does not support model\.block_size=1: llama\.cpp needs"):
        check_format("gguf", "float32", model, {"name": "bytes"})


def test_missing_package_is_reported(monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"format=gguf requires the gguf package.*pip install '\.\[export\]'"):
        check_format("gguf", "float32", tiny_config(), BYTES)
    with pytest.raises(UserError, match="format=onnx requires the onnx package and the onnxscript package"):
        check_format("onnx", "float32", tiny_config(), None)
    check_format("llmc", "float32", tiny_config(), None)


COMPONENT = {"_target_": "mylab.model.X", "alpha": 1}


@pytest.mark.parametrize("form", ["hf", "nanogpt", "llmc", "gguf"])
@pytest.mark.parametrize("name", ["block", "attention", "activation", "norm"])
def test_a_part_that_is_a_component_is_reported_by_its_target(form, name):
    config = tiny_config(**OF_NANOGPT if form == "nanogpt" else {}).model_copy(update={name: COMPONENT})
    with pytest.raises(UserError, match=rf"format={form} does not support model\.{name}\._target_=mylab\.model\.X of"):
        check_format(form, "float32", config, BYTES)


@pytest.mark.parametrize("form", ["hf", "nanogpt", "llmc", "gguf"])
def test_a_model_that_is_a_component_is_reported_by_its_target(form):
    config = ComponentModelConfig(**tiny_config(**OF_NANOGPT).model_dump() | COMPONENT)
    with pytest.raises(UserError, match=rf"format={form} does not support model\._target_=mylab\.model\.X"):
        check_format(form, "float32", config, BYTES)
