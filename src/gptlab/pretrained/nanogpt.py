"""nanoGPT checkpoints: read without arbitrary unpickling, and converted to resume training exactly.

A resumed run starts with nanoGPT's weights, AdamW state and step. Its batches are those of a gptlab run with the same
config from that step on, because nanoGPT draws every batch at random, in an order that cannot be resumed. nanoGPT's
softmax includes the padding of its vocabulary (47 of 50,304 logits for GPT-2), and gptlab's softmax excludes it.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.model.external import EMBEDDING, HEAD, from_external
from gptlab.model.gpt import GPT
from gptlab.pretrained.external import check_external_shape, nanogpt_shape
from gptlab.training.checkpoints.reading import Checkpoint, read_plain
from gptlab.training.config import AdamWConfig
from gptlab.training.optim.optimizers import parameter_groups
from gptlab.training.optim.schedules import learning_rate

MODEL_ARGS = {"n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout"}  # nanoGPT's train.py


def read_nanogpt_checkpoint(path: Path) -> dict[str, Any]:
    """Reads a nanoGPT checkpoint with memory-mapped tensors.

    Raises:
        UserError: The file is not a nanoGPT checkpoint.
    """
    checkpoint = read_plain(path)
    if not isinstance(checkpoint, dict) or not _are_tensors(checkpoint.get("model", {})):
        raise UserError(
            f"{path} is not a nanoGPT checkpoint: its key 'model' must map names to tensors. To use a gptlab run, pass "
            "its run directory."
        )
    return checkpoint


def import_nanogpt_checkpoint(path: Path, config: RunConfig, model: GPT) -> Checkpoint:
    """Converts a nanoGPT checkpoint to a Lightning checkpoint of a run with ``config`` at the same step.

    Args:
        path: nanoGPT's ckpt.pt.
        config: Config of the run that resumes it.
        model: Model of that run.

    Raises:
        UserError: The file is not a complete nanoGPT checkpoint, or the next step would differ from nanoGPT's.
    """
    checkpoint = read_nanogpt_checkpoint(path)
    step, state = checkpoint.get("iter_num"), checkpoint.get("optimizer")
    if not isinstance(step, int) or not isinstance(state, dict) or not state.get("state"):
        raise _mismatch(path, "it lacks iter_num or the optimizer state. To load only the weights, use init_from")
    if step >= config.steps:
        raise _mismatch(path, f"it is at step {step:,}, but train.max_steps={config.steps:,} is not greater")
    _check_settings(path, config, step, state["param_groups"])
    _check_batches(path, config, checkpoint.get("config"))
    arguments: Any = checkpoint.get("model_args")
    _check_model(path, config, nanogpt_shape(path, arguments))
    if unknown := sorted(map(str, arguments.keys() - MODEL_ARGS)):
        raise _mismatch(path, f"its model_args have options that nanoGPT does not have: {', '.join(unknown[:3])}")
    weights = from_external(checkpoint["model"], transposed=False)
    if EMBEDDING in weights and arguments["vocab_size"] != len(weights[EMBEDDING]):
        rows = f"vocab_size={arguments['vocab_size']}, but {EMBEDDING} has {len(weights[EMBEDDING])} rows"
        raise _mismatch(path, f"its model_args have {rows}")
    if HEAD in weights and not torch.equal(weights[HEAD], weights.get(EMBEDDING, weights[HEAD][:0])):
        raise _mismatch(path, f"{HEAD} and {EMBEDDING} differ, but nanoGPT ties them")
    if broken := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise _mismatch(path, f"{broken[0]} has values that are not finite")
    own = {name: tensor for name, tensor in model.state_dict().items() if name != HEAD}
    if unknown := sorted(weights.keys() - own.keys() - {HEAD}):
        raise _mismatch(path, f"it has parameters that this run does not have: {', '.join(unknown[:3])}")
    moments = dict(_adam_states(path, state, {name: tensor for name, tensor in weights.items() if name != HEAD}))
    if shapes := [name for name in own if name not in weights or weights[name].shape != own[name].shape]:
        raise _mismatch(
            path,
            f"{shapes[0]} is {tuple(weights[shapes[0]].shape) if shapes[0] in weights else 'missing'} in the "
            f"checkpoint and {tuple(own[shapes[0]].shape)} in this run. The number of rows of the embedding depends on "
            "model.pad_vocab_to_multiple_of",
        )
    if late := [name for name, values in moments.items() if int(values["step"]) != step]:
        raise _mismatch(
            path, f"its AdamW has updated {late[0]} {int(moments[late[0]]['step']):,} times instead of {step:,} times"
        )
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = [{"params": [names[p] for p in g["params"]]} for g in parameter_groups(model, config.optimizer)]
    return {  # keys as in ``_CheckpointConnector.dump_checkpoint`` of lightning 2.6.6
        "epoch": 0,
        "global_step": step,
        "pytorch-lightning_version": "2.6.5",
        "callbacks": {},
        "lr_schedulers": [],
        "state_dict": {name: (weights[EMBEDDING] if name == HEAD else weights[name]) for name in model.state_dict()},
        "optimizer_states": [{"state": moments, "param_groups": groups}],
    }


def _check_model(path: Path, config: RunConfig, shape: Mapping[str, Any]) -> None:
    """Checks that the model computes the same loss as nanoGPT's with the same weights."""
    try:
        check_external_shape(path, shape, config.model)
    except UserError as error:
        raise _mismatch(path, str(error).rstrip(".")) from None
    if config.model.components:
        raise _mismatch(path, f"this run has components of its own: {', '.join(config.model.components) or 'model'}")
    if shape["block_size"] != config.model.block_size:
        raise _mismatch(path, f"model.block_size={config.model.block_size}, but it has {shape['block_size']}")
    if config.loss is not None:
        raise _mismatch(path, "nanoGPT's loss is the cross-entropy, but this run has a loss of its own (loss)")
    if config.train.ema_decay is not None:
        raise _mismatch(path, "it has no averages of the weights, which train.ema_decay would resume")


def _check_settings(path: Path, config: RunConfig, step: int, groups: list[dict[str, Any]]) -> None:
    """Checks that the next optimizer step is identical to nanoGPT's."""
    own = config.optimizer
    if not isinstance(own, AdamWConfig):
        raise _mismatch(path, f"its optimizer is AdamW, but this run has optimizer={own.name}. Use optimizer=adamw")
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
    if differences := [
        f"{key} is {theirs} in the checkpoint and {ours} in this run"
        for key, (ours, theirs) in wanted.items()
        if ours != theirs
    ]:
        raise _mismatch(path, "; ".join(differences))


def _check_batches(path: Path, config: RunConfig, theirs: Any) -> None:
    """Checks the size of the batches and what the model sees of them; ``theirs`` are nanoGPT's settings, if known."""
    if config.data.documents != "packed":
        raise _mismatch(path, f"nanoGPT attends across documents, but data.documents={config.data.documents}")
    theirs = theirs if isinstance(theirs, dict) else {}
    batch, accumulation = (theirs.get(key) for key in ("batch_size", "gradient_accumulation_steps"))
    rows = batch * accumulation if isinstance(batch, int) and isinstance(accumulation, int) else None
    for key, own, their in (
        ("train.global_batch_size", config.train.global_batch_size, rows),
        ("train.grad_clip", config.train.grad_clip or 0.0, theirs.get("grad_clip")),
    ):
        if their is not None and own != their:
            raise _mismatch(path, f"{key} is {their} in the checkpoint and {own} in this run")


def _adam_states(
    path: Path, state: Mapping[str, Any], weights: Mapping[str, Tensor]
) -> Iterator[tuple[str, dict[str, Tensor]]]:
    """Yields the optimizer state of each parameter. nanoGPT numbers parameters in module order, matrices first."""
    order = [name for name in weights if weights[name].dim() >= 2] + [n for n in weights if weights[n].dim() < 2]
    if [number for group in state["param_groups"] for number in group["params"]] != list(range(len(order))):
        raise _mismatch(path, "its optimizer must have two parameter groups, for matrices and for vectors")
    for number, name in enumerate(order):
        values = state["state"].get(number, {})
        if any(not isinstance(values.get(key), Tensor) for key in ("step", "exp_avg", "exp_avg_sq")) or any(
            values[key].shape != weights[name].shape for key in ("exp_avg", "exp_avg_sq")
        ):
            raise _mismatch(path, f"the optimizer state of {name} is missing or has the wrong shape")
        yield name, {"step": values["step"].float(), "exp_avg": values["exp_avg"], "exp_avg_sq": values["exp_avg_sq"]}


def _mismatch(path: Path, reason: str) -> UserError:
    return UserError(f"resume_from_nanogpt={path} cannot be resumed exactly: {reason}.")


def _are_tensors(state: Any) -> bool:
    tensors = state.items() if isinstance(state, dict) else ()
    return bool(tensors) and all(isinstance(name, str) and isinstance(tensor, Tensor) for name, tensor in tensors)
