"""The interface of torch's ParallelStyle."""

from types import SimpleNamespace

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from gptlab.training.distributed.tensor_parallel import ReplicatedLayer


def test_parallelize_module_calls_apply_with_the_layer_and_the_mesh(monkeypatch):
    assert ParallelStyle.__abstractmethods__ == {"_apply"}
    calls = []
    monkeypatch.setattr(ReplicatedLayer, "_apply", lambda self, *arguments: calls.append(arguments))
    layer, mesh = nn.Linear(2, 2), SimpleNamespace(ndim=1)
    parallelize_module(layer, mesh, ReplicatedLayer())
    assert calls == [(layer, mesh)]
