"""Low-rank adaptation (Hu et al. 2022, LoRA, section 4.1): W + (alpha / r) B A, where only A and B are trained.

A layer keeps its weight and bias under their own names, and has lora_A (r, in) and lora_B (out, r) beside them.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptlab.model.config import LoRAConfig
from gptlab.model.gpt import GPT

DOWN, UP = "lora_A", "lora_B"


class LoRALinear(nn.Linear):
    """A linear layer that is frozen, and what is learnt beside it; it begins as the layer that it was.

    Args:
        linear: Whose weight and bias it keeps.
        config: The rank r and alpha.
    """

    def __init__(self, linear: nn.Linear, config: LoRAConfig) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.scale = config.alpha / config.rank
        self.lora_A = nn.Parameter(linear.weight.new_empty(config.rank, linear.in_features))
        self.lora_B = nn.Parameter(linear.weight.new_zeros(linear.out_features, config.rank))
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))  # what nn.Linear begins with

    def forward(self, x: Tensor) -> Tensor:
        """Multiply (..., in), add the bias and what was learnt; (..., out)."""
        return super().forward(x) + self.scale * F.linear(F.linear(x, self.lora_A), self.lora_B)


def adapt(model: GPT, config: LoRAConfig) -> None:
    """Freeze a network, and put LoRA layers in the place of the ``config.targets`` of every block."""
    model.requires_grad_(False)
    for block in model.h:
        for target in config.targets:
            part, _, name = target.partition(".")
            parent = block.get_submodule(part)
            setattr(parent, name, LoRALinear(parent.get_submodule(name), config))  # type: ignore[arg-type]


@torch.no_grad()
def merged(state: dict[str, Tensor], config: LoRAConfig) -> dict[str, Tensor]:
    """Add what was learnt to the weights: of an adapted network's parameters make those of a plain one."""
    plain = {name: tensor for name, tensor in state.items() if not name.endswith((f".{DOWN}", f".{UP}"))}
    for name in [name.removesuffix(f".{DOWN}") for name in state if name.endswith(f".{DOWN}")]:
        down, up = state[f"{name}.{DOWN}"].double(), state[f"{name}.{UP}"].double()
        weight = plain[f"{name}.weight"]
        plain[f"{name}.weight"] = (weight.double() + config.alpha / config.rank * (up @ down)).to(weight.dtype)
    return plain
