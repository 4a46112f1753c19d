import pytest
import torch
from omegaconf import OmegaConf
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import TINY, defaults, tiny_config
from gptlab.config.command import configuration_folder
from gptlab.model.config import (
    EXTERNAL_DEFAULTS,
    GPT2_OPTIONS,
    OPTIONS,
    SHAPE_KEYS,
    GPTConfig,
    flops_per_token,
    parameter_count,
)
from gptlab.model.gpt import GPT
from gptlab.model.modern import build_gpt, meta_gpt

# Published: nanoGPT's and transformers' counts of OpenAI's checkpoints, with bias and V = 50257.
PUBLISHED = {"gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200}


def size(name: str, **changes: object) -> GPTConfig:
    """Returns the configuration of a size in conf/model/."""
    options = OmegaConf.load(configuration_folder() / "model" / "gpt.yaml")
    shape = OmegaConf.load(configuration_folder() / "model" / f"{name}.yaml").model
    return GPTConfig(**{**OmegaConf.merge(options, shape), "vocab_size": 50257, **changes})


def count(config: GPTConfig) -> int:
    with torch.device("meta"):
        return sum(parameter.numel() for parameter in build_gpt(config).parameters())


@pytest.mark.parametrize("name", PUBLISHED)
def test_sizes_have_their_published_parameter_counts(name):
    config = size(name)
    assert count(config) == PUBLISHED[name]
    assert parameter_count(config) == PUBLISHED[name]


def test_parameter_counts_match_nanogpt():
    assert parameter_count(size("gpt2", bias=False, pad_vocab_to_multiple_of=64)) == 124_373_760
    assert parameter_count(size("mini", bias=False, vocab_size=65)) == 10_745_088


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("tie_weights", [True, False])
@pytest.mark.parametrize("pad_vocab_to_multiple_of", [1, 64])
def test_parameter_count_matches_the_model(bias, tie_weights, pad_vocab_to_multiple_of):
    config = tiny_config(bias=bias, tie_weights=tie_weights, pad_vocab_to_multiple_of=pad_vocab_to_multiple_of)
    assert parameter_count(config) == count(config)


def test_flops_of_gpt2_match_nanogpt():
    # nanoGPT's estimate_mfu: 6 N + 12 L H Q T with N without wpe = 123,653,376
    assert flops_per_token(size("gpt2")) == 6 * 123_653_376 + 12 * 12 * 12 * 64 * 1024


def test_flops_exclude_an_untied_embedding():
    assert flops_per_token(size("gpt2", tie_weights=False)) == flops_per_token(size("gpt2"))


def test_flops_match_torch_s_counter():
    # the counter counts only matmuls: no biases and LayerNorms, and attention only with the math backend
    config = tiny_config(n_embd=64, block_size=32)
    model, idx = build_gpt(config), torch.randint(config.vocab_size, (3, 32))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx).sum().backward()
    vectors = sum(p.numel() for p in model.parameters() if p.dim() < 2)
    assert counter.get_total_flops() == idx.numel() * (flops_per_token(config) - 6 * vectors)


def test_n_head_must_divide_n_embd():
    with pytest.raises(ValidationError, match=r"n_head=5 does not divide n_embd=32\. Nearest divisors: 4 and 8"):
        tiny_config(n_head=5)


OTHER_VALUES = {  # for every field, a value that differs from that of the tiny configuration
    **{"block_size": 8, "vocab_size": 60, "n_layer": 3, "n_head": 4, "n_embd": 64, "bias": False, "dropout": 0.1},
    **{"activation": "relu_squared", "norm": "rms", "positions": "rotary", "rope_base": 500, "qk_norm": True},
    **{"embedding_norm": True, "zero_init": True, "logit_soft_cap": 15, "value_residual": True, "value_embeddings": 1},
    **{"x0_skips": True, "unet_skips": True, "attention_window": 4, "global_every": 2, "tie_weights": False},
    **{"pad_vocab_to_multiple_of": 64, "resize_embeddings": True, "activation_checkpointing": True},
    "block": {"_target_": "gptlab.model.gpt.Block"},
    "attention": {"_target_": "gptlab.model.attention.CausalSelfAttention"},
}


def test_every_field_has_metadata_and_the_constants_match_it():
    assert list(OPTIONS) == list(GPTConfig.model_fields) == list(OTHER_VALUES)
    listed = {"modern": GPT2_OPTIONS, "unrecorded": EXTERNAL_DEFAULTS}
    for name, option in OPTIONS.items():
        assert (name in SHAPE_KEYS) == option.shapes_weights
        assert [kind for kind, options in listed.items() if name in options] == [option.kind] * (option.kind in listed)
    sizes = {name: TINY[name] for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")}
    recorded = {"bias": True, "activation": "gelu_tanh", "tie_weights": True}  # in the files of other programs
    assert GPTConfig(**EXTERNAL_DEFAULTS, **GPT2_OPTIONS, **recorded, **sizes).is_gpt2


def test_gpt2_s_values_are_the_defaults_in_yaml():
    values = defaults("model/gpt.yaml")
    gpt2 = {name: option.gpt2 for name, option in OPTIONS.items() if option.kind != "size"}
    assert values.keys() == OPTIONS.keys()
    own = {"global_every": 4, "pad_vocab_to_multiple_of": "auto"}  # not used without attention_window; 1 on a CPU
    assert {name: values[name] for name in gpt2} == gpt2 | own


@pytest.mark.parametrize("name", OTHER_VALUES)
def test_shapes_weights_is_correct_for_every_field(name):
    def shapes(config: GPTConfig) -> list[tuple[str, torch.Size]]:
        return [(name, tensor.shape) for name, tensor in meta_gpt(config).named_parameters()]

    differ = shapes(tiny_config()) != shapes(tiny_config(**{name: OTHER_VALUES[name]}))
    # a longer block_size can be cropped; n_head changes the meaning of the rows of c_attn, but not their number
    exceptions = {"block_size", "n_head"}
    assert differ == (OPTIONS[name].shapes_weights != (name in exceptions))


def test_gpt_accepts_only_gpt2_s_options():
    for name, value in OTHER_VALUES.items():
        config = tiny_config(**{name: value})
        modern = OPTIONS[name].kind == "modern" or name in {"zero_init", "activation"}
        assert config.is_gpt2 != modern
        assert (type(build_gpt(config)) is GPT) != modern
        if modern:
            with pytest.raises(ValueError, match="build_gpt"):
                GPT(config)
