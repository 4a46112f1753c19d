"""Checkpoints of nanoGPT: read without unpickling, and resumed exactly or refused.

A resumed run has nanoGPT's weights, the moments of its AdamW and its step. Its batches are those that a run of this
configuration would have from that step on: nanoGPT draws every batch at random, an order that cannot be continued.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.model.external import EMBEDDING, HEAD, from_external
from gptlab.model.gpt import GPT
from gptlab.training.checkpoints.reading import Checkpoint, read_plain
from gptlab.training.config import AdamWConfig
from gptlab.training.optim.optimizers import parameter_groups
from gptlab.training.optim.schedules import learning_rate


def read_nanogpt_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a checkpoint of nanoGPT, whose tensors stay on disk until they are used; raises UserError if it is none."""
    checkpoint = read_plain(path)
    if not isinstance(checkpoint, dict) or not _are_tensors(checkpoint.get("model", {})):
        raise UserError(
            f"{path} is not a checkpoint of nanoGPT: it has no model of named tensors. A run of gptlab is named by "
            "its directory."
        )
    return checkpoint


def import_nanogpt_checkpoint(path: Path, config: RunConfig, model: GPT) -> Checkpoint:
    """Converts nanoGPT's checkpoint to the one that a run of ``config`` would have written at that step.

    Args:
        path: nanoGPT's ckpt.pt.
        config: Configuration of the run that resumes it.
        model: Model of that run.

    Raises:
        UserError: The file is no such checkpoint, or the next step would differ from nanoGPT's.
    """
    checkpoint = read_nanogpt_checkpoint(path)
    step, state = checkpoint.get("iter_num"), checkpoint.get("optimizer")
    if not isinstance(step, int) or not isinstance(state, dict) or not state.get("state"):
        raise _refusal(path, "it has no iter_num, or no state of its optimizer. Its weights alone: init_from=")
    if step >= config.steps:
        raise _refusal(path, f"it has made {step:,} steps, and train.max_steps={config.steps:,} is not beyond")
    _check_settings(path, config, step, state["param_groups"])
    weights = from_external(checkpoint["model"], transposed=False)
    own = {name: tensor for name, tensor in model.state_dict().items() if name != HEAD}
    moments = dict(_moments(path, state, {name: tensor for name, tensor in weights.items() if name != HEAD}))
    if shapes := [name for name in own if name not in weights or weights[name].shape != own[name].shape]:
        raise _refusal(
            path,
            f"{shapes[0]} is {tuple(weights[shapes[0]].shape) if shapes[0] in weights else 'not'} there and "
            f"{tuple(own[shapes[0]].shape)} here; the embedding's rows are model.pad_vocab_to_multiple_of",
        )
    if late := [name for name, kept in moments.items() if int(kept["step"]) != step]:
        raise _refusal(path, f"its AdamW has updated {late[0]} {int(moments[late[0]]['step']):,} times, not {step:,}")
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [{"params": [names[p] for p in g["params"]]} for g in parameter_groups(model, config.optimizer)]
    return {  # as Lightning's own checkpoints (``_CheckpointConnector.dump_checkpoint``, read in lightning 2.6.6)
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": "2.6.5",
        "callbacks": {},
        "lr_schedulers": [],
        "state_dict": {name: (weights[EMBEDDING] if name == HEAD else weights[name]) for name in model.state_dict()},
        "optimizer_states": [{"state": moments, "param_groups": groups}],
    }


def _check_settings(path: Path, config: RunConfig, step: int, groups: list[dict[str, Any]]) -> None:
    """Checks that the optimizer's next step is nanoGPT's."""
    own = config.optimizer
    if not isinstance(own, AdamWConfig):
        raise _refusal(path, f"its optimizer is AdamW, and this run's is {own.name}: optimizer=adamw")
    lr = learning_rate(step, config.schedule, lr=own.lr, max_steps=config.steps)
    wanted = {
        "optimizer.betas": (tuple(own.betas), tuple(groups[0]["betas"])),
        "optimizer.eps": (own.eps, groups[0]["eps"]),
        "optimizer.weight_decay": ([own.weight_decay, 0.0], [group["weight_decay"] for group in groups]),
        f"the learning rate at step {step:,} (optimizer.lr, schedule, train.max_steps)": (
            round(lr, 12),
            round(groups[0]["lr"], 12),
        ),
    }
    if other := [f"{key} is {there} there and {here} here" for key, (here, there) in wanted.items() if here != there]:
        raise _refusal(path, "; ".join(other))


def _moments(
    path: Path, state: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields the moments by name; nanoGPT numbers the parameters in the order of its network, matrices first."""
    order = [name for name in weights if weights[name].dim() >= 2] + [n for n in weights if weights[n].dim() < 2]
    if [number for group in state["param_groups"] for number in group["params"]] != list(range(len(order))):
        raise _refusal(path, "its optimizer has other groups than matrices and vectors")
    for number, name in enumerate(order):
        kept = state["state"].get(number, {})
        if any(not isinstance(kept.get(key), Tensor) for key in ("step", "exp_avg", "exp_avg_sq")) or any(
            kept[key].shape != weights[name].shape for key in ("exp_avg", "exp_avg_sq")
        ):
            raise _refusal(path, f"the moments of {name} are not there, or are another parameter's")
        yield name, {"step": kept["step"].float(), "exp_avg": kept["exp_avg"], "exp_avg_sq": kept["exp_avg_sq"]}


def _refusal(path: Path, why: str) -> UserError:
    return UserError(f"resume_from_nanogpt={path} cannot go on exactly: {why}.")


def _are_tensors(state: Any) -> bool:
    tensors = state.items() if isinstance(state, dict) else ()
    return bool(tensors) and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors)
