"""Forecast of activations, against the bytes of the tensors that autograd saves."""

from contextlib import nullcontext

import pytest
import torch

from conftest import tiny_config
from gptlab.model import kernels
from gptlab.model.config import LoRAConfig
from gptlab.model.lora import add_lora
from gptlab.model.modern import build_gpt
from gptlab.planning.activations import (
    DTYPE_SIZES,
    SHORT_SEQUENCE,
    ForwardPass,
    backbone_bytes,
    block_bytes,
    block_kinds,
    head_bytes,
    weight_copy_bytes,
)

WIDE = {"n_embd": 64, "n_head": 4, "n_layer": 3, "vocab_size": 97}
MODERN = {  # conf/model/gpt2_modern.yaml
    **{"block_size": 300, "n_layer": 4, "bias": False, "activation": "relu_squared", "norm": "rms"},
    **{"positions": "rotary_half", "qk_norm": True, "embedding_norm": True, "logit_soft_cap": 15},
    **{"value_residual": True, "x0_skips": True, "unet_skips": True, "tie_weights": False},
}


def saved_bytes(config, batch: int, precision: str, chunk: int | None, lora: LoRAConfig | None) -> tuple[int, int]:
    """Returns the bytes that autograd saves for a training loss: of activations, and of copies of weights."""
    torch.manual_seed(0)
    model = build_gpt(config)
    if lora is not None:
        add_lora(model, lora)
    if precision == "bf16-true":
        model = model.bfloat16()
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    shapes = {tuple(p.shape) for p in model.parameters() if p.dim() == 2}
    shapes |= {shape[::-1] for shape in shapes}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        if (address := tensor.untyped_storage().data_ptr()) not in own:
            kept[address] = tensor
        return tensor

    idx = torch.randint(config.vocab_size, (batch, config.block_size))
    targets = idx.roll(-1, 1).contiguous()
    mixed = torch.autocast("cpu", torch.bfloat16) if precision == "bf16-mixed" else nullcontext()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), mixed:
        model.loss(idx, targets, None, chunk)
    copies = [
        tensor.nbytes
        for tensor in kept.values()
        if precision == "bf16-mixed" and tensor.dtype == torch.bfloat16 and tuple(tensor.shape) in shapes
    ]
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values()) - sum(copies), sum(copies)


@pytest.mark.parametrize("precision", DTYPE_SIZES)
@pytest.mark.parametrize(
    ("changes", "chunk"),
    [
        pytest.param({}, None, id="short"),
        pytest.param({"block_size": 300}, None, id="long"),
        pytest.param({"block_size": 300, "bias": False, "activation": "gelu"}, 100, id="chunks"),
        pytest.param({"block_size": 300, "activation": "relu_squared", "tie_weights": False}, None, id="relu"),
        pytest.param({"block_size": 300, "activation_checkpointing": True}, 100, id="checkpointed"),
        pytest.param({"norm": "rms", "positions": "rotary", "qk_norm": True}, None, id="short, rotary"),
        pytest.param({"block_size": 300, "positions": "rotary_half", "bias": False}, None, id="long, rotary"),
        pytest.param({"dropout": 0.1}, None, id="short, dropout"),
        pytest.param({"block_size": 300, "dropout": 0.1}, None, id="long, dropout"),
        pytest.param({"block_size": 300, "attention_window": 64}, None, id="window"),
        pytest.param({"value_embeddings": 1, "block_size": 128}, None, id="short, value embeddings"),
        pytest.param({"value_residual": True, "block_size": 128}, None, id="short, value residual"),
        pytest.param({"block_size": 300, "value_embeddings": 1, "value_residual": True}, None, id="values"),
        pytest.param({"block_size": 300, "x0_skips": True, "unet_skips": True, "n_layer": 4}, None, id="skips"),
        pytest.param(MODERN, None, id="modern"),
        pytest.param(MODERN | {"value_embeddings": 2, "attention_window": 64}, 100, id="modern, chunks"),
        pytest.param(MODERN | {"block_size": 128, "dropout": 0.1}, None, id="short, modern, dropout"),
    ],
)
@pytest.mark.parametrize(
    "targets",
    [None, ["attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"], ["attn.c_proj"], ["mlp.c_fc"], ["mlp.c_proj"]],
    ids=["trained", "lora", "lora c_proj", "lora c_fc", "lora mlp"],
)
def test_forecast_activations_are_those_that_autograd_saves(precision, changes, chunk, targets):
    config = tiny_config(**WIDE | changes)
    lora = targets and LoRAConfig(rank=2, alpha=1.0, targets=targets)
    forward = ForwardPass(config, 3, DTYPE_SIZES[precision], on_gpu=False, lora=lora)
    activations, copies = saved_bytes(config, 3, precision, chunk, lora)
    assert backbone_bytes(forward) + head_bytes(forward, chunk) == pytest.approx(activations, rel=0.01)
    if not config.activation_checkpointing:
        assert weight_copy_bytes(forward, chunk) == copies


@pytest.mark.parametrize("n_layer", [1, 2, 11])
@pytest.mark.parametrize("lora", [None, LoRAConfig(rank=2, alpha=1.0, targets=["mlp.c_fc"])], ids=["trained", "lora"])
@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"attention_window": 64, "global_every": 3},
        {"value_residual": True},
        {"value_embeddings": 1, "attention_window": 64},
    ],
    ids=str,
)
def test_blocks_of_each_kind_save_as_much_as_all_blocks(n_layer, lora, changes):
    changes = changes | ({"value_embeddings": 0} if n_layer < 2 else {})
    config = tiny_config(**WIDE | {"block_size": 300} | changes | {"n_layer": n_layer})
    forward = ForwardPass(config, 3, DTYPE_SIZES["32-true"], on_gpu=False, lora=lora)
    kinds = block_kinds(config)
    assert sum(count for _, count in kinds) == n_layer
    assert sum(count * block_bytes(forward, layer) for layer, count in kinds) == sum(
        block_bytes(forward, layer) for layer in range(n_layer)
    )


def test_short_sequence_limit_equals_that_of_the_kernels():
    assert SHORT_SEQUENCE == kernels.SHORT_SEQUENCE
