"""Prepares models for inference: dtype, quantization and memory layout of the weights.

Generating a single text multiplies every matrix by one vector, so its speed is limited by the memory bandwidth.

Shapes: (..., in) and (..., out) are the input and the output of a linear layer.
"""

import statistics
import time
from collections.abc import Callable
from itertools import pairwise
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptlab.files import use_private_compile_cache
from gptlab.model.generation.generate import Decoder, NextLogits, plain_decoder
from gptlab.model.generation.kv_cache import CachePosition, KVCache, cache_dtype
from gptlab.model.gpt import GPT, MLP

Precision = Literal["float32", "bfloat16"]
MAX_INT8_ROWS = 32  # with more rows, converting an int8 weight once is cheaper than the int8 kernel
SPLIT_MIN_NUMEL = 2**22  # elements of an int8 weight from which SplitInt8Linear is faster than Int8Linear
BUCKET = 256  # a compiled decoding step attends over a multiple of this number of slots
BYTE_ZERO, HALF_RANGE = 128, 127 * 256  # zero point of a byte; half the range of two bytes, with room to round up
BANDWIDTH_BYTES = 2**28  # larger than the caches of a CPU
CUDA_BANDWIDTH_BYTES = 2**30  # larger than the caches of a GPU, and much longer than the launch of a kernel
CUDA_WARM_UP = 3  # calls that are not timed
BANDWIDTH_REPEATS = 7


class PackedLinear(nn.Module):
    """Linear layer for inference on CPUs, with its weight in oneDNN's packed layout.

    For few rows, it is two to three times as fast as ``torch.nn.functional.linear`` with a plain weight. torch.compile
    uses the same operators when it freezes weights.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.activation, self.algorithm = "none", ""

    def fuse_gelu(self, approximate: str) -> None:
        """Fuses a GELU into the layer; it is applied before the output is rounded to its dtype."""
        self.activation, self.algorithm = "gelu", approximate

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer and the fused activation, if any, to x (..., in); returns (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.activation, [], self.algorithm)


class Int8Linear(nn.Module):
    """Linear layer with a symmetrically quantized 8-bit weight and one scale per output.

    The quantization error of an element is at most half a scale, which is 1/254 of the largest absolute value in its
    row (Dettmers et al. 2022, section 2.1, vector-wise absmax quantization).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor
        self.scale: Tensor
        weight, scale = quantize_int8(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to x (..., in); returns (..., out)."""
        rows = x.reshape(-1, x.size(-1))
        if len(rows) <= MAX_INT8_ROWS:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class SplitInt8Linear(nn.Module):
    """``Int8Linear`` for large weights on CPUs with 8-bit integer instructions, with the precision of bfloat16 inputs.

    The input is rounded to 16 bits, with an error of at most 1/65,024 of the largest absolute value in its row, and
    split into two rows of 8 bits; the weight is read once for both. The multiplications are exact, and their results
    are summed as integers.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = quantize_int8(linear.weight)
        self.weight = torch.ops.onednn.qlinear_prepack(weight, [2, weight.size(1)])
        self.scale, self.zeros = scale / HALF_RANGE, torch.zeros(len(scale), dtype=torch.int32)
        self.bias = torch.zeros(()) if linear.bias is None else linear.bias.detach().float()
        self.origin = torch.tensor(BYTE_ZERO * 257 + 0.5)  # zero point of both bytes; 0.5 because int() truncates

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer to x (..., in); returns (..., out)."""
        rows = x.reshape(-1, x.size(-1))
        largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
        largest.clamp_(min=torch.finfo(torch.float32).tiny)
        split = torch.addcdiv(self.origin, rows, largest, value=HALF_RANGE).int().view(torch.uint8)
        low_high = split.view(len(rows), -1, 4)[:, :, :2].permute(2, 0, 1).flatten(0, 1)  # the low byte comes first
        y = torch.ops.onednn.qlinear_pointwise(
            low_high, 1.0, BYTE_ZERO, self.weight, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        low, high = y.chunk(2)
        y = torch.addcmul(self.bias, torch.add(low, high, alpha=256), largest)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def quantize_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantizes a weight (out, in) to int8; returns it and the scales (out,) by which to multiply its rows."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def prepare_for_inference(model: GPT, precision: Precision, device: torch.device, *, int8: bool, packed: bool) -> GPT:
    """Prepares a model for inference, in place. Quantized and packed weights are no longer parameters.

    Args:
        model: The model.
        precision: Dtype of the weights, the cache and the computation.
        device: Device to which the model is moved.
        int8: Whether to quantize the weights of the linear layers, but not the embeddings, to 8 bits.
        packed: Whether to use oneDNN's packed weight layout where it is supported.
    """
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    model = model.to(device, dtype).eval().requires_grad_(False)
    if int8:
        splits = packed and supports_split_int8(device)
        _replace_linear(model, lambda linear: _int8(linear, split=splits and linear.weight.numel() >= SPLIT_MIN_NUMEL))
    elif packed and supports_packing(dtype, device):
        _replace_linear(model, PackedLinear)
        _fuse_gelu(model)
    return model


def supports_packing(dtype: torch.dtype, device: torch.device) -> bool:
    """Returns whether oneDNN's packed layout supports weights of this dtype on this device."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def supports_split_int8(device: torch.device) -> bool:
    """Returns whether the device has instructions for exact sums of 8-bit integer multiplications (VNNI)."""
    return (
        device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and torch.cpu.get_capabilities().get("avx512_vnni", False)
    )


def build_decoder(model: GPT, *, compiled: bool) -> Decoder:
    """Builds a decoder of ``model``, compiled if ``compiled``.

    On a CPU, there is one graph for every ``BUCKET`` slots of the cache, and compiling packs the weights and freezes
    them into the graph, so they must not change afterwards. On a GPU, there is one graph, which attends over all slots,
    so that every step is the replay of a CUDA graph.
    """
    if not compiled:
        return plain_decoder(model)

    def next_logits(idx: Tensor, cache: KVCache, position: CachePosition) -> Tensor:
        return model.next_logits(idx, cache, position)

    use_private_compile_cache()
    if next(model.parameters()).device.type == "cpu":
        frozen = torch.compile(next_logits, dynamic=False, options={"freezing": True})
        return Decoder(frozen, BUCKET)
    graph = torch.compile(next_logits, dynamic=False, mode="reduce-overhead")
    return static_decoder(graph, model.config.block_size)


def static_decoder(graph: NextLogits, num_slots: int) -> Decoder:
    """Returns a decoder whose steps have the same shapes, strides and cache, as the replay of a CUDA graph requires.

    Args:
        graph: Compiled ``GPT.next_logits``.
        num_slots: Number of slots attended over.
    """

    def replay(idx: Tensor, cache: KVCache, position: CachePosition) -> Tensor:
        cache.mark_static()
        torch.compiler.cudagraph_mark_step_begin()  # the logits of the previous step are overwritten
        return graph(idx.clone(memory_format=torch.contiguous_format), cache, position)

    return Decoder(replay, num_slots)


def bytes_per_token(model: GPT, rows: int, length: int) -> int:
    """Returns the number of bytes that one decoding step reads: all matrices once, and the keys and values of all rows.

    Args:
        model: A model prepared by ``prepare_for_inference``.
        rows: Number of rows.
        length: Number of tokens of each row in the cache.
    """
    config = model.config
    layers = (nn.Linear, PackedLinear, Int8Linear, SplitInt8Linear)
    matrices: list[Tensor] = [part.weight for part in model.modules() if isinstance(part, layers)]
    weights = sum(matrix.numel() * matrix.element_size() for matrix in matrices)
    weight = next(model.parameters())
    dtype = cache_dtype(weight.dtype, weight.device)
    return weights + rows * length * 2 * config.n_layer * config.n_embd * dtype.itemsize


def measure_memory_bandwidth(device: torch.device) -> float:
    """Measures the memory bandwidth of the device in bytes per second, by summing a large tensor with all threads.

    Memory bandwidth bounds the speed at which a single text is generated.
    """
    size = CUDA_BANDWIDTH_BYTES if device.type == "cuda" else BANDWIDTH_BYTES
    numbers = torch.ones(size // 4, dtype=torch.float32, device=device)
    if device.type == "cuda":
        return size / statistics.median(cuda_seconds(numbers.sum, BANDWIDTH_REPEATS))
    seconds = []
    for _ in range(BANDWIDTH_REPEATS + 1):
        start = time.perf_counter()
        numbers.sum()
        seconds.append(time.perf_counter() - start)
    return size / statistics.median(seconds[1:])


def cuda_seconds(function: Callable[[], object], calls: int) -> list[float]:
    """Returns the seconds of several calls of a function on the current GPU, measured by CUDA events after a warm-up.

    The calls are queued without waiting, so that the times do not include the host's, if the kernels are long.
    """
    events = [torch.cuda.Event(enable_timing=True) for _ in range(CUDA_WARM_UP + calls + 1)]
    for event in events[:-1]:
        event.record()
        function()
    events[-1].record()
    torch.cuda.synchronize()
    return [start.elapsed_time(end) / 1e3 for start, end in pairwise(events)][CUDA_WARM_UP:]


def _int8(linear: nn.Linear, *, split: bool) -> nn.Module:
    return SplitInt8Linear(linear) if split else Int8Linear(linear)


def _fuse_gelu(model: nn.Module) -> None:
    """Fuses every GELU into the packed layer before it."""
    for part in model.modules():
        if isinstance(part, MLP) and isinstance(part.c_fc, PackedLinear) and isinstance(part.act, nn.GELU):
            part.c_fc.fuse_gelu(part.act.approximate)
            part.act = nn.Identity()


def _replace_linear(model: nn.Module, new: Callable[[nn.Linear], nn.Module]) -> None:
    """Replaces the linear layers one by one, so that each old weight is freed once the new one is created."""
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Linear):
                setattr(part, name, new(child))
