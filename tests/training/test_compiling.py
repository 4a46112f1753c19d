"""Compilation of several input shapes, counted by a backend that compiles nothing."""

from functools import partial

import pytest
import torch

from conftest import tiny_config
from gptlab.model.gpt import GPT
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
