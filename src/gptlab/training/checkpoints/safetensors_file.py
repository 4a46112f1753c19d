"""Writes safetensors files."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Names of the dtypes in a header (huggingface/safetensors, README, "Format")
SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def write_safetensors(tensors: Mapping[str, Tensor], stored: Mapping[str, torch.dtype], path: Path) -> None:
    """Writes a safetensors file with only one tensor in memory at a time.

    The safetensors library needs all tensors on the CPU, refuses tied weights, and does not raise OSError if the disk
    is full. Layout (huggingface/safetensors, README, "Format"): the length of the header in 8 bytes, the header as JSON
    with the dtype, shape and offsets of each tensor, and the tensors.

    Args:
        tensors: Tensors by name, on any device.
        stored: dtype of each tensor in the file.
        path: Path of the file.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, tensor in tensors.items():
        begin, end = end, end + tensor.numel() * stored[name].itemsize
        offsets = [begin, end]
        header[name] = {"dtype": SAFETENSORS[stored[name]], "shape": list(tensor.shape), "data_offsets": offsets}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, tensor in tensors.items():
            values = tensor.detach().cpu().to(stored[name]).contiguous()
            file.write(values.view(-1).view(torch.uint8).numpy().data)
