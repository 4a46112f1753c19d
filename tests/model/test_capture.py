"""Capture and replacement of activations by name."""

import pytest
import torch
import torch.nn.functional as F

from conftest import tiny_config
from gptlab.errors import UserError
from gptlab.model.attention import attention_mask, build_attention_context
from gptlab.model.capture import activation_names, capture_activations, replace_activations
from gptlab.model.gpt import GPT
from gptlab.model.modern import build_gpt

OPTIONS = {
    "GPT-2's": {},
    "rotary, QK-norm": {"positions": "rotary", "qk_norm": True, "norm": "rms"},
    "a window": {"attention_window": 4, "global_every": 2, "n_layer": 3},
    "mixed values": {"value_residual": True, "value_embeddings": 1, "x0_skips": True},
}


@pytest.fixture
def idx() -> torch.Tensor:
    return torch.randint(61, (2, 16), generator=torch.Generator().manual_seed(1))


def build_model(**changes) -> GPT:
    torch.manual_seed(0)
    model = build_gpt(tiny_config(**changes)).double()
    for parameter in model.parameters():  # so that the attention weights are not nearly uniform
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.mark.parametrize("changes", OPTIONS.values(), ids=OPTIONS)
def test_captured_attention_weights_reproduce_the_kernel_s_output(idx, changes):
    model = build_model(**changes)
    names = ["*.attn.weights", "*.attn", "*.attn.c_attn", *["*.attn.mix_values"] * ("value_residual" in changes)]
    with capture_activations(model, names) as found:
        model(idx)
    for layer in range(model.config.n_layer):
        weights = found[f"h.{layer}.attn.weights"]
        assert weights.shape == (2, 2, 16, 16)
        torch.testing.assert_close(weights.sum(-1), torch.ones(2, 2, 16, dtype=torch.float64))
        assert weights.triu(1).abs().max() == 0
        own = found[f"h.{layer}.attn.c_attn"].chunk(3, dim=2)[2]
        values = found.get(f"h.{layer}.attn.mix_values", own).view(2, 16, 2, -1).transpose(1, 2)
        mixed = (weights @ values).transpose(1, 2).flatten(2)
        expected = model.h[layer].attn.c_proj(mixed)
        torch.testing.assert_close(found[f"h.{layer}.attn"], expected, rtol=0, atol=1e-10)


def test_attention_weights_are_the_same_with_flex_attention_s_mask(idx):
    model = build_model(attention_window=4, global_every=2, n_layer=3)
    x, attention = torch.randn(2, 16, 32, dtype=torch.float64), model.h[0].attn
    contexts = (build_attention_context(model.config, idx, None, x.dtype, flex=flex) for flex in (False, True))
    plain, flex = (attention.weights(x, ctx) for ctx in contexts)
    assert torch.equal(plain, flex)
    assert torch.equal(plain > 0, attention_mask(idx, None, 4, flex=False).expand(2, 2, 16, 16))


def test_the_residual_stream_is_the_sum_of_the_captured_outputs(idx):
    model = build_model()
    with capture_activations(model, ["drop", "h.?", "h.*.attn", "h.*.mlp", "ln_f"]) as found:
        logits = model(idx)
    x = found["drop"]
    for layer in range(2):
        x = x + found[f"h.{layer}.attn"] + found[f"h.{layer}.mlp"]
        torch.testing.assert_close(found[f"h.{layer}"], x, rtol=0, atol=1e-12)
    assert torch.equal(F.linear(found["ln_f"], model.wte.weight), logits)
    with capture_activations(model, ["ln_f"]) as later:
        pass
    assert later == {}  # there was no forward pass


def test_gradients_flow_through_captured_activations(idx):
    model = build_model()
    with capture_activations(model, ["h.0"]) as found:
        model(idx)[0, -1, 5].backward(inputs=[model.wte.weight])
    assert found["h.0"].requires_grad


def test_the_model_continues_with_replaced_activations(idx):
    model, source = build_model(), idx.flip(0)
    with capture_activations(model, ["h.0"]) as found:
        other = model(source)
    # the full residual stream of the source after the first block
    with replace_activations(model, {"h.0": lambda x: found["h.0"]}):
        assert torch.equal(model(idx), other)
    with replace_activations(model, {"*.attn": torch.zeros_like, "*.mlp": torch.zeros_like}):
        without = model(idx)
    embedded = model.wte(idx) + model.wpe.weight[:16]
    assert torch.equal(without, F.linear(model.ln_f(embedded), model.wte.weight))
    assert not torch.equal(model(idx), without)  # the hooks were removed


def test_unknown_names_and_replaced_attention_weights_raise(idx):
    model = build_model()
    assert {"wte", "h.1.attn.weights", "h.1.mlp.act", "ln_f", "lm_head"} <= set(activation_names(model))
    with pytest.raises(UserError, match=r"h\.0\.atn matches no activation .* Did you mean h\.0\.attn\?"):
        capture_activations(model, ["h.0.atn"]).__enter__()
    with pytest.raises(UserError, match=r"h\.0\.attn\.weights can be captured but not replaced"):
        replace_activations(model, {"h.0.attn.weights": torch.zeros_like}).__enter__()
    assert not any(module._forward_hooks for module in model.modules())
