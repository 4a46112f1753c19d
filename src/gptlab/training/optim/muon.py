"""Muon for the matrices of the blocks and AdamW for all other parameters, as one optimizer.

Shapes: K matrices of one shape, m rows, n columns.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor
from torch.optim import AdamW, Muon, Optimizer

Group = dict[str, Any]
Matrices = list[tuple[Tensor, Tensor, Tensor]]  # (parameter, gradient, momentum)

MOMENTUM = "momentum_buffer"  # key in a parameter's state, as in torch.optim.Muon

# Largest number of elements in a stack. On a CPU, a larger stack exceeds the cache and is slower; elsewhere the limit
# bounds memory.
CPU_STACK, STACK = 2**20, 2**26


class StackedMuon(Muon):
    """torch.optim.Muon (Jordan et al. 2024) that orthogonalizes matrices of the same shape with batched matmuls.

    If small matrices were orthogonalized one by one, a device would wait for kernel launches. Several ranks share the
    work: each orthogonalizes some of the matrices of a stack, and one collective per stack sends the updates to all
    ranks (DDP). If the matrices are sharded (FSDP), the first of two collectives gathers them, each on one rank, and
    the second returns the shards of the updates.

    Args:
        groups: As for torch.optim.Muon.
        ns_dtype: Dtype of the orthogonalization: "bfloat16", as in torch.optim.Muon, or "float32".
        cautious: Whether weights decay only where the update has their sign (Chen et al. 2025, Cautious Weight Decay,
            algorithm 1).
        options: Other arguments of torch.optim.Muon.

    Attributes:
        found_inf: None, or a tensor () that is 1 if the step must be skipped, as for PyTorch's fused optimizers.
    """

    found_inf: Tensor | None = None

    def __init__(self, groups: list[Group], *, ns_dtype: str, cautious: bool, **options: Any) -> None:
        super().__init__([group | {"ns_dtype": ns_dtype, "cautious": cautious} for group in groups], **options)
        self._replicas: DeviceMesh | None = None

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Performs one step with the gradients present; ``closure`` is not called."""
        for group in self.param_groups:
            if matrices := self._matrices(group):
                mesh = self._mesh(matrices[0][0])
                for stack in stack_by_shape(matrices, ranks=mesh.size() if mesh else 1):
                    self._step_stack(group, stack, mesh)

    def _mesh(self, parameter: Tensor) -> DeviceMesh | None:
        """Returns the ranks that hold the shards or the replicas of the parameters; None for a single rank."""
        if isinstance(parameter, DTensor):
            mesh = parameter.device_mesh
            return mesh if mesh.size() > 1 else None
        if self._replicas is None and dist.is_initialized() and dist.get_world_size() > 1:
            self._replicas = init_device_mesh(parameter.device.type, (dist.get_world_size(),))
        return self._replicas

    def _matrices(self, group: Group) -> Matrices:
        """Collects the parameters of a group that have a gradient, with gradient and momentum (initialized to 0)."""
        matrices = []
        for parameter in group["params"]:
            if (gradient := parameter.grad) is not None:
                state = self.state[parameter]
                if MOMENTUM not in state:
                    state[MOMENTUM] = torch.zeros_like(gradient)
                matrices.append((parameter, gradient, state[MOMENTUM]))
        return matrices

    def _step_stack(self, group: Group, stack: Matrices, mesh: DeviceMesh | None) -> None:
        """Performs one step for matrices of one shape, whose orthogonalization is divided among the ranks of a mesh."""
        dtype = getattr(torch, group["ns_dtype"])
        directions = [self._direction(group, g, m).to(dtype) for _, g, m in stack]

        def orthogonalized(x: Tensor) -> Tensor:
            return orthogonalize(x, group["ns_coefficients"], group["ns_steps"], group["eps"])

        if mesh is None:
            updates = orthogonalized(torch.stack(directions))
        else:
            updates = divide_stack(orthogonalized, directions, stack[0][0], mesh)
        for (parameter, _, _), update in zip(stack, updates, strict=True):
            self._apply(group, parameter, update)

    def _direction(self, group: Group, gradient: Tensor, momentum: Tensor) -> Tensor:
        """Updates the momentum with a gradient and returns the Nesterov direction; all are this device's shards."""
        gradient, momentum = local_tensor(gradient), local_tensor(momentum)
        new = momentum.lerp(gradient, 1 - group["momentum"])
        self._set(momentum, new)
        return torch.lerp(gradient, new, group["momentum"], out=new)

    def _apply(self, group: Group, parameter: Tensor, update: Tensor) -> None:
        """Applies weight decay to this device's shard of a matrix and subtracts its shard of the update."""
        part, lr, shape = local_tensor(parameter), group["lr"], parameter.shape
        update = update.to(part.device)  # offloaded parameters are on the CPU
        decaying: Tensor | float = 1.0
        if group["cautious"]:
            decaying = (update * part).ge(0).to(part.dtype)  # 1 if their signs do not differ, else 0
        new = part * (1 - lr * group["weight_decay"] * decaying)
        self._set(part, new.sub_(update, alpha=lr * rate_factor(group["adjust_lr_fn"], shape)))

    def _set(self, target: Tensor, value: Tensor) -> None:
        """Overwrites a tensor unless ``found_inf`` is 1, which is read on the device, without synchronization."""
        if self.found_inf is None:
            target.copy_(value)
        else:
            torch.where(self.found_inf.bool(), target, value, out=target)


def rate_factor(adjust_lr: str | None, shape: torch.Size) -> float:
    """Returns the factor of the learning rate of a matrix of shape (m, n), as in torch.optim.Muon.

    Args:
        adjust_lr: "match_rms_adamw" is ``0.2 sqrt(max(m, n))``, which gives updates the root mean square of AdamW's
            updates (Liu et al. 2025, Muon is Scalable for LLM Training, section 2.2); "original", the default of
            torch.optim.Muon, is ``sqrt(max(1, m / n))`` (Jordan et al. 2024).
        shape: Shape of the matrix.
    """
    m, n = shape
    return 0.2 * math.sqrt(max(m, n)) if adjust_lr == "match_rms_adamw" else math.sqrt(max(1, m / n))


class MuonWithAdamW(Optimizer):
    """Muon and AdamW as one optimizer with a shared state and one list of parameter groups, Muon's first.

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
        self._share()  # the loaded groups and state

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Performs one step of both; ``closure``, if given, computes the gradients and returns the loss."""
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


def stack_by_shape(matrices: Matrices, *, ranks: int) -> Iterator[Matrices]:
    """Groups matrices by shape into stacks of at most ``STACK`` (``CPU_STACK``) elements or one matrix per rank."""
    by_shape: dict[torch.Size, Matrices] = defaultdict(list)
    for matrix in matrices:
        by_shape[matrix[0].shape].append(matrix)
    for shape, alike in by_shape.items():
        elements = CPU_STACK if alike[0][0].device.type == "cpu" else STACK
        count = max(1, elements // (shape.numel() * ranks)) * ranks
        yield from (alike[first : first + count] for first in range(0, len(alike), count))


def divide_stack(
    function: Callable[[Tensor], Tensor], parts: list[Tensor], parameter: Tensor, mesh: DeviceMesh
) -> Tensor:
    """Applies a function to a stack of matrices, each on one rank. Collective: every rank must call it.

    Args:
        function: Function from matrices (K, m, n) to matrices of the same shape; K may be 0.
        parts: This rank's part of each matrix: the whole matrix, or a shard.
        parameter: Tensor that is replicated or sharded like each of the matrices.
        mesh: Ranks that share the work.

    Returns:
        This rank's parts of the results, stacked.
    """
    placements: list[Placement] = [Replicate()] * mesh.ndim
    is_sharded = isinstance(parameter, DTensor)
    is_split = is_sharded and mesh.ndim > 1  # tensor parallelism: matrices are gathered one by one
    if is_split:
        parts = [gather_parts(part, parameter) for part in parts]
    elif isinstance(parameter, DTensor):
        placements = [_stacked(placement) for placement in parameter.placements]
    shape = torch.Size((len(parts), *parameter.shape))
    strides = (parameter.numel(), parameter.size(1), 1)

    def distributed(local: Tensor, placed: list[Placement]) -> DTensor:
        return DTensor.from_local(local, mesh, placed, run_check=False, shape=shape, stride=strides)

    by_matrix: list[Placement] = [Shard(0)] * mesh.ndim
    own = distributed(torch.stack(parts), placements).redistribute(placements=by_matrix).to_local()
    results = distributed(function(own), by_matrix).redistribute(placements=placements).to_local()
    if is_split:
        return torch.stack([local_part(result, parameter) for result in results])
    return results


def _stacked(placement: Placement) -> Placement:
    """Returns the placement of a stack of matrices with this placement."""
    return Shard(placement.dim + 1) if isinstance(placement, Shard) else placement


def orthogonalize(x: Tensor, coefficients: tuple[float, float, float], steps: int, eps: float) -> Tensor:
    """Approximately orthogonalizes matrices (K, m, n): their singular values become close to 1; same shape.

    This is a Newton-Schulz iteration: an odd polynomial of degree five, applied ``steps`` times. The matrices are first
    divided by their norm, so that no singular value is greater than 1. With torch's ``coefficients``, all but tiny
    singular values are between 0.6 and 1.3 after five steps (Jordan et al. 2024, Muon: An optimizer for hidden layers
    in neural networks).
    """
    a, b, c = coefficients
    is_tall = x.size(1) > x.size(2)
    x = x / torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = torch.bmm(x.mT, x) if is_tall else torch.bmm(x, x.mT)  # Gram matrix of the shorter side
        factor = torch.baddbmm(gram, gram, gram, beta=b, alpha=c)
        x = torch.baddbmm(x, x, factor, beta=a) if is_tall else torch.baddbmm(x, factor, x, beta=a)
    return x


def local_tensor(tensor: Tensor) -> Tensor:
    """Returns this device's shard of a tensor, or the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def gather_parts(part: Tensor, parameter: Tensor) -> Tensor:
    """Gathers the full tensor from the shards of all devices, which are sharded like ``parameter``.

    Collective: every rank must call it. Returns ``part`` unchanged if ``parameter`` is not a DTensor.
    """
    if not isinstance(parameter, DTensor):
        return part
    mesh, placements, shape = parameter.device_mesh, parameter.placements, parameter.shape
    strides = parameter.stride()  # without shape and stride, from_local assumes shards of equal size
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=strides).full_tensor()


def local_part(full: Tensor, parameter: Tensor) -> Tensor:
    """Returns this device's shard of a full tensor, sharded like ``parameter``, without communication."""
    if not isinstance(parameter, DTensor):
        return full
    return distribute_tensor(full, parameter.device_mesh, parameter.placements, src_data_rank=None).to_local()
