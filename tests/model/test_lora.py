"""LoRA: parity with the peft library, merging, and gradients."""

from itertools import combinations

import peft
import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny_config
from gptlab.model.config import LoRAConfig, flops_per_token, forward_flops_per_token, lora_count
from gptlab.model.gpt import GPT
from gptlab.model.lora import LoRALinear, add_lora, merge_lora
from gptlab.model.modern import build_gpt

ALL = ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"]


def adapted(targets: list[str], *, bias: bool = True) -> tuple[GPT, GPT, LoRAConfig]:
    """Returns a model, the same model with LoRA layers, and the configuration of these."""
    torch.manual_seed(0)
    plain = GPT(tiny_config(bias=bias)).double()
    other = GPT(plain.config).double()
    other.load_state_dict(plain.state_dict())
    config = LoRAConfig(rank=3, alpha=7.0, targets=targets)
    add_lora(other, config)
    return plain, other, config


def randomize_updates(model: GPT) -> None:
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            torch.nn.init.normal_(layer.lora_B, std=0.3)


@pytest.fixture
def idx() -> torch.Tensor:
    return torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("targets", [ALL, ["attn.c_attn"], ["mlp.c_proj", "attn.c_proj"]], ids=len)
def test_lora_is_initially_the_identity_and_matches_peft(idx, targets):
    plain, ours, _ = adapted(targets)
    assert torch.equal(ours(idx), plain(idx))
    randomize_updates(ours)
    logits = ours(idx)
    theirs = peft.inject_adapter_in_model(
        peft.LoraConfig(r=3, lora_alpha=7.0, target_modules=rf"h\.\d+\.({'|'.join(targets)})"), plain
    )
    layers = 0
    for name, layer in ours.named_modules():
        if isinstance(layer, LoRALinear):
            other = theirs.get_submodule(name)
            other.lora_A["default"].weight.data.copy_(layer.lora_A)
            other.lora_B["default"].weight.data.copy_(layer.lora_B)
            layers += 1
    assert layers == 2 * len(targets)
    torch.testing.assert_close(logits, theirs(idx), rtol=0, atol=1e-12)


def test_merged_weights_give_the_same_logits_in_a_model_without_lora(idx):
    plain, ours, config = adapted(ALL, bias=False)
    randomize_updates(ours)
    assert not torch.allclose(ours(idx), plain(idx), atol=1e-3)
    logits = ours(idx)
    plain.load_state_dict(merge_lora(ours.state_dict(), config))
    torch.testing.assert_close(plain(idx), logits, rtol=0, atol=1e-12)


SUBSETS = [list(subset) for size in range(1, 5) for subset in combinations(ALL, size)]
MODERN = {"norm": "rms", "positions": "rotary", "qk_norm": True, "tie_weights": False, "value_embeddings": 1}


@pytest.mark.parametrize("targets", SUBSETS, ids=" ".join)
@pytest.mark.parametrize("options", [{}, MODERN], ids=["gpt2", "modern"])
def test_flops_match_torch_s_counter(targets, options):
    # the counter counts only matmuls: of vectors, the forward pass and the gradients of inputs are not among them
    config, lora = tiny_config(n_layer=3, n_embd=64, **options), LoRAConfig(rank=3, alpha=7.0, targets=targets)
    model, idx = build_gpt(config), torch.randint(61, (2, 16))
    vectors = sum(parameter.numel() for parameter in model.parameters() if parameter.dim() < 2)
    add_lora(model, lora)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loss = model(idx).sum()
        forward = counter.get_total_flops()
        loss.backward()
    assert forward == idx.numel() * (forward_flops_per_token(config, lora) - 2 * vectors)
    assert counter.get_total_flops() == idx.numel() * (flops_per_token(config, lora) - 4 * vectors)


@pytest.mark.parametrize("chunk", [None, 5], ids=["one chunk", "several chunks"])
def test_only_lora_parameters_have_a_gradient(idx, chunk):
    plain, ours, config = adapted(ALL)
    randomize_updates(ours)
    ours.loss(idx, idx.roll(-1, 1), None, chunk).backward()
    trained = {name for name, parameter in ours.named_parameters() if parameter.grad is not None}
    assert trained == {name for name, _ in ours.named_parameters() if ".lora_" in name}
    assert trained == {name for name, parameter in ours.named_parameters() if parameter.requires_grad}
    assert sum(parameter.numel() for parameter in ours.parameters() if parameter.requires_grad) == lora_count(
        ours.config, config
    )
    assert set(ours.state_dict()) - trained == set(plain.state_dict())


def test_gradients_do_not_depend_on_the_loss_chunk(idx):
    gradients = []
    for chunk in (None, 5):
        _, ours, _ = adapted(ALL)
        torch.manual_seed(1)
        randomize_updates(ours)
        ours.loss(idx, idx.roll(-1, 1), None, chunk).backward()
        gradients.append({name: p.grad for name, p in ours.named_parameters() if p.grad is not None})
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=1e-5, atol=1e-8)
