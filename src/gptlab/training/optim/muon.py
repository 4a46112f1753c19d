"""Muon for the matrices of the blocks, AdamW for all else, as one optimizer.

Shapes: K matrices of one shape, m rows, n columns.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Muon, Optimizer

Group = dict[str, Any]
Matrices = list[tuple[Tensor, Tensor, Tensor]]  # each with its gradient and its momentum

MOMENTUM = "momentum_buffer"  # the moment's name in the state, as in torch.optim.Muon

# Elements of a stack. A larger one leaves a CPU's cache and is slower; elsewhere there is only its memory to care for.
CPU_STACK, STACK = 2**20, 2**26


class StackedMuon(Muon):
    """torch.optim.Muon (Jordan et al. 2024), whose matrices of one shape are orthogonalized in one product.

    By itself each small matrix would keep a device waiting for its next instruction. Of a sharded matrix every device
    gathers the whole update, orthogonalizes it, as the others do, and keeps its own part.

    Attributes:
        found_inf: A tensor () that is 1 where the step is to change nothing, as for torch's fused optimizers; or None.

    Args:
        groups: As for torch.optim.Muon.
        ns_dtype: In which the update is orthogonalized: "bfloat16", as in torch.optim.Muon, or "float32".
        cautious: Weights decay only where the update has their sign (Chen et al. 2025, Cautious Weight Decay,
            algorithm 1).
        options: Of torch.optim.Muon.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[Group], *, ns_dtype: str, cautious: bool, **options: Any) -> None:
        super().__init__([group | {"ns_dtype": ns_dtype, "cautious": cautious} for group in groups], **options)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Make one step; the gradients are there, so no ``closure`` is called."""
        for group in self.param_groups:
            for stack in stack_by_shape(self._matrices(group)):
                self._step_of(group, stack)

    def _matrices(self, group: Group) -> Matrices:
        """Collect the parameters of a group that have a gradient, each with it and with its momentum, 0 at first."""
        matrices = []
        for parameter in group["params"]:
            if (gradient := parameter.grad) is not None:
                state = self.state[parameter]
                if MOMENTUM not in state:
                    state[MOMENTUM] = torch.zeros_like(gradient)
                matrices.append((parameter, gradient, state[MOMENTUM]))
        return matrices

    def _step_of(self, group: Group, stack: Matrices) -> None:
        """Make a step of matrices of one shape."""
        dtype = getattr(torch, group["ns_dtype"])
        updates = torch.stack([gather_parts(self._direction(group, g, m).to(dtype), p) for p, g, m in stack])
        updates = orthogonalize(updates, group["ns_coefficients"], group["ns_steps"], group["eps"])
        for (parameter, _, _), update in zip(stack, updates, strict=True):
            self._apply(group, parameter, local_part(update, parameter))

    def _direction(self, group: Group, gradient: Tensor, momentum: Tensor) -> Tensor:
        """Take a gradient into the momentum, and return it with Nesterov's: this device's part of it."""
        gradient, momentum = local_tensor(gradient), local_tensor(momentum)
        new = momentum.lerp(gradient, 1 - group["momentum"])
        self._set(momentum, new)
        return torch.lerp(gradient, new, group["momentum"], out=new)

    def _apply(self, group: Group, parameter: Tensor, update: Tensor) -> None:
        """Decay this device's part of a matrix, and subtract that of the update."""
        part, rate, shape = local_tensor(parameter), group["lr"], parameter.shape
        decaying: Tensor | float = 1.0
        if group["cautious"]:
            decaying = (update * part).ge_(0)  # 1 where they have one sign, else 0
        new = part * (1 - rate * group["weight_decay"] * decaying)
        self._set(part, new.sub_(update, alpha=rate * rate_factor(group["adjust_lr_fn"], shape)))

    def _set(self, target: Tensor, value: Tensor) -> None:
        """Overwrite a tensor, unless the step is a bad one; the device decides, and the host need not wait for it."""
        if self.found_inf is None:
            target.copy_(value)
        else:
            torch.where(self.found_inf.bool(), target, value, out=target)


def rate_factor(adjust_lr: str | None, shape: torch.Size) -> float:
    """Factor of the learning rate of a matrix of shape (m, n), as in torch.optim.Muon.

    Args:
        adjust_lr: "match_rms_adamw" is ``0.2 sqrt(max(m, n))``, with which updates have the root mean square of AdamW's
            (Liu et al. 2025, Muon is Scalable for LLM Training, section 2.2); "original", the default of
            torch.optim.Muon, is ``sqrt(max(1, m / n))`` (Jordan et al. 2024).
        shape: Of the matrix.
    """
    m, n = shape
    return 0.2 * math.sqrt(max(m, n)) if adjust_lr == "match_rms_adamw" else math.sqrt(max(1, m / n))


class MuonWithAdamW(Optimizer):
    """Two optimizers as one, with one list of groups, Muon's first, and one state.

    Attributes:
        found_inf: See ``StackedMuon``.
    """

    found_inf: Tensor | None = None

    def __init__(self, muon: StackedMuon, adamw: AdamW) -> None:
        self.muon, self.adamw = muon, adamw
        super().__init__([*muon.param_groups, *adamw.param_groups], {})
        self._share()

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._share()  # what was loaded

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Make one step of both; ``closure`` computes the loss and the gradients, where they are not there."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self.muon.found_inf = self.adamw.found_inf = self.found_inf  # type: ignore[attr-defined]
        self.muon.step()
        self.adamw.step()
        return loss

    def _share(self) -> None:
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state


def stack_by_shape(matrices: Matrices) -> Iterator[Matrices]:
    """Put matrices of one shape together, as many as are fast at once."""
    by_shape: dict[torch.Size, Matrices] = defaultdict(list)
    for matrix in matrices:
        by_shape[matrix[0].shape].append(matrix)
    for shape, alike in by_shape.items():
        elements = CPU_STACK if alike[0][0].device.type == "cpu" else STACK
        count = max(1, elements // shape.numel())
        yield from (alike[first : first + count] for first in range(0, len(alike), count))


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Bring the singular values of matrices (K, m, n) near 1, and leave their singular vectors; same shape.

    A Newton-Schulz iteration: an odd polynomial of degree five, applied ``steps`` times. The values are divided by the
    matrix's norm first, so none is above 1; with torch's ``coefficients`` those that are not tiny end between 0.6 and
    1.3 after five steps (Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks).
    """
    a, b, c = coefficients
    is_tall = x.size(1) > x.size(2)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = torch.bmm(x.mT, x) if is_tall else torch.bmm(x, x.mT)  # of the shorter side
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if is_tall else torch.baddbmm(x, factor, x, beta=a)
    return x


def local_tensor(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this device has, which is all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_parts(part: Tensor, parameter: Tensor) -> Tensor:
    """Put the parts that all devices have together; they are sharded as ``parameter`` is."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements, shape = parameter.device_mesh, parameter.placements, parameter.shape
    strides = parameter.stride()  # without shape and strides, parts of one size would be taken for granted
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=strides).full_tensor()


def local_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return what this device has of a tensor that is sharded as ``parameter`` is; nothing is communicated."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
