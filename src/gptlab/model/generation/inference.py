"""Networks that only write: their matrices in the number format and the layout that are read fastest.

A token of one text multiplies every matrix with one vector, so it takes as long as reading the matrices takes. Shapes:
(..., in) and (..., out) of a linear layer.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptlab.model.generation.generate import Decoder, plain_decoder
from gptlab.model.generation.kv_cache import KVCache, Place, cache_type
from gptlab.model.gpt import GPT, MLP

Precision = Literal["float32", "bfloat16"]
FEW_ROWS = 32  # up to so many, int8 weights are read as they are; for more, turning them into numbers once is cheaper
LARGE = 2**22  # int8 weights from which splitting what they are multiplied with costs less than it saves
BUCKET = 256  # slots: a compiled step looks at a multiple of it
MIDDLE, HALF_RANGE = 128, 127 * 256  # of a byte; of two, so that both parts fit whatever is rounded up


class PackedLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN reads it best: on CPUs alone, for inference alone.

    torch's own ``linear`` reads a plain weight at a third to half of that speed when there are few rows. These are the
    operators that torch.compile puts in its place where it freezes weights.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = None if linear.bias is None else linear.bias.detach()
        self.activation, self.algorithm = "none", ""

    def with_gelu(self, approximate: str) -> None:
        """Apply GELU to what comes out, before it is rounded to the number format."""
        self.activation, self.algorithm = "gelu", approximate

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., in), add the bias and apply the activation if there is one; (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, self.activation, [], self.algorithm)


class Int8Linear(nn.Module):
    """A linear layer whose weight is rounded to 8 bits, with a scale for every output (symmetric).

    The weight is off by at most half a scale, 1/254 of the largest of its row (Dettmers et al. 2022, section 2.1,
    absmax by vector).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight: Tensor
        self.scale: Tensor
        weight, scale = rounded(linear.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., in) and add the bias; (..., out)."""
        rows = x.reshape(-1, x.size(-1))
        if len(rows) <= FEW_ROWS:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        y = y.view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class SplitInt8Linear(nn.Module):
    """``Int8Linear`` for large weights on CPUs that multiply 8-bit integers, with the numbers as precise as bfloat16's.

    What comes in is rounded to 16 bits, 1/65,024 of the largest of its row at most off, and these are split into two
    rows of 8 bits; the weight is read once for both. The products are exact, and added up as integers.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight, scale = rounded(linear.weight)
        self.weight = torch.ops.onednn.qlinear_prepack(weight, [2, weight.size(1)])
        self.scale, self.zeros = scale / HALF_RANGE, torch.zeros(len(scale), dtype=torch.int32)
        self.bias = torch.zeros(()) if linear.bias is None else linear.bias.detach().float()
        self.origin = torch.tensor(MIDDLE * 257 + 0.5)  # 0 in both bytes, and a half since int() cuts off

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., in) and add the bias; (..., out)."""
        rows = x.reshape(-1, x.size(-1))
        largest = torch.linalg.vector_norm(rows, torch.inf, dim=1, keepdim=True, dtype=torch.float32)
        largest.clamp_(min=torch.finfo(torch.float32).tiny)
        split = torch.addcdiv(self.origin, rows, largest, value=HALF_RANGE).int().view(torch.uint8)
        low_high = split.view(len(rows), -1, 4)[:, :, :2].permute(2, 0, 1).flatten(0, 1)  # the least byte comes first
        y = torch.ops.onednn.qlinear_pointwise(
            low_high, 1.0, MIDDLE, self.weight, self.scale, self.zeros, None, 1.0, 0, torch.float32, "none", [], ""
        )
        low, high = y.chunk(2)
        y = torch.addcmul(self.bias, torch.add(low, high, alpha=256), largest)
        return y.to(x.dtype).view(*x.shape[:-1], -1)


def rounded(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round a weight (out, in) to 8 bits; return it with the scale (out,) that it is to be multiplied with."""
    weight = weight.detach().float()
    scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
    return (weight / scale[:, None]).round().to(torch.int8), scale


def for_inference(model: GPT, precision: Precision, device: torch.device, *, int8: bool, packed: bool) -> GPT:
    """Turn a network into one that only writes, in place; its linear layers are then no parameters any more.

    Args:
        model: To be turned.
        precision: Of the weights, the cache and the computation.
        device: Where it is to be.
        int8: Round the weights of the linear layers to 8 bits; embeddings stay.
        packed: Lay weights out as the CPU reads them best, where there is such a layout.
    """
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    model = model.to(device, dtype).eval().requires_grad_(False)
    if int8:
        splits = packed and can_split(device)
        _replace_linear(model, lambda linear: _int8(linear, split=splits and linear.weight.numel() >= LARGE))
    elif packed and can_pack(dtype, device):
        _replace_linear(model, PackedLinear)
        _fuse_gelu(model)
    return model


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a layout for weights of this kind that is read faster."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def can_split(device: torch.device) -> bool:
    """Whether the device adds up products of 8-bit integers without losing any (VNNI)."""
    return device.type == "cpu" and torch.backends.mkldnn.is_available() and torch.cpu._is_vnni_supported()


def decoder(model: GPT, *, compiled: bool) -> Decoder:
    """Score tokens with ``model``, or with its graph, compiled once for every ``BUCKET`` slots of the cache.

    On a CPU the weights are frozen into the graph, so that they are packed there, and must not change.
    """
    if not compiled:
        return plain_decoder(model)

    def score(idx: Tensor, cache: KVCache, place: Place) -> Tensor:
        return model.next_logits(idx, cache, place)

    on_cpu = next(model.parameters()).device.type == "cpu"
    options = {"freezing": True} if on_cpu else None
    return Decoder(torch.compile(score, dynamic=False, options=options), BUCKET)  # type: ignore[arg-type]


def bytes_per_token(model: GPT, rows: int, length: int) -> int:
    """Bytes that scoring one token of each row reads: all matrices once, and the rows' keys and values.

    Args:
        model: Prepared by ``for_inference``.
        rows: That are scored at once.
        length: Tokens of each that the cache has.
    """
    config = model.config
    layers = (nn.Linear, PackedLinear, Int8Linear, SplitInt8Linear)
    matrices: list[Tensor] = [part.weight for part in model.modules() if isinstance(part, layers)]
    weights = sum(matrix.numel() * matrix.element_size() for matrix in matrices)
    kept = cache_type(model.wte.weight.dtype, model.wte.weight.device)
    return weights + rows * length * 2 * config.n_layer * config.n_embd * kept.itemsize


def _int8(linear: nn.Linear, *, split: bool) -> nn.Module:
    return SplitInt8Linear(linear) if split else Int8Linear(linear)


def _fuse_gelu(model: nn.Module) -> None:
    """Let the layers before a GELU apply it."""
    for part in model.modules():
        if isinstance(part, MLP) and isinstance(part.c_fc, PackedLinear) and isinstance(part.act, nn.GELU):
            part.c_fc.with_gelu(part.act.approximate)
            part.act = nn.Identity()


def _replace_linear(model: nn.Module, new: Callable[[nn.Linear], nn.Module]) -> None:
    """Put other layers in the place of the linear ones; each weight goes as soon as its successor is there."""
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Linear):
                setattr(part, name, new(child))
