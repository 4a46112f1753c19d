"""Optimizers and their parameter groups."""

import inspect
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from gptlab.config.components import bind_component, import_target
from gptlab.errors import UserError
from gptlab.training.config import AdamWConfig, ComponentOptimizerConfig, MuonConfig, OptimizerConfig, ScheduleConfig
from gptlab.training.optim.averaging import AVERAGE, DECAY
from gptlab.training.optim.muon import MOMENTUM, MuonWithAdamW, StackedMuon
from gptlab.training.optim.schedules import learning_rate, momentum

GROUP_NAMES = ("matrix", "embedding", "head", "vector")  # parameter groups of a Muon run
# tensors in a parameter's state that have its shape, in torch's optimizers with fused kernels and in those of gptlab
SHAPED = {"exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum", AVERAGE}
REQUIRED: dict[type, set[str]] = {StackedMuon: {MOMENTUM}, AdamW: {"step", "exp_avg", "exp_avg_sq"}}
State = dict[str, Any]  # an optimizer's state_dict: the state of each parameter, and the parameter groups


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, fused: bool) -> Optimizer:
    """Builds the optimizer over ``parameter_groups``.

    Loading a state dict restores only the state of each parameter; the hyperparameters remain those of ``config``.
    """
    groups = parameter_groups(model, config)
    optimizer: Optimizer
    if isinstance(config, ComponentOptimizerConfig):
        optimizer = bind_component(optimizer_component(config))(groups)
    elif isinstance(config, MuonConfig):
        matrices = StackedMuon(
            groups[:1],
            momentum=config.momentum,
            ns_steps=config.ns_steps,
            adjust_lr_fn=config.adjust_lr,
            ns_dtype=config.ns_dtype,
            cautious=config.cautious,
        )
        optimizer = MuonWithAdamW(matrices, AdamW(groups[1:], **_adamw_arguments(config, fused)))
    else:
        optimizer = AdamW(groups, **_adamw_arguments(config, fused))
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    optimizer.register_load_state_dict_pre_hook(_keep_own_hyperparameters)
    return optimizer


def _adamw_arguments(config: AdamWConfig | MuonConfig, fused: bool) -> dict[str, Any]:
    return {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": fused}


def optimizer_component(config: ComponentOptimizerConfig) -> dict[str, Any]:
    """Returns an optimizer's component, with ``weight_decay`` only if its class has that argument."""
    values = config.model_dump(mode="json", exclude={"param_groups"}, exclude_none=True)
    if "weight_decay" not in inspect.signature(import_target("optimizer", config.name)).parameters:
        values.pop("weight_decay", None)  # it is in the parameter groups
    return values


def set_step_hyperparameters(
    optimizer: Optimizer, step: int, config: OptimizerConfig, schedule: ScheduleConfig, *, max_steps: int
) -> None:
    """Sets the step's learning rate of every group, all by the same schedule, and Muon's momentum."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, schedule, lr=group["initial_lr"], max_steps=max_steps)
        if isinstance(config, MuonConfig) and "momentum" in group:
            group["momentum"] = momentum(step, config)


class SkippedStep(Exception):  # noqa: N818
    """Raised in the closure of an optimizer's step to end the step before the optimizer changes anything."""


def skip_step_if(optimizer: Optimizer, bad: Tensor) -> None:
    """Skips the next step if ``bad`` () is 1: weights, optimizer state and step counts do not change.

    Fused kernels, as with torch.amp.GradScaler, and Muon read ``bad`` on the device; for other optimizers the host
    waits for it. The attribute ``found_inf``, which torch.amp.GradScaler sets for fused optimizers, is not documented
    (read in torch 2.13).

    Raises:
        SkippedStep: ``bad`` is 1 and the optimizer does not read it on the device. Call this function in the closure.
    """
    is_muon = isinstance(optimizer, MuonWithAdamW)  # its groups of matrices have no key "fused"
    if all(group.get("fused", is_muon) for group in optimizer.param_groups):
        optimizer.found_inf = bad  # type: ignore[attr-defined]
    elif bad:
        raise SkippedStep


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Splits the parameters into groups with different hyperparameters. A tied parameter appears once.

    Empty groups are omitted.
    """
    if isinstance(config, ComponentOptimizerConfig) and config.param_groups is not None:
        groups = bind_component(config.param_groups)(model)
    elif isinstance(config, MuonConfig):
        groups = muon_groups(model, config)
    else:
        groups = decay_groups(model, config.weight_decay or 0.0)
    return [group for group in groups if group["params"]]


def group_names(model: nn.Module, config: OptimizerConfig) -> list[str]:
    """Returns the names of ``parameter_groups``, in order, if each has its own learning rate; else an empty list."""
    if not isinstance(config, MuonConfig):
        return []
    return [kind for kind, group in zip(GROUP_NAMES, muon_groups(model, config), strict=True) if group["params"]]


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Splits the parameters as in GPT-2: weight decay for matrices and embeddings, none for biases and LayerNorms."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def muon_groups(model: nn.Module, config: MuonConfig) -> list[dict[str, Any]]:
    """Splits the parameters into the matrices of the blocks, for Muon, and embeddings, head and vectors, for AdamW.

    An embedding tied to the head belongs to the head's group. Vectors have no weight decay.
    """
    decay = config.adamw_weight_decay
    lrs = (config.lr, config.embedding_lr, config.head_lr, config.vector_lr)
    decays = (config.weight_decay, decay, decay, 0.0)
    heads = {
        parameter for name, parameter in model.named_parameters(remove_duplicate=False) if name.startswith("lm_head.")
    }
    parts: dict[str, list[Parameter]] = {kind: [] for kind in GROUP_NAMES}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[_kind(name, parameter, is_head=parameter in heads)].append(parameter)
    hyperparameters = zip(GROUP_NAMES, lrs, decays, strict=True)
    return [{"params": parts[kind], "lr": lr, "weight_decay": decay} for kind, lr, decay in hyperparameters]


def _kind(name: str, parameter: Parameter, *, is_head: bool) -> str:
    """Returns the name of the Muon parameter group that a parameter belongs to."""
    if parameter.dim() < 2:
        return "vector"
    if is_head:
        return "head"
    return "matrix" if name.startswith("h.") and parameter.dim() == 2 else "embedding"


def name_state(state: State, model: nn.Module, config: OptimizerConfig) -> State:
    """Relabels the parameters of an optimizer's state by name instead of by their index in its groups."""
    return _relabel(state, dict(enumerate(_parameter_names(model, config))))


def number_state(state: State, model: nn.Module, config: OptimizerConfig) -> State:
    """Inverts ``name_state``."""
    return _relabel(state, {name: number for number, name in enumerate(_parameter_names(model, config))})


def _parameter_names(model: nn.Module, config: OptimizerConfig) -> list[str]:
    """Returns the names of the parameters in the optimizer's order."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in parameter_groups(model, config) for parameter in group["params"]]


def check_groups(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """Checks that the parameter groups of a checkpoint match those of an optimizer.

    Raises:
        UserError: The groups have different sizes, or only one of the two has averages of the weights.
    """
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in own]:
        reason = "The optimizer state of the checkpoint is that of another optimizer or another model."
    elif [DECAY in group for group in saved] != [DECAY in group for group in own]:
        reason = "Averaging of the weights (train.ema_decay) can be neither enabled nor disabled in a resumed run."
    else:
        return
    raise UserError(f"{reason} To start a new run from its weights, use init_from=<run directory>.")


def _check_shapes(optimizer: Optimizer, state: State) -> None:
    """Checks the tensors of an optimizer state: fused kernels read and write as many elements as a parameter has.

    Args:
        optimizer: The optimizer.
        state: State to load, with as many parameters as the optimizer.

    Raises:
        UserError: The parameters are not those of the optimizer, or a tensor is missing or has the wrong shape.
    """
    parts = (optimizer.muon, optimizer.adamw) if isinstance(optimizer, MuonWithAdamW) else (optimizer,)
    parameters = [(part, parameter) for part in parts for group in part.param_groups for parameter in group["params"]]
    labels = [label for group in state["param_groups"] for label in group["params"]]
    if len({*labels}) < len(labels) or state["state"].keys() - {*labels}:
        raise UserError("The optimizer state of the checkpoint is damaged: its parameters are not those of its groups.")
    for label, (part, parameter) in zip(labels, parameters, strict=True):
        moments = state["state"].get(label, {})
        is_own = type(part).__module__.partition(".")[0] in ("torch", "gptlab")  # others use the names otherwise
        shapes = dict.fromkeys(SHAPED, parameter.shape) | {"step": torch.Size()} if is_own else {}
        wrong = [key for key in shapes.keys() & moments.keys() if torch.as_tensor(moments[key]).shape != shapes[key]]
        wrong += REQUIRED.get(type(part), set()) - moments.keys() if moments else ()
        if wrong:
            raise UserError(
                f"The optimizer state of the checkpoint is damaged: {min(wrong)} of a parameter of shape "
                f"{tuple(parameter.shape)} is missing or has another shape."
            )


def _relabel(state: State, labels: dict[Any, Any]) -> State:
    """Renames the parameters of an optimizer's state; names not in ``labels`` are kept."""
    return {
        "state": {labels.get(label, label): moments for label, moments in state["state"].items()},
        "param_groups": [
            group | {"params": [labels.get(label, label) for label in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def _keep_own_hyperparameters(optimizer: Optimizer, state: State) -> State:
    """Replaces the hyperparameters in a state with the optimizer's own; raises UserError if the groups do not match."""
    saved, own = state["param_groups"], optimizer.param_groups
    check_groups(saved, own)
    _check_shapes(optimizer, state)
    return state | {"param_groups": [new | {"params": old["params"]} for old, new in zip(saved, own, strict=True)]}
