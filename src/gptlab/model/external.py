"""Converts parameters from and to the names and shapes of nanoGPT, transformers and OpenAI's GPT-2 on the Hub."""

import re
from collections.abc import Mapping

import torch
from torch import Tensor

from gptlab.model.gpt import GPT

# prefixes of DDP and torch.compile, and the name under which GPT2LMHeadModel and nanoGPT's GPT hold the decoder
PREFIX = re.compile(r"^(module\.|_orig_mod\.)*(transformer\.)?")
BUFFER = re.compile(r"\.attn\.(bias|masked_bias)$")  # the causal mask, stored by older versions
CONV1D = re.compile(r"\.(c_attn|c_proj|c_fc)\.weight$")
EMBEDDING, POSITIONS, HEAD = "wte.weight", "wpe.weight", "lm_head.weight"
BY_TOKEN = re.compile(r"^(wte|lm_head|value_embeds\.\d+)\.weight$")  # one row per token ID
WITH_BIAS = re.compile(r"^(h\.\d+|ln_f)\.(.*\.)?weight$")  # weights of layers that have a bias in GPT-2


def from_external(state: Mapping[str, Tensor], *, transposed: bool) -> dict[str, Tensor]:
    """Renames the parameters of another program to gptlab's names.

    Args:
        state: Parameters by the other program's names.
        transposed: Whether the matrices of the blocks are stored as (in, out), as in transformers' Conv1D.

    Returns:
        The parameters by gptlab's names, as views; their shapes are not checked.
    """
    named = {PREFIX.sub("", name): tensor for name, tensor in state.items() if not BUFFER.search(name)}
    if not transposed:
        return named
    return {name: tensor.transpose(0, -1) if CONV1D.search(name) else tensor for name, tensor in named.items()}


def fit_shapes(model: GPT, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Fits the parameters returned by ``from_external`` to the shapes of ``model``.

    Positions beyond ``block_size`` and rows beyond the vocabulary size are dropped. Padding rows of the model's
    embedding keep their values. ``state`` is modified in place.

    Args:
        model: The model.
        state: Parameters by gptlab's names.

    Returns:
        The parameters, which ``model.load_weights`` accepts.

    Raises:
        ValueError: A parameter is missing, unknown, of another shape, or not floating-point.
    """
    own = model.state_dict()
    head = state.get(HEAD) if not model.config.tie_weights else state.pop(HEAD, None)
    if model.config.tie_weights and EMBEDDING in state:
        if head is not None and not torch.equal(head, state[EMBEDDING]):
            raise ValueError(f"{HEAD} and {EMBEDDING} differ, but model.tie_weights=true")
        state[HEAD] = state[EMBEDDING]
    if missing := sorted(own.keys() - state.keys()):
        raise ValueError(f"missing parameters: {', '.join(missing[:3])}")
    if unknown := sorted(state.keys() - own.keys()):
        raise ValueError(f"unknown parameters: {', '.join(unknown[:3])}")
    vocab_size, block_size = model.config.known_vocab_size, model.config.block_size
    for name, rows in ((EMBEDDING, vocab_size), (HEAD, vocab_size), (POSITIONS, block_size)):
        state[name] = _with_rows(state[name], own[name], rows)
    for name, tensor in state.items():
        if tensor.shape != own[name].shape or not tensor.is_floating_point():
            found, expected = (f"{tuple(each.shape)} of {each.dtype}" for each in (tensor, own[name]))
            raise ValueError(f"{name} is {found}, expected {expected}")
    return state


def resize_embeddings(state: Mapping[str, Tensor], old: int, model: GPT) -> dict[str, Tensor]:
    """Resizes the parameters that have one row per token ID to the vocabulary of ``model``.

    New rows are the mean of the others (Hewitt 2021, Initializing New Word Embeddings for Pretrained Language Models).

    Args:
        state: Parameters by gptlab's names.
        old: Vocabulary size of ``state``; further rows are padding.
        model: The model, whose padding rows keep their values.
    """
    new, own = model.config.known_vocab_size, model.state_dict()
    resized = dict(state)
    for name, tensor in state.items():
        if BY_TOKEN.match(name) and tensor.dim() == 2:
            rows = tensor[:old]
            mean = rows.float().mean(0, keepdim=True).to(rows.dtype).expand(max(new - old, 0), -1)
            resized[name] = _with_rows(torch.cat((rows, mean)), own[name], new)
    return resized


def unpadded_parameters(model: GPT) -> dict[str, Tensor]:
    """Returns views of the parameters, without the padding rows of the vocabulary and without a tied head."""
    rows = model.config.known_vocab_size
    named = ((name, parameter.detach()) for name, parameter in model.named_parameters())
    return {name: tensor[:rows] if BY_TOKEN.match(name) else tensor for name, tensor in named}


def to_external(model: GPT, *, transposed: bool, biases: bool) -> dict[str, Tensor]:
    """Renames parameters to the names of nanoGPT and transformers; inverts ``from_external`` and ``fit_shapes``.

    Args:
        model: A model with ``config.is_gpt2``; those programs have no names for the parameters of other options.
        transposed: As in ``from_external``.
        biases: Whether to add zero biases if the model has no biases.

    Returns:
        The parameters without a tied head, as views, except for zero biases.
    """
    named: dict[str, Tensor] = {}
    for name, tensor in unpadded_parameters(model).items():
        prefix = "" if name == HEAD else "transformer."
        named[prefix + name] = tensor.transpose(0, -1) if transposed and CONV1D.search(name) else tensor
        if biases and not model.config.bias and WITH_BIAS.match(name):
            named[prefix + name.removesuffix("weight") + "bias"] = tensor.new_zeros(len(tensor))
    return named


def _with_rows(external: Tensor, own: Tensor, rows: int) -> Tensor:
    """Returns ``own`` (R, C) with its first ``rows`` rows from ``external``, or ``external`` if it does not fit."""
    if external.shape[1:] != own.shape[1:] or len(external) < rows or not external.is_floating_point():
        return external
    return external[:rows] if rows == len(own) else torch.cat((external[:rows].to(own.dtype), own[rows:]))
