"""What is compiled, counted by a backend that compiles nothing."""

from functools import partial

import pytest
import torch

from conftest import tiny_config
from gptlab.model.gpt import GPT
from gptlab.training.distributed.strategies import compile_in_place

SHAPES = 11  # more than torch compiles a function for by itself


@pytest.mark.parametrize("what", ["whole", "blocks"])
def test_every_shape_of_growing_batches_is_compiled_for_itself(what, monkeypatch):
    graphs = []

    def backend(graph, inputs):
        graphs.append([size for tensor in inputs for size in (tensor.shape if hasattr(tensor, "shape") else [tensor])])
        return graph.forward

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    torch.manual_seed(0)
    model, plain = GPT(tiny_config()), GPT(tiny_config())
    plain.load_state_dict(model.state_dict())
    compile_in_place(model, what, "default", shapes=SHAPES)
    for batch in (*range(1, SHAPES + 1), *range(1, SHAPES + 1)):
        idx = torch.randint(61, (batch, 16))
        found, expected = (one.loss(idx, idx, None, None) for one in (model, plain))
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    blocks = len(model.h) if what == "blocks" else 1
    assert SHAPES <= len(graphs) <= SHAPES * blocks
    assert all(type(size) is int for sizes in graphs for size in sizes)  # none is a symbol
    torch._dynamo.reset()
