"""Exponential moving average (EMA) of the weights, which is less noisy than the weights (Polyak and Juditsky 1992).

The average is an additional tensor in the optimizer state of each parameter, so it is sharded, moved, saved, loaded,
named and traced like the rest of that state, and a checkpoint holds the trained weights as well. Lightning's
WeightAveraging, based on ``torch.optim.swa_utils.AveragedModel``, cannot be used: it copies the module, which FSDP2
does not allow, replaces the weights in a checkpoint with the average, and also updates the average after skipped steps.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.optim import Optimizer

from gptlab.training.optim.muon import local_tensor

AVERAGE, DECAY = "average", "ema_decay"  # key in a parameter's state, and key in a parameter group


def enable_averaging(optimizer: Optimizer, decay: float) -> None:
    """Averages the weights after every step, with the decay set by ``set_decay`` (``decay`` until its first call)."""
    for group in optimizer.param_groups:
        group[DECAY] = decay
    optimizer.register_step_post_hook(_update_averages)


def decay_at(step: int, decay: float) -> float:
    """Returns the decay of the average at a step, counted from 0: at most ``decay``.

    It is smaller at first, so that the influence of the initial weights decreases quickly. The formula is that of
    TensorFlow's ``ExponentialMovingAverage`` (argument ``num_updates``).
    """
    return min(decay, (1 + step) / (10 + step))


def set_decay(optimizer: Optimizer, step: int, decay: float) -> None:
    """Sets the decay for a step, counted from 0."""
    for group in optimizer.param_groups:
        group[DECAY] = decay_at(step, decay)


@torch.no_grad()
def swap_in_averages(optimizers: Iterable[Optimizer]) -> list[tuple[Tensor, Tensor]]:
    """Copies the averages into the parameters, in place.

    Returns:
        The parameters that have an average, each with its trained weights, for ``swap_out_averages``.
    """
    trained = []
    for optimizer in optimizers:
        for parameter, moments in optimizer.state.items():
            if AVERAGE in moments:
                trained.append((parameter, parameter.detach().clone()))
                parameter.copy_(moments[AVERAGE])
    return trained


@torch.no_grad()
def swap_out_averages(trained: list[tuple[Tensor, Tensor]]) -> None:
    """Copies the trained weights back into the parameters."""
    for parameter, weights in trained:
        parameter.copy_(weights)


@torch.no_grad()
def _update_averages(optimizer: Optimizer, *_: object) -> None:
    """Moves the averages toward the weights after a step; they are initialized to the weights after the first step.

    A skipped step leaves them unchanged: either this hook is not called, or ``found_inf`` is 1 on the device, for which
    the host does not wait (see ``gptlab.training.optim.optimizers.skip_step_if``).
    """
    bad: Tensor | None = getattr(optimizer, "found_inf", None)
    for group in optimizer.param_groups:
        averages, weights = [], []
        for parameter in group["params"]:
            if parameter.grad is not None:
                moments = optimizer.state[parameter]
                if AVERAGE not in moments:
                    moments[AVERAGE] = parameter.detach().clone()
                averages.append(local_tensor(moments[AVERAGE]))
                weights.append(local_tensor(parameter.detach()))
        if not averages:
            continue
        # One kernel for all tensors. torch.optim.swa_utils.get_ema_multi_avg_fn calls the same function, but does not
        # accept a decay that is a tensor on the device (read in torch 2.13).
        if bad is None:
            torch._foreach_lerp_(averages, weights, 1 - group[DECAY])
        else:
            share = ((1 - group[DECAY]) * (1 - bad)).to(averages[0].device)
            torch._foreach_lerp_(averages, weights, [share] * len(averages))
