"""What has no counterpart in a format is refused by the option's name."""

import pytest

from conftest import tiny_config
from gptlab.errors import UserError
from gptlab.exporters import formats
from gptlab.exporters.formats import check_format

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
def test_an_option_beyond_gpt2_is_refused_everywhere_but_in_a_graph(name, value):
    for form in ("hf", "nanogpt", "llmc", "gguf"):
        config = tiny_config(**OF_NANOGPT if form == "nanogpt" else {}).model_copy(update={name: value})
        with pytest.raises(UserError) as error:
            check_format(form, "float32", config, BYTES)
        assert f"format={form} has no model.{name}={str(value).lower()}: this model would be" in str(error.value)
    check_format("onnx", "float32", config, None)


def test_all_are_named_at_once():
    with pytest.raises(
        UserError, match=r"no model\.norm=rms, no model\.positions=rotary, no model\.tie_weights=false:"
    ):
        check_format("llmc", "float32", tiny_config(norm="rms", positions="rotary", tie_weights=False), BYTES)


@pytest.mark.parametrize(
    ("form", "fits", "not_there"),
    [
        ("hf", [{}, {"activation": "gelu"}, {"tie_weights": False}, {"bias": False}], []),
        ("nanogpt", [OF_NANOGPT, {**OF_NANOGPT, "bias": False}], [{}, {**OF_NANOGPT, "tie_weights": False}]),
        ("llmc", [{}, {"bias": False}], [{"activation": "gelu"}, {"tie_weights": False}]),
        ("gguf", [{}, {"bias": False}, {"tie_weights": False}], [{"activation": "gelu"}]),
    ],
)
def test_gpt2_s_own_options_fit_where_the_other_side_has_them(form, fits, not_there):
    padded = {"pad_vocab_to_multiple_of": 64, "zero_init": True, "global_every": 2}  # which change no trained network
    for changes in fits:
        check_format(form, "float32", tiny_config(**changes, **padded), BYTES)
    for changes in not_there:
        with pytest.raises(UserError, match=f"format={form} has no model"):
            check_format(form, "float32", tiny_config(**changes), BYTES)


@pytest.mark.parametrize(
    ("form", "dtype", "sentence"),
    [
        ("nanogpt", "bfloat16", "dtype=bfloat16: format=nanogpt has weights in float32"),
        ("llmc", "float16", "dtype=float16: format=llmc has weights in float32 or bfloat16"),
        ("gguf", "bfloat16", "dtype=bfloat16: format=gguf has weights in float32 or float16"),
        ("onnx", "float16", "dtype=float16: format=onnx has weights in float32"),
    ],
)
def test_a_type_of_weights_that_a_format_has_not(form, dtype, sentence):
    with pytest.raises(UserError, match=sentence):
        check_format(form, dtype, tiny_config(activation="gelu"), BYTES)


@pytest.mark.parametrize(
    ("record", "sentence"),
    [
        ({"name": "characters", "characters": "ab"}, "this model has tokenizer=characters; llama.cpp has gpt2, bytes"),
        (None, "this model has no tokenizer that is known"),
    ],
)
def test_a_tokenizer_that_llama_cpp_has_not(record, sentence):
    with pytest.raises(UserError, match=sentence):
        check_format("gguf", "float32", tiny_config(), record)


def test_a_package_that_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(formats, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"format=gguf needs the gguf package: pip install 'gptlab\[export\]'"):
        check_format("gguf", "float32", tiny_config(), BYTES)
    with pytest.raises(UserError, match="format=onnx needs the onnx package and the onnxscript package"):
        check_format("onnx", "float32", tiny_config(), None)
    check_format("llmc", "float32", tiny_config(), None)
