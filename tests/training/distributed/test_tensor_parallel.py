"""What torch asks of a layer's style."""

from types import SimpleNamespace

from torch import nn
from torch.distributed.tensor.parallel import ParallelStyle, parallelize_module

from gptlab.training.distributed.tensor_parallel import ReplicatedLayer


def test_a_style_has_one_method_which_torch_calls_with_the_layer_and_the_mesh(monkeypatch):
    assert ParallelStyle.__abstractmethods__ == {"_apply"}
    called = []
    monkeypatch.setattr(ReplicatedLayer, "_apply", lambda self, *arguments: called.append(arguments))
    layer, mesh = nn.Linear(2, 2), SimpleNamespace(ndim=1)
    parallelize_module(layer, mesh, ReplicatedLayer())
    assert called == [(layer, mesh)]
