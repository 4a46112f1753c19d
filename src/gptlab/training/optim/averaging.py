"""The average of the weights over the steps: less noisy than the last of them (Polyak and Juditsky 1992).

It is one more moment of each parameter in the state of the optimizer, so it is sharded, moved, saved, loaded, named and
traced as the others are, and a checkpoint has the weights that are trained as well. Lightning's WeightAveraging, over
``torch.optim.swa_utils.AveragedModel``, does not fit: it copies the module, which FSDP2 forbids, puts the average in
the place of the weights in a checkpoint, and moves it after steps that were skipped, too.
"""

from collections.abc import Iterable

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.optim import Optimizer

AVERAGE, DECAY = "average", "ema_decay"  # the moment's name, and the setting of a group


def enable_averaging(optimizer: Optimizer, decay: float) -> None:
    """Average the weights after every step, with the decay that ``set_decay`` has set (``decay`` until then)."""
    for group in optimizer.param_groups:
        group[DECAY] = decay
    optimizer.register_step_post_hook(_update_averages)


def decay_at(step: int, decay: float) -> float:
    """Return what the average keeps of itself at a step, counted from 0.

    It is less at first, so that the initial weights are soon forgotten; the rule is that of TensorFlow's
    ``ExponentialMovingAverage`` (argument ``num_updates``).
    """
    return min(decay, (1 + step) / (10 + step))


def set_decay(optimizer: Optimizer, step: int, decay: float) -> None:
    """Set the decay of a step, counted from 0."""
    for group in optimizer.param_groups:
        group[DECAY] = decay_at(step, decay)


@torch.no_grad()
def swap_in_averages(optimizers: Iterable[Optimizer]) -> list[tuple[Tensor, Tensor]]:
    """Put the averages in the place of the weights, whose memory stays where it is.

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
    """Undo ``swap_in_averages``."""
    for parameter, weights in trained:
        parameter.copy_(weights)


@torch.no_grad()
def _update_averages(optimizer: Optimizer, *_: object) -> None:
    """Move the averages towards the weights that a step has left; they begin as those of the first step.

    A step that was skipped leaves them alone: its parameters have no gradient, or the device knows, and nobody waits
    for it (see ``gptlab.training.optim.optimizers.skip_step_if``).
    """
    bad: Tensor | None = getattr(optimizer, "found_inf", None)
    for group in optimizer.param_groups:
        averages, weights = [], []
        for parameter in group["params"]:
            if parameter.grad is not None:
                moments = optimizer.state[parameter]
                if AVERAGE not in moments:
                    moments[AVERAGE] = parameter.detach().clone()
                averages.append(_local_tensor(moments[AVERAGE]))
                weights.append(_local_tensor(parameter.detach()))
        if not averages:
            continue
        # One kernel for all tensors. torch.optim.swa_utils.get_ema_multi_avg_fn calls the same function, but takes no
        # decay that only the device knows (read in torch 2.13).
        if bad is None:
            torch._foreach_lerp_(averages, weights, 1 - group[DECAY])
        else:
            share = ((1 - group[DECAY]) * (1 - bad)).to(averages[0].device)
            torch._foreach_lerp_(averages, weights, [share] * len(averages))


def _local_tensor(tensor: Tensor) -> Tensor:
    """This rank's part."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor
