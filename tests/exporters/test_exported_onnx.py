"""ONNX graphs of models with all options, run with onnxruntime."""

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from exports import export, random_model
from gptlab.exporters.onnx import trace_model

ALL = {
    **{"positions": "rotary", "norm": "rms", "qk_norm": True, "embedding_norm": True, "bias": False},
    **{"value_residual": True, "value_embeddings": 1, "x0_skips": True, "unet_skips": True, "logit_soft_cap": 15.0},
    **{"attention_window": 4, "global_every": 2, "activation": "relu_squared"},
    "pad_vocab_to_multiple_of": 64,
}


UNTIED = pytest.param({"tie_weights": False, "pad_vocab_to_multiple_of": 64}, marks=pytest.mark.slow, id="untied")


@pytest.mark.slow
@pytest.mark.parametrize("changes", [pytest.param(ALL, id="everything"), UNTIED])
def test_onnxruntime_gives_the_same_logits_for_any_shape(tmp_path, monkeypatch, changes):
    model = random_model(**changes, block_size=300)  # short sequences use another code path
    export(monkeypatch, tmp_path / "out", model, "onnx")
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx", providers=["CPUExecutionProvider"])
    (graph_input,), (graph_output,) = session.get_inputs(), session.get_outputs()
    assert (graph_input.name, graph_input.shape, graph_output.name) == ("input_ids", ["batch", "time"], "logits")
    for shape in ((1, 1), (2, 5), (2, 300)):
        idx = torch.randint(61, shape, generator=torch.Generator().manual_seed(1))
        (logits,) = session.run(["logits"], {"input_ids": idx.numpy()})
        np.testing.assert_allclose(logits, model(idx).numpy(), atol=1e-5, rtol=0)
    content = (tmp_path / "out" / "model.onnx").read_bytes()
    assert str(tmp_path).encode() not in content
    assert b".py" not in content  # no source locations
    weights = {tensor.name for tensor in onnx.load_model_from_string(content).graph.initializer}
    assert weights >= {name for name, _ in model.named_parameters()} - {"wte.weight"}


@pytest.mark.slow
def test_graph_is_traced_for_all_sequence_lengths():
    time, batch = sorted(
        map(str, trace_model(random_model(block_size=300)).exported_program.range_constraints.values())
    )
    assert (batch, time) == ("VR[1, 65536]", "VR[1, 300]")
