"""ONNX graph of any gptlab model, with its weights in a separate file."""

import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.exporters.certificate import compare_scores, compare_tensors, version
from gptlab.exporters.reference import Reference
from gptlab.exporters.request import CheckResult, ExportRequest
from gptlab.model.config import GPTConfig
from gptlab.model.external import EMBEDDING, HEAD, unpadded_parameters
from gptlab.model.gpt import GPT
from gptlab.model.modern import meta_gpt

GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"
INPUT, OUTPUT = "input_ids", "logits"
MAX_BATCH_SIZE = 2**16  # upper bound that the tracer requires
RELATIVE = 2e-5  # relative tolerance of the logits: both programs compute in float32


def write(model: GPT, job: ExportRequest, folder: Path) -> None:
    """Traces the model without weights, then writes the weights one at a time to avoid a second copy in memory."""
    import onnx_ir

    tensors = {name: tensor.contiguous() for name, tensor in unpadded_parameters(model).items()}
    if model.config.tie_weights:
        tensors[HEAD] = tensors[EMBEDDING]
    with _quiet_exporter():
        program = trace_model(model)
        for value in program.model.graph.initializers.values():
            value.const_value = None  # has no data, and must not be used for constant folding
        program.optimize()
    graph, end = program.model.graph, 0
    with (folder / WEIGHTS).open("wb") as file:
        for name, value in graph.initializers.items():
            if name in tensors:
                begin, end = end, end + tensors[name].nbytes
                file.write(tensors[name].view(torch.uint8).numpy().data)
                info = {"shape": value.shape, "name": name, "base_dir": str(folder)}
                value.const_value = onnx_ir.ExternalTensor(WEIGHTS, begin, end - begin, onnx_ir.DataType.FLOAT, **info)
    for node in graph.all_nodes():
        node.metadata_props.clear()  # removes source locations, which contain paths of this machine
        node.doc_string = None
    onnx_ir.save(program.model, folder / GRAPH)


def check(job: ExportRequest, folder: Path, reference: Reference) -> CheckResult:
    """Compares the exported model with the reference.

    Compares the exported weights and, if onnxruntime is installed, the logits and greedy continuation of the graph.
    """
    checks = [compare_tensors(_read(folder, job.source.model), reference, version("onnx"))]
    if find_spec("onnxruntime") is None:
        return CheckResult(checks, ["logits and continuation, because onnxruntime is not installed"])
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.disable_prepacking", "1")  # avoids a second copy of the weights
    options.enable_cpu_mem_arena = False
    session = onnxruntime.InferenceSession(folder / GRAPH, options, providers=["CPUExecutionProvider"])

    def score(ids: Tensor) -> Tensor:
        return torch.from_numpy(session.run([OUTPUT], {INPUT: ids.numpy()})[0])

    return CheckResult([*checks, *compare_scores(score, reference, version("onnxruntime"), RELATIVE)], [])


@contextmanager
def _quiet_exporter() -> Iterator[None]:
    """Suppresses the exporter's warnings about a missing torchvision and about missing weights."""
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)


def trace_model(model: GPT) -> Any:
    """Traces the model for any batch size and sequence length, without its weights and its vocabulary padding.

    Returns:
        The ``torch.onnx.ONNXProgram``.
    """
    meta_model = meta_gpt(model.config.model_copy(update={"pad_vocab_to_multiple_of": 1})).eval().requires_grad_(False)
    example = torch.zeros((2, min(8, model.config.block_size)), dtype=torch.long, device="meta")
    batch = torch.export.Dim("batch", min=1, max=MAX_BATCH_SIZE)
    time = torch.export.Dim("time", min=1, max=model.config.block_size)
    return torch.onnx.export(
        meta_model,
        (example,),
        input_names=[INPUT],
        output_names=[OUTPUT],
        dynamic_shapes=({0: batch, 1: time},),
        dynamo=True,
        verbose=False,
        optimize=False,  # would require the weights
    )


def _read(folder: Path, config: GPTConfig) -> Iterator[tuple[str, Tensor]]:
    """Yields the weights with the names of ``to_external``, memory-mapped."""
    import numpy as np
    import onnx

    for tensor in onnx.load(folder / GRAPH, load_external_data=False).graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            entries = {entry.key: entry.value for entry in tensor.external_data}
            data = np.memmap(folder / entries["location"], "<f4", "c", int(entries["offset"]), tuple(tensor.dims))
            name = EMBEDDING if tensor.name == HEAD and config.tie_weights else tensor.name
            yield name if name == HEAD else f"transformer.{name}", torch.from_numpy(data)
