"""Networks that only write: their matrices in the number format and the layout that are read fastest.

A token of one text multiplies every matrix with one vector, so it takes as long as reading the matrices takes. Shapes:
(..., in) and (..., out) of a linear layer.
"""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptlab.model.cache import KVCache, Place, cache_type
from gptlab.model.generate import Decoder, plain_decoder
from gptlab.model.gpt import GPT

Precision = Literal["float32", "bfloat16"]
FEW_ROWS = 32  # up to so many, int8 weights are read as they are; for more, turning them into numbers once is cheaper
BUCKET = 256  # slots: a compiled step looks at a multiple of it


class PackedLinear(nn.Module):
    """A linear layer whose weight lies as oneDNN reads it best: on CPUs alone, for inference alone.

    torch's own ``linear`` reads a plain weight at a third to half of that speed when there are few rows. These are the
    operators that torch.compile puts in its place where it freezes weights.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.weight = torch.ops.mkldnn._reorder_linear_weight(linear.weight.detach(), 1)
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., in) and add the bias; (..., out)."""
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class Int8Linear(nn.Module):
    """A linear layer whose weight is rounded to 8 bits, with a scale for every output (symmetric).

    The weight is off by at most half a scale, 1/254 of the largest of its row (Dettmers et al. 2022, section 2.1,
    absmax by vector).
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        weight = linear.weight.detach().float()
        self.weight: Tensor
        self.scale: Tensor
        scale = weight.abs().amax(dim=1).clamp(min=torch.finfo(torch.float32).tiny) / 127
        self.register_buffer("weight", (weight / scale[:, None]).round().to(torch.int8))
        self.register_buffer("scale", scale.to(linear.weight.dtype))
        self.bias = None if linear.bias is None else linear.bias.detach()

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., in) and add the bias; (..., out)."""
        rows = x.flatten(0, -2)
        if len(rows) <= FEW_ROWS:
            y = torch._weight_int8pack_mm(rows, self.weight, self.scale)
        else:
            y = F.linear(rows, self.weight.to(x.dtype)) * self.scale
        y = y.unflatten(0, x.shape[:-1])
        return y if self.bias is None else y + self.bias


def for_inference(model: GPT, precision: Precision, device: torch.device, *, int8: bool, packed: bool) -> GPT:
    """Turn a network into one that only writes, in place; its linear layers are then no parameters any more.

    Args:
        model: To be turned.
        precision: Of the weights, the cache and the computation.
        device: Where it is to be.
        int8: Round the weights of the linear layers to 8 bits; embeddings stay.
        packed: Lay the others out as the CPU reads them best, where there is such a layout.
    """
    dtype = torch.float32 if precision == "float32" else torch.bfloat16
    model = model.to(device, dtype).eval().requires_grad_(False)
    if int8:
        _replace_linear(model, Int8Linear)
    elif packed and can_pack(dtype, device):
        _replace_linear(model, PackedLinear)
    return model


def can_pack(dtype: torch.dtype, device: torch.device) -> bool:
    """Whether there is a layout for weights of this kind that is read faster."""
    if device.type != "cpu" or not torch.backends.mkldnn.is_available():
        return False
    return dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported()


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
    layers = (nn.Linear, PackedLinear, Int8Linear)
    matrices: list[Tensor] = [part.weight for part in model.modules() if isinstance(part, layers)]
    weights = sum(matrix.numel() * matrix.element_size() for matrix in matrices)
    kept = cache_type(model.wte.weight.dtype, model.wte.weight.device)
    return weights + rows * length * 2 * config.n_layer * config.n_embd * kept.itemsize


def _replace_linear(model: nn.Module, new: Callable[[nn.Linear], nn.Module]) -> None:
    """Put other layers in the place of the linear ones; each weight goes as soon as its successor is there."""
    for part in list(model.modules()):
        for name, child in list(part.named_children()):
            if isinstance(child, nn.Linear):
                setattr(part, name, new(child))
