"""Optimizers and their parameter groups."""

from typing import Any

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from gptlab.training.config import AdamWConfig


def build_optimizer(model: nn.Module, config: AdamWConfig, *, fused: bool) -> Optimizer:
    """Build AdamW over the decay groups of ``model``."""
    groups = decay_groups(model, config.weight_decay)
    return AdamW(groups, lr=config.lr, betas=config.betas, eps=config.eps, fused=fused)


def skip_where_bad(optimizer: Optimizer, bad: Tensor) -> None:
    """Let the step that follows change nothing, neither weights nor moments nor its count, where ``bad`` () is 1.

    Fused kernels read it on the device, as they do for torch.amp.GradScaler; for the others the host waits for it.
    """
    if all(group["fused"] for group in optimizer.param_groups):
        optimizer.found_inf = bad  # type: ignore[attr-defined]
    elif bad:
        optimizer.zero_grad()  # what has no gradient is left alone


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters as GPT-2 does: matrices and embeddings decay, biases and LayerNorms do not.

    A tied parameter appears once.
    """
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def with_names(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Name the parameters of an optimizer's state, which numbers them in the order of its groups."""
    return _relabelled(state, dict(enumerate(_in_order(model))))


def with_numbers(state: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Undo ``with_names``."""
    return _relabelled(state, {name: number for number, name in enumerate(_in_order(model))})


def _in_order(model: nn.Module) -> list[str]:
    """Names of the parameters, as the optimizer has them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in decay_groups(model, 0.0) for parameter in group["params"]]


def _relabelled(state: dict[str, Any], labels: dict[Any, Any]) -> dict[str, Any]:
    """Call the parameters of an optimizer's state otherwise; those that are called so already stay."""
    return {
        "state": {labels.get(label, label): moments for label, moments in state["state"].items()},
        "param_groups": [
            group | {"params": [labels.get(label, label) for label in group["params"]]}
            for group in state["param_groups"]
        ],
    }
