"""Optimizers and their parameter groups."""

from typing import Any

from torch import Tensor, nn
from torch.nn import Parameter
from torch.optim import AdamW, Optimizer

from gptlab.errors import UserError
from gptlab.training.config import MuonConfig, OptimizerConfig, ScheduleConfig
from gptlab.training.optim.averaging import DECAY
from gptlab.training.optim.muon import MuonWithAdamW, StackedMuon
from gptlab.training.optim.schedules import learning_rate, momentum

GROUP_NAMES = ("matrix", "embedding", "head", "vector")  # of parameters, to which Muon's run has a learning rate each
State = dict[str, Any]  # of an optimizer: of each parameter its moments, and the groups


def build_optimizer(model: nn.Module, config: OptimizerConfig, *, fused: bool) -> Optimizer:
    """Build the optimizer over ``parameter_groups``; what is loaded into it are moments, its settings stay its own."""
    groups = parameter_groups(model, config)
    adamw: dict[str, Any] = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "fused": fused}
    optimizer: Optimizer
    if isinstance(config, MuonConfig):
        matrices = StackedMuon(
            groups[:1],
            momentum=config.momentum,
            ns_steps=config.ns_steps,
            adjust_lr_fn=config.adjust_lr,
            ns_dtype=config.ns_dtype,
            cautious=config.cautious,
        )
        optimizer = MuonWithAdamW(matrices, AdamW(groups[1:], **adamw))
    else:
        optimizer = AdamW(groups, **adamw)
    for group in optimizer.param_groups:
        group["initial_lr"] = group["lr"]
    optimizer.register_load_state_dict_pre_hook(_with_own_settings)
    return optimizer


def set_step_hyperparameters(
    optimizer: Optimizer, step: int, config: OptimizerConfig, schedule: ScheduleConfig, *, max_steps: int
) -> None:
    """Set what depends on the step: the rate of every group, all by one schedule, and Muon's momentum."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate(step, schedule, lr=group["initial_lr"], max_steps=max_steps)
        if isinstance(config, MuonConfig) and "momentum" in group:
            group["momentum"] = momentum(step, config)


def skip_step_if(optimizer: Optimizer, bad: Tensor) -> None:
    """Let the step that follows change nothing, neither weights nor moments nor its count, where ``bad`` () is 1.

    Fused kernels read it on the device, as they do for torch.amp.GradScaler, and so does Muon; for the others the host
    waits for it. The attribute ``found_inf``, by which torch.amp.GradScaler tells fused optimizers, is not documented
    (read in torch 2.13).
    """
    if all(group.get("fused", True) for group in optimizer.param_groups):  # Muon's has no such key
        optimizer.found_inf = bad  # type: ignore[attr-defined]
    elif bad:
        optimizer.zero_grad()  # what has no gradient is left alone


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Split the parameters into groups with settings of their own. A tied parameter appears once; no group is empty."""
    groups = muon_groups(model, config) if isinstance(config, MuonConfig) else decay_groups(model, config.weight_decay)
    return [group for group in groups if group["params"]]


def group_names(model: nn.Module, config: OptimizerConfig) -> list[str]:
    """Name the groups of ``parameter_groups``, in their order, where they have learning rates of their own."""
    if not isinstance(config, MuonConfig):
        return []
    return [kind for kind, group in zip(GROUP_NAMES, muon_groups(model, config), strict=True) if group["params"]]


def decay_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Split the parameters as GPT-2 does: matrices and embeddings decay, biases and LayerNorms do not."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]


def muon_groups(model: nn.Module, config: MuonConfig) -> list[dict[str, Any]]:
    """Split the parameters into the matrices of the blocks, which are Muon's, and AdamW's embeddings, head and vectors.

    An embedding that is the head as well is trained as one. Vectors do not decay.
    """
    decay = config.adamw_weight_decay
    rates = (config.lr, config.embedding_lr, config.head_lr, config.vector_lr)
    decays = (config.weight_decay, decay, decay, 0.0)
    heads = {
        parameter for name, parameter in model.named_parameters(remove_duplicate=False) if name.startswith("lm_head.")
    }
    parts: dict[str, list[Parameter]] = {kind: [] for kind in GROUP_NAMES}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            parts[_kind(name, parameter, is_head=parameter in heads)].append(parameter)
    settings = zip(GROUP_NAMES, rates, decays, strict=True)
    return [{"params": parts[kind], "lr": rate, "weight_decay": decay} for kind, rate, decay in settings]


def _kind(name: str, parameter: Parameter, *, is_head: bool) -> str:
    """Say which of the groups of Muon a parameter belongs to."""
    if parameter.dim() < 2:
        return "vector"
    if is_head:
        return "head"
    return "matrix" if name.startswith("h.") and parameter.dim() == 2 else "embedding"


def name_state(state: State, model: nn.Module, config: OptimizerConfig) -> State:
    """Name the parameters of an optimizer's state, which numbers them in the order of its groups."""
    return _relabel(state, dict(enumerate(_parameter_names(model, config))))


def number_state(state: State, model: nn.Module, config: OptimizerConfig) -> State:
    """Undo ``name_state``."""
    return _relabel(state, {name: number for number, name in enumerate(_parameter_names(model, config))})


def _parameter_names(model: nn.Module, config: OptimizerConfig) -> list[str]:
    """Names of the parameters, as the optimizer has them."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    return [names[parameter] for group in parameter_groups(model, config) for parameter in group["params"]]


def check_groups(saved: list[dict[str, Any]], own: list[dict[str, Any]]) -> None:
    """See that the groups of a checkpoint are those of an optimizer, and have its moments; UserError: they have not."""
    if [len(group["params"]) for group in saved] != [len(group["params"]) for group in own]:
        what = "The checkpoint has the moments of another optimizer, or of another network."
    elif [DECAY in group for group in saved] != [DECAY in group for group in own]:
        what = "A run keeps an average of its weights (train.ema_decay) from its beginning to its end, or not at all."
    else:
        return
    raise UserError(f"{what} A new run can start from its weights: init_from=<run directory>")


def _relabel(state: State, labels: dict[Any, Any]) -> State:
    """Call the parameters of an optimizer's state otherwise; those that are called so already stay."""
    return {
        "state": {labels.get(label, label): moments for label, moments in state["state"].items()},
        "param_groups": [
            group | {"params": [labels.get(label, label) for label in group["params"]]}
            for group in state["param_groups"]
        ],
    }


def _with_own_settings(optimizer: Optimizer, state: State) -> State:
    """Replace the settings in a state by the optimizer's own, the configuration's; UserError: it has others."""
    saved, own = state["param_groups"], optimizer.param_groups
    check_groups(saved, own)
    return state | {"param_groups": [mine | {"params": its["params"]} for its, mine in zip(saved, own, strict=True)]}
