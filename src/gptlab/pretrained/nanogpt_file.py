"""Reading nanoGPT's ckpt.pt: tensors and plain data, nothing is unpickled."""

from pathlib import Path
from typing import Any

from torch import Tensor

from gptlab.errors import UserError
from gptlab.training.checkpoints.reading import read_plain


def read_nanogpt_checkpoint(path: Path) -> dict[str, Any]:
    """Read a checkpoint of nanoGPT; its tensors stay on disk until they are used. UserError where it is none."""
    checkpoint = read_plain(path)
    if not isinstance(checkpoint, dict) or not _are_tensors(checkpoint.get("model", {})):
        raise UserError(
            f"{path} is not a checkpoint of nanoGPT: it has no model of named tensors. A run of gptlab is named by "
            "its directory."
        )
    return checkpoint


def _are_tensors(state: Any) -> bool:
    tensors = state.items() if isinstance(state, dict) else ()
    return bool(tensors) and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors)
