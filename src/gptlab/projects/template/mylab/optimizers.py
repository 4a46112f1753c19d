"""Optimizers: any ``torch.optim.Optimizer``."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.optim import Optimizer


class Lion(Optimizer):
    """Lion (Chen et al. 2023, algorithm 2). Each step changes every weight by ``lr``, apart from weight decay.

    Args:
        params: Parameter groups, from gptlab.
        lr: Learning rate.
        betas: Decay rates of the momentum, for the update and for the state.
        weight_decay: Decoupled weight decay.
    """

    def __init__(
        self, params: Iterable[dict[str, Any]], lr: float, betas: tuple[float, float], weight_decay: float
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the parameters that have a gradient."""
        loss = None if closure is None else torch.enable_grad()(closure)()
        for group in self.param_groups:
            lr, (beta1, beta2), weight_decay = group["lr"], group["betas"], group["weight_decay"]
            for parameter in group["params"]:
                if (gradient := parameter.grad) is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state["momentum"] = torch.zeros_like(parameter)
                update = state["momentum"].lerp(gradient, 1 - beta1).sign_()
                parameter.mul_(1 - lr * weight_decay).add_(update, alpha=-lr)
                state["momentum"].lerp_(gradient, 1 - beta2)
        return loss
