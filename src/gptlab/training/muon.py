"""Muon for the matrices of the blocks, AdamW for all else, as one optimizer.

Shapes: K matrices of one shape, m rows, n columns, m <= n.
"""

from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import AdamW, Muon, Optimizer
from torch.optim._muon import _adjust_lr

Group = dict[str, Any]


class StackedMuon(Muon):
    """torch.optim.Muon (Jordan et al. 2024), whose matrices of one shape are orthogonalised in one product.

    By itself each small matrix would keep a device waiting for its next instruction. Of a sharded matrix every device
    gathers the whole update, orthogonalises it, as the others do, and keeps its own part.

    Attributes:
        found_inf: 1 () where the step changes nothing, as for torch's fused optimizers; None where it always does.

    Args:
        groups: As for torch.optim.Muon.
        ns_dtype: In which the update is orthogonalised: "bfloat16", as in torch.optim.Muon, or "float32".
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
            parameters: list[Tensor] = []
            gradients: list[Tensor] = []
            momenta: list[Tensor] = []
            self._init_group(group, parameters, gradients, momenta)
            dtype = getattr(torch, group["ns_dtype"])
            updates = [
                gathered(self._direction(group, local(gradient), local(momentum)).to(dtype), parameter)
                for parameter, gradient, momentum in zip(parameters, gradients, momenta, strict=True)
            ]
            for parameter, update in zip(parameters, orthogonalised(updates, group), strict=True):
                self._apply(group, local(parameter), own_part(update, parameter), parameter.shape)

    def _direction(self, group: Group, gradient: Tensor, momentum: Tensor) -> Tensor:
        """Take a gradient into the momentum, and return it with Nesterov's; same shape."""
        new = momentum.lerp(gradient, 1 - group["momentum"])
        self._set(momentum, new)
        return gradient.lerp(new, group["momentum"])

    def _apply(self, group: Group, parameter: Tensor, update: Tensor, shape: torch.Size) -> None:
        """Decay a matrix, or its part, and subtract the update; ``shape`` is that of the whole."""
        decaying = parameter * (update * parameter >= 0) if group["cautious"] else parameter
        new = parameter.sub(decaying, alpha=group["lr"] * group["weight_decay"])
        self._set(parameter, new.sub_(update, alpha=_adjust_lr(group["lr"], group["adjust_lr_fn"], shape)))

    def _set(self, target: Tensor, value: Tensor) -> None:
        """Overwrite a tensor, unless the step is a bad one; the device decides, and the host need not wait for it."""
        target.copy_(value if self.found_inf is None else torch.where(self.found_inf.bool(), target, value))


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


def orthogonalised(matrices: list[Tensor], group: Group) -> list[Tensor]:
    """Bring the singular values of every matrix near 1, and leave its singular vectors.

    Those of one shape go together, a tall matrix as its transpose.
    """
    stacks: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for number, matrix in enumerate(matrices):
        stacks[tuple(sorted(matrix.shape))].append(number)
    found = dict[int, Tensor]()
    for numbers in stacks.values():
        stack = torch.stack([_laid(matrices[number], matrices[number]) for number in numbers])
        found |= zip(
            numbers, newton_schulz(stack, group["ns_coefficients"], group["ns_steps"], group["eps"]), strict=True
        )
    return [_laid(found[number], matrix) for number, matrix in enumerate(matrices)]


def newton_schulz(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Apply an odd polynomial of degree five to the singular values of matrices (K, m, n), ``steps`` times; same shape.

    They are divided by the matrix's norm first, so none is above 1, and end between about 0.7 and 1.2 with torch's
    ``coefficients`` (Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks).
    """
    a, b, c = coefficients
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT  # (K, m, m)
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def _laid(matrix: Tensor, original: Tensor) -> Tensor:
    """Transpose a matrix where the original is tall."""
    return matrix.mT if original.size(0) > original.size(1) else matrix


def local(tensor: Tensor) -> Tensor:
    """Return the part of a tensor that this device has, which is all of one that is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gathered(part: Tensor, parameter: Tensor) -> Tensor:
    """Put the parts that all devices have together; they are sharded as ``parameter`` is."""
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements, shape = parameter.device_mesh, parameter.placements, parameter.shape
    strides = parameter.stride()  # without shape and strides, parts of one size would be taken for granted
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=strides).full_tensor()


def own_part(whole: Tensor, parameter: Tensor) -> Tensor:
    """Return what this device has of a tensor that is sharded as ``parameter`` is; nothing is communicated."""
    if not isinstance(parameter, DTensor):
        return whole
    return distribute_tensor(whole, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
