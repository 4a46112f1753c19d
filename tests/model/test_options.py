"""Options introduced after GPT-2, compared with transformers or with their formulas."""

import math
from typing import get_args

import pytest
import torch
import torch.nn.functional as F
from pydantic import ValidationError
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers import NanoChatConfig, NanoChatForCausalLM
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from conftest import tiny_config
from gptlab.model.attention import attention_mask, rotary_tables, rotate
from gptlab.model.config import GPTConfig, flops_per_token, parameter_count
from gptlab.model.gpt import GPT
from gptlab.model.kernels import attend
from gptlab.model.modern import build_gpt

OPTIONS = {
    "rms": {"norm": "rms"},
    "rotary": {"positions": "rotary"},
    "rotary_half": {"positions": "rotary_half", "rope_base": 1024},
    "qk_norm": {"qk_norm": True},
    "embedding_norm": {"embedding_norm": True},
    "soft cap": {"logit_soft_cap": 2.0},
    "value residual": {"value_residual": True},
    "value embeddings": {"value_embeddings": 2},
    "both values": {"value_residual": True, "value_embeddings": 1},
    "x0": {"x0_skips": True},
    "unet": {"unet_skips": True},
    "window": {"attention_window": 5, "global_every": 3},
    "relu": {"activation": "relu_squared"},
}
ALL = {
    **{key: value for options in OPTIONS.values() for key, value in options.items()},
    **{"positions": "rotary_half", "value_embeddings": 2, "tie_weights": False, "bias": False},
}


def randomized(config: GPTConfig) -> GPT:
    """Returns a float64 model in which every parameter has an effect."""
    torch.manual_seed(0)
    model = build_gpt(config).double()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def reference_logits(model: GPT, idx: torch.Tensor) -> torch.Tensor:
    """Computes the logits of a model with all options from their formulas."""
    config, state = model.config, model.state_dict()
    B, T, hs = *idx.shape, config.head_size

    def rms(x, weight=None):
        y = x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt()
        return y if weight is None else y * weight

    def rotated(x):  # (B, nh, T, hs): the first half of the pairs is rotated, as complex numbers
        z = torch.complex(x[..., : hs // 2], x[..., hs // 2 :])
        pairs = hs // 4
        angles = torch.zeros(T, hs // 2, dtype=torch.float64)
        for i in range(pairs):
            angles[:, i] = torch.arange(T) * config.rope_base ** (-i / pairs)
        z = z * torch.polar(torch.ones_like(angles), angles)
        return torch.cat((z.real, z.imag), -1)

    x = x0 = rms(state["wte.weight"][idx], state["ln_e.weight"])
    outputs, first = [], None
    L = config.n_layer
    for i in range(L):
        p = f"h.{i}."
        if i >= L - L // 2:
            x = x + state[p + "mix_skip.weight"][0] * outputs[L - 1 - i]
        x = state[p + "mix_x0.weight"][0] * x + state[p + "mix_x0.weight"][1] * x0
        q, k, v = (rms(x, state[p + "ln_1.weight"]) @ state[p + "attn.c_attn.weight"].T).chunk(3, -1)
        terms = [v]
        if i == 0:
            first = v
        else:
            terms.append(first)
        number = min(i, L - 1 - i)
        if number < config.value_embeddings:
            terms.append(state[f"value_embeds.{number}.weight"][idx])
        if len(terms) > 1:
            v = sum(w * term for w, term in zip(state[p + "attn.mix_values.weight"], terms, strict=True))
        q, k, v = (part.view(B, T, config.n_head, hs).transpose(1, 2) for part in (q, k, v))
        q, k = rotated(rms(q)), rotated(rms(k))
        window = T if (i + 1) % config.global_every == 0 or i == L - 1 else config.attention_window
        y = torch.zeros_like(q)
        for t in range(T):
            seen = slice(max(0, t + 1 - window), t + 1)
            weights = (q[:, :, t : t + 1] @ k[:, :, seen].transpose(2, 3) / math.sqrt(hs)).softmax(-1)
            y[:, :, t : t + 1] = weights @ v[:, :, seen]
        x = x + y.transpose(1, 2).reshape(B, T, -1) @ state[p + "attn.c_proj.weight"].T
        inner = (rms(x, state[p + "ln_2.weight"]) @ state[p + "mlp.c_fc.weight"].T).clamp(min=0) ** 2
        x = x + inner @ state[p + "mlp.c_proj.weight"].T
        outputs.append(x)
    logits = rms(x, state["ln_f.weight"]) @ state["lm_head.weight"].T
    return config.logit_soft_cap * torch.tanh(logits / config.logit_soft_cap)


@pytest.mark.parametrize("n_layer", [4, 5])
def test_all_options_together_match_their_formulas(n_layer):
    model = randomized(tiny_config(n_layer=n_layer, n_embd=64, **ALL))
    idx = torch.randint(61, (3, 16))
    torch.testing.assert_close(model(idx), reference_logits(model, idx), rtol=1e-5, atol=1e-6)


def test_rotary_positions_match_llama():
    q, k = torch.randn(2, 3, 2, 10, 16, dtype=torch.float64).unbind()
    positions = torch.arange(10)[None]
    angles = positions[..., None] / 500.0 ** (torch.arange(0, 16, 2) / 16)
    angles = torch.cat((angles, angles), -1)
    expected = apply_rotary_pos_emb(q, k, angles.cos(), angles.sin())
    tables = rotary_tables(positions, 16, 500.0, q.dtype, half=False)
    found = (rotate(part, tables) for part in (q, k))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-6)  # the angles are float32


def test_logits_match_nanochat():
    torch.manual_seed(0)
    shape = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    more = {"num_key_value_heads": 2, "intermediate_size": 128, "max_position_embeddings": 16, "rms_norm_eps": 1e-5}
    theirs = NanoChatForCausalLM(NanoChatConfig(**shape, **more, final_logit_softcapping=15.0)).double()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    options = {"positions": "rotary", "norm": "rms", "qk_norm": True, "embedding_norm": True, "bias": False}
    ours = build_gpt(
        tiny_config(vocab_size=64, activation="relu_squared", logit_soft_cap=15.0, tie_weights=False, **options)
    ).double()
    state, there = ours.state_dict(), theirs.state_dict()
    # nanochat rotates in the other direction, which is equivalent to swapping the halves of a head
    swap = lambda w: w.view(2, 2, 8, 32).flip(1).reshape(32, 32)  # noqa: E731
    for i in range(2):
        p, t = f"h.{i}.", f"model.layers.{i}."
        q, k, v = (there[f"{t}self_attn.{part}_proj.weight"] for part in "qkv")
        state[p + "attn.c_attn.weight"] = torch.cat((swap(q), swap(k), v))
        state[p + "attn.c_proj.weight"] = there[t + "self_attn.o_proj.weight"]
        state[p + "mlp.c_fc.weight"], state[p + "mlp.c_proj.weight"] = (
            there[t + "mlp.fc1.weight"],
            there[t + "mlp.fc2.weight"],
        )
    state["wte.weight"], state["lm_head.weight"] = there["model.embed_tokens.weight"], there["lm_head.weight"]
    ours.load_state_dict(state)
    idx = torch.randint(64, (3, 16))
    torch.testing.assert_close(ours(idx), theirs(idx).logits, rtol=0, atol=1e-5)  # transformers normalizes in float32


@pytest.mark.parametrize("options", [*OPTIONS.values(), ALL], ids=[*OPTIONS, "all"])
def test_parameter_count_and_flops_match_the_model_with_every_option(options):
    config = tiny_config(n_layer=5, n_embd=64, pad_vocab_to_multiple_of=64, **options)
    model, idx = build_gpt(config), torch.randint(61, (2, 16))
    assert parameter_count(config) == sum(parameter.numel() for parameter in model.parameters())
    if config.attention_window is not None:
        return  # torch's counter ignores the mask
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(idx).sum().backward()
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() < 2)
    assert counter.get_total_flops() == idx.numel() * (flops_per_token(config) - 6 * vectors)


def test_flops_exclude_tokens_outside_the_window():
    config = tiny_config(n_layer=4, attention_window=4, global_every=2)
    wide = tiny_config(n_layer=4)
    assert flops_per_token(wide) - flops_per_token(config) == 2 * 12 * 32 * (16 - 4)


def test_zero_init_makes_every_block_the_identity_and_all_logits_zero():
    model = build_gpt(tiny_config(zero_init=True, tie_weights=False))
    idx = torch.randint(61, (2, 16))
    assert not model(idx).any()
    block_input = model.wte(idx) + model.wpe(torch.arange(16))
    states = model.hidden_states(idx, model.attention_context(idx, None))
    torch.testing.assert_close(states, model.ln_f(block_input), rtol=0, atol=0)
    model(idx).sum().backward()  # the head has a gradient nevertheless
    assert model.lm_head.weight.grad.any()


@pytest.mark.parametrize("options", [ALL, {"attention_window": 3, "global_every": 2}], ids=["all", "window"])
def test_logits_do_not_depend_on_later_tokens(options):
    model = randomized(tiny_config(n_layer=4, **options))
    idx = torch.randint(61, (1, 16))
    other = idx.clone()
    other[:, 9] = (other[:, 9] + 1) % 61
    torch.testing.assert_close(model(idx)[:, :9], model(other)[:, :9], rtol=0, atol=1e-12)
    assert (model(idx)[:, 9:] - model(other)[:, 9:]).abs().amax() > 1e-6


@pytest.mark.parametrize("length", [16, 300])
def test_attention_matches_sdpa_for_all_kernels(length):
    q, k, v = torch.randn(3, 2, 3, length, 8).unbind()
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True)
    torch.testing.assert_close(attend(q, k, v, None, 0.0).double(), expected, rtol=1e-4, atol=1e-5)
    idx = torch.zeros(2, length, dtype=torch.long)
    mask = attention_mask(idx, None, 7, flex=False)
    expected = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), attn_mask=mask)
    torch.testing.assert_close(attend(q, k, v, mask, 0.0).double(), expected, rtol=1e-4, atol=1e-5)
    for rows in (q[:, :, -1:], q[:1, :, -1:]):  # only the last token, of several rows and of one
        batch = len(rows)
        found = attend(rows, k[:batch], v[:batch], mask[:1, :, -1:], 0.0)
        torch.testing.assert_close(found.double(), expected[:batch, :, -1:], rtol=1e-4, atol=1e-5)
        unmasked = F.scaled_dot_product_attention(rows.double(), k[:batch].double(), v[:batch].double())
        found = attend(rows, k[:batch], v[:batch], None, 0.0)
        torch.testing.assert_close(found.double(), unmasked, rtol=1e-4, atol=1e-5)
        bf16 = attend(rows.bfloat16(), k[:batch], v[:batch], None, 0.0)  # as with a float32 cache
        torch.testing.assert_close(bf16.double(), unmasked, rtol=0.02, atol=0.02)
    at = torch.arange(length)
    assert mask[0, 0].equal((at[:, None] >= at) & (at[:, None] - at < 7))


def test_invalid_options_raise():
    with pytest.raises(ValidationError, match=r"value_embeddings=2 .* n_layer=2\. The maximum is value_embeddings=1"):
        tiny_config(value_embeddings=2)
    with pytest.raises(ValidationError, match=r"positions=rotary_half .* multiple of 4, but .* is 6"):
        tiny_config(n_embd=12, n_head=2, positions="rotary_half")


FORMULAS = {
    "gelu": lambda x: x * (1 + torch.erf(x / math.sqrt(2))) / 2,
    "gelu_tanh": lambda x: x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))) / 2,
    "relu_squared": lambda x: x.clamp(min=0) ** 2,
}


@pytest.mark.parametrize("modern", [False, True])
@pytest.mark.parametrize("activation", get_args(get_args(GPTConfig.model_fields["activation"].annotation)[0]))
def test_every_activation_matches_its_formula(activation, modern):
    model = build_gpt(tiny_config(activation=activation, **({"qk_norm": True} if modern else {})))
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    torch.testing.assert_close(model.h[0].mlp.act(x), FORMULAS[activation](x), rtol=1e-12, atol=1e-12)
