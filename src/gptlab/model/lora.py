"""Low-rank adaptation (Hu et al. 2022, LoRA, section 4.1): W + (alpha / r) B A, where only A and B are trained.

An adapted layer keeps the names of its weight and bias, and has the additional parameters lora_A (r, in) and lora_B
(out, r).
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptlab.model.config import LoRAConfig
from gptlab.model.gpt import GPT

LORA_A, LORA_B = "lora_A", "lora_B"


class LoRALinear(nn.Linear):
    """Frozen linear layer with a trained low-rank update, which is initialized to zero.

    Args:
        linear: Layer whose weight and bias are used.
        config: Rank r and alpha.
    """

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = config.alpha / config.rank
        self.lora_A = nn.Parameter(linear.weight.new_empty(config.rank, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # as in nn.Linear

    def forward(self, x: Tensor) -> Tensor:
        """Applies the layer and its low-rank update to x (..., in); returns (..., out)."""
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def add_lora(model: GPT, config: LoRAConfig) -> None:
    """Freezes a model and replaces the ``config.targets`` of every block with LoRA layers."""
    model.requires_grad_(False)
    for block in model.h:
        for target in config.targets:
            part, _, name = target.partition(".")
            parent = block.get_submodule(part)
            setattr(parent, name, LoRALinear(parent.get_submodule(name), config))  # type: ignore[arg-type]


@torch.no_grad()
def merge_lora(state: dict[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """Merges the low-rank updates into the weights; returns the parameters of a model without LoRA layers."""
    plain = {name: tensor for name, tensor in state.items() if not name.endswith((f".{LORA_A}", f".{LORA_B}"))}
    for name in [name.removesuffix(f".{LORA_A}") for name in state if name.endswith(f".{LORA_A}")]:
        down, up = state[f"{name}.{LORA_A}"].double(), state[f"{name}.{LORA_B}"].double()
        weight = plain[f"{name}.weight"]
        plain[f"{name}.weight"] = (weight.double() + config.alpha / config.rank * (up @ down)).to(weight.dtype)
    return plain
