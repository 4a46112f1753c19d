"""Capture of a model's activations by name, and their replacement.

Names are those of the modules (``GPT.named_modules``): wte, h.0.ln_1, h.0.attn, h.0.attn.c_attn, h.0, ln_f. The
activation of a module is its output: of a block the residual stream (B, T, C), of an attention what it adds to it.
h.0.attn.weights is no module: the attention weights (B, nh, T, T).
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

WEIGHTS = ".weights"  # after the name of an attention


def activation_names(model: GPT) -> list[str]:
    """Returns all names that can be captured, in the order of the model."""
    names = []
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            names.append(name)
            if isinstance(module, CausalSelfAttention):
                names.append(name + WEIGHTS)
    return names


@contextmanager
def capture_activations(model: GPT, patterns: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Keeps activations of every forward pass in the context; a later pass replaces those of an earlier one.

    Attention weights are those of passes over whole sequences, not of cached generation.

    Args:
        model: The model; activations are on its device and in its type.
        patterns: Names, or patterns of names: ``h.*.mlp``, ``*.attn.weights``.

    Yields:
        The activations by name, as they are computed. They are part of the graph: gradients flow through them.

    Raises:
        UserError: No name matches a pattern.
    """
    captured: dict[str, Tensor] = {}
    names = [name for pattern in patterns for name in _matching_names(model, pattern)]

    def keep(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, CausalSelfAttention) and name.endswith(WEIGHTS):
            x, ctx = inputs[:2]
            if ctx.cache is None:  # otherwise there are keys beyond those of x
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
    """Replaces activations by functions of them in every forward pass in the context (activation patching, ablation).

    Args:
        model: The model.
        changes: Functions by names or patterns; the output of an attention can be replaced, but not its weights.

    Raises:
        UserError: No name matches a pattern.
    """

    def replace(function: Callable[[Tensor], Tensor], module: nn.Module, inputs: Any, output: Any) -> Any:
        return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

    with ExitStack() as hooks:
        for pattern, function in changes.items():
            for name in _matching_names(model, pattern):
                if name.endswith(WEIGHTS):
                    raise UserError(f"{name} can be captured, not changed: the kernels never write them down.")
                hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(replace, function)))
        yield


def _matching_names(model: GPT, pattern: str) -> list[str]:
    known = activation_names(model)
    if found := [name for name in known if fnmatchcase(name, pattern)]:
        return found
    raise UserError(f"{pattern} is nothing in this network.{did_you_mean(pattern, known)}")
