"""Graphs, graph breaks and recompilations of torch.compile, counted by a backend that compiles nothing."""

from functools import partial

import pytest
import torch

from conftest import tiny_config
from gptlab.model import gpt as gpt_module
from gptlab.model import loss as loss_module
from gptlab.model.attention import attention_mask
from gptlab.model.gpt import GPT
from gptlab.model.kernels import compiled_function
from gptlab.model.loss import LogitSettings, lm_loss, token_losses
from gptlab.model.modern import build_gpt
from gptlab.training.distributed.strategies import compile_in_place

SHAPES = 11  # more than torch's default recompile limit


@pytest.mark.slow
@pytest.mark.parametrize("target", ["whole", "blocks"])
def test_every_batch_size_is_compiled_separately(target, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append([size for tensor in inputs for size in (tensor.shape if hasattr(tensor, "shape") else [tensor])])
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.manual_seed(0)
    model, plain = GPT(tiny_config()), GPT(tiny_config())
    plain.load_state_dict(model.state_dict())
    compile_in_place(model, target, "default", shapes=SHAPES)
    for batch in (*range(1, SHAPES + 1), *range(1, SHAPES + 1)):
        idx = torch.randint(61, (batch, 16))
        found, expected = (one.loss(idx, idx, None, None) for one in (model, plain))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    blocks = len(model.h) if target == "blocks" else 1
    assert SHAPES <= len(graphs) <= SHAPES * blocks
    assert all(type(size) is int for sizes in graphs for size in sizes)  # no symbolic sizes
    torch._dynamo.reset()


class Counter:
    """Backend of torch.compile that counts graphs and compiles nothing."""

    def __init__(self) -> None:
        self.graphs = 0

    def __call__(self, graph, inputs):
        self.graphs += 1
        return graph.forward


@pytest.fixture
def graphs(monkeypatch):
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    counter = Counter()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=counter))
    yield counter
    torch._dynamo.reset()


def breaks() -> int:
    return sum(torch._dynamo.utils.counters["graph_break"].values())


OPTIONS = {
    "GPT-2": {},
    "modern": {"positions": "rotary", "norm": "rms", "qk_norm": True, "value_residual": True, "logit_soft_cap": 15.0},
}


@pytest.mark.parametrize("options", OPTIONS)
def test_the_loss_is_one_graph_and_chunks_add_one_break(graphs, options):
    model = build_gpt(tiny_config(**OPTIONS[options]))
    compile_in_place(model, "whole", "default", shapes=1)
    idx = torch.randint(61, (3, 16))
    for score in (model.loss, model.token_losses):
        for chunk, has_break in ((None, False), (20, True)):
            torch._dynamo.utils.counters.clear()
            before = graphs.graphs
            score(idx, idx, None, chunk)
            assert (breaks() > 0) == has_break
            assert graphs.graphs - before <= 1 + has_break  # the loop over chunks is not unrolled


@pytest.mark.slow
@pytest.mark.parametrize("documents", [False, True], ids=["causal", "documents"])
@pytest.mark.parametrize("flex", [False, True])
def test_twelve_steps_of_growing_batches_compile_once_per_shape(graphs, monkeypatch, documents, flex):
    build = gpt_module.build_attention_context
    monkeypatch.setattr(gpt_module, "build_attention_context", lambda *args, **_: build(*args, flex=flex))
    model = build_gpt(tiny_config(attention_window=8, global_every=2))
    compile_in_place(model, "whole", "default", shapes=2)
    optimizer = torch.optim.AdamW(model.parameters())
    compiled = []
    for step in range(12):
        batch = 2 if step < 4 else 4
        idx = torch.randint(61, (batch, 16))
        where = (torch.rand(batch, 16) < 0.2).long().cumsum(1) if documents else None
        with torch.set_grad_enabled(not flex):  # FlexAttention has no backward pass on a CPU
            loss = model.loss(idx, idx, where, None)
        if not flex:
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        if step in (2, 6, 10):
            model.eval()
            with torch.inference_mode():
                model.token_losses(idx, idx, where, None)
            model.train()
        compiled.append(graphs.graphs)
    assert compiled[0] > 0
    assert compiled[2] == compiled[3]
    assert compiled[4] == 2 * compiled[0] + (compiled[2] - compiled[0])  # the graphs of the larger batch
    assert compiled[6:] == [compiled[6]] * 6
    assert compiled[6] == 2 * compiled[2]


def test_compiled_chunks_have_the_loss_and_gradients_of_all_tokens(graphs, monkeypatch):
    monkeypatch.setattr(loss_module, "_compiles_chunks", lambda x: True)
    compiled_function.cache_clear()
    settings = LogitSettings(61, 5.0)
    x, weight = torch.randn(100, 8, dtype=torch.float64), torch.randn(64, 8, dtype=torch.float64)
    targets = torch.randint(61, (100,)).index_fill_(0, torch.arange(7), -100)
    found = []
    for chunk in (None, 30):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight)]
        loss = lm_loss(*leaves, targets, settings, chunk)
        loss.backward()
        with torch.no_grad():
            losses = token_losses(x, weight, targets, settings, chunk)
        found.append([loss.detach(), losses, *(leaf.grad for leaf in leaves)])
    assert graphs.graphs == 4  # the loss and the losses per token, for 30 tokens and for the last 10
    for plain, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, plain, atol=1e-6, rtol=1e-6)  # the loss itself is in float32
    compiled_function.cache_clear()


def test_block_masks_without_documents_are_built_once():
    idx = torch.zeros(2, 300, dtype=torch.long)
    with torch.inference_mode():
        first = attention_mask(idx, None, 48, flex=True)
    assert attention_mask(idx + 1, None, 48, flex=True) is first
    assert not first.kv_indices.is_inference()
    assert attention_mask(idx, None, 47, flex=True) is not first


@pytest.mark.parametrize("options", OPTIONS)
def test_attention_has_one_dtype_with_autocast(monkeypatch, options):
    """rms_norm is made to return float32, as with autocast on CUDA since torch 2.12."""
    found = []

    def record(q, k, v, mask, dropout):
        found.append((q.dtype, k.dtype, v.dtype))
        return v

    monkeypatch.setattr("gptlab.model.attention.attend", record)
    rms_norm = torch.nn.functional.rms_norm
    monkeypatch.setattr(torch.nn.functional, "rms_norm", lambda *args, **named: rms_norm(*args, **named).float())
    model = build_gpt(tiny_config(**OPTIONS[options]))
    idx = torch.randint(61, (2, 16))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.hidden_states(idx, model.attention_context(idx, None)).dtype == torch.float32
        assert model.loss(idx, idx, None, None).dtype == torch.float32
    assert set(found) == {(torch.bfloat16,) * 3}


@pytest.mark.parametrize(("mode", "graphs"), [("default", False), ("reduce-overhead", True)])
def test_kernels_of_deterministic_code_are_not_chosen_by_their_speed(mode, graphs, monkeypatch):
    given = []
    monkeypatch.setattr(torch, "compile", lambda function, **options: given.append(options) or function)
    torch.use_deterministic_algorithms(True)
    try:
        compile_in_place(GPT(tiny_config()), "whole", mode, shapes=1)
    finally:
        torch.use_deterministic_algorithms(False)
    options = {"options": {"deterministic": True, "triton.cudagraphs": graphs}}
    assert given == [options] * 2
    monkeypatch.undo()
    torch.compile(torch.sin, **options)  # raises if an option does not exist
