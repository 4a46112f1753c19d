"""Captures and replaces a model's activations by name.

Names are those of ``GPT.named_modules``: wte, h.0.ln_1, h.0.attn, h.0.attn.c_attn, h.0, ln_f. The activation of a
module is its output: for a block the residual stream (B, T, C), for an attention layer the tensor (B, T, C) that is
added to the residual stream. h.0.attn.weights is not a module: it names the attention weights (B, nh, T, T).
"""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from fnmatch import fnmatchcase
from functools import partial
from typing import Any

from torch import Tensor, nn

from gptlab.errors import UserError, did_you_mean
from gptlab.model.attention import CausalSelfAttention
from gptlab.model.gpt import GPT

WEIGHTS = ".weights"  # suffix after the name of an attention layer


def activation_names(model: GPT) -> list[str]:
    """Returns the names of all activations that can be captured, in module order."""
    names = []
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            names.append(name)
            if isinstance(module, CausalSelfAttention):
                names.append(name + WEIGHTS)
    return names


@contextmanager
def capture_activations(model: GPT, patterns: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Captures activations of every forward pass within the context; a later pass overwrites those of an earlier one.

    Attention weights are captured only in forward passes without KV cache.

    Args:
        model: The model. Activations are on its device and in the dtype in which they were computed.
        patterns: Names or glob patterns, e.g. ``h.*.mlp``, ``*.attn.weights``.

    Yields:
        A dict from name to activation, filled during the forward pass. The tensors are part of the autograd graph.

    Raises:
        UserError: A pattern matches no name.
    """
    captured: dict[str, Tensor] = {}
    names = [name for pattern in patterns for name in _matching_names(model, pattern)]

    def keep(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, CausalSelfAttention) and name.endswith(WEIGHTS):
            x, ctx = inputs[:2]
            if ctx.cache is None:  # with a cache there are more keys than those of x
                captured[name] = module.weights(x, ctx)
        else:
            captured[name] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as hooks:
        for name in dict.fromkeys(names):
            module = model.get_submodule(name.removesuffix(WEIGHTS))
            hooks.enter_context(module.register_forward_hook(partial(keep, name)))
        yield captured


@contextmanager
def replace_activations(model: GPT, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Applies functions to activations in every forward pass within the context (activation patching, ablation).

    Args:
        model: The model.
        changes: A function from activation to replacement of the same shape, for each name or glob pattern.

    Raises:
        UserError: A pattern matches no name, or matches attention weights, which cannot be replaced.
    """

    def replace(function: Callable[[Tensor], Tensor], module: nn.Module, inputs: Any, output: Any) -> Any:
        return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

    with ExitStack() as hooks:
        for pattern, function in changes.items():
            for name in _matching_names(model, pattern):
                if name.endswith(WEIGHTS):
                    raise UserError(
                        f"{name} can be captured but not replaced: the attention kernels do not return the weights. "
                        f"Replace the output of {name.removesuffix(WEIGHTS)} instead."
                    )
                hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(replace, function)))
        yield


def _matching_names(model: GPT, pattern: str) -> list[str]:
    known = activation_names(model)
    if found := [name for name in known if fnmatchcase(name, pattern)]:
        return found
    raise UserError(f"{pattern} matches no activation of this model.{did_you_mean(pattern, known)}")
