"""What happens within a network: its activations by name, and what becomes of them when they are changed.

Names are those of the modules (``GPT.named_modules``): wte, h.0.ln_1, h.0.attn, h.0.attn.c_attn, h.0, ln_f.
Of a block or its attention, what is meant is what it returns first: the residual stream (B, T, C), and what attention
adds to it. h.0.attn.weights are no module: how much each position looks at each (B, nh, T, T).
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


def names_of(model: GPT) -> list[str]:
    """All names that can be captured, in the order of the network."""
    names = []
    for name, module in model.named_modules():
        if name and not isinstance(module, nn.ModuleList):
            names.append(name)
            if isinstance(module, CausalSelfAttention):
                names.append(name + WEIGHTS)
    return names


@contextmanager
def captured(model: GPT, patterns: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Keep activations of every forward pass within; a later pass replaces those of an earlier one.

    Attention's weights are those of a pass over a whole text, and not of one token after the other in generation.

    Args:
        model: On which device and in which type it is, its activations are.
        patterns: Names, or patterns of such: ``h.*.mlp``, ``*.attn.weights``.

    Yields:
        The activations by name, as they come. They are part of the graph: gradients flow through them.

    Raises:
        UserError: There is nothing of such a name.
    """
    found: dict[str, Tensor] = {}
    names = [name for pattern in patterns for name in _matching(model, pattern)]

    def keep(name: str, module: nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        if isinstance(module, CausalSelfAttention) and name.endswith(WEIGHTS):
            x, seen, others, cache, _ = inputs
            if cache is None:  # else there are keys beyond those of x
                found[name] = module.weights(x, seen, others)
        else:
            found[name] = output[0] if isinstance(output, tuple) else output

    with ExitStack() as hooks:
        for name in dict.fromkeys(names):
            module = model.get_submodule(name.removesuffix(WEIGHTS))
            hooks.enter_context(module.register_forward_hook(partial(keep, name)))
        yield found


@contextmanager
def changed(model: GPT, changes: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Put functions of activations in their place in every forward pass within (activation patching, ablation).

    Args:
        model: To be looked into.
        changes: Functions by names or patterns; the weights of attentions cannot be changed, only what these return.

    Raises:
        UserError: There is nothing of such a name.
    """

    def change(function: Callable[[Tensor], Tensor], module: nn.Module, inputs: Any, output: Any) -> Any:
        return (function(output[0]), *output[1:]) if isinstance(output, tuple) else function(output)

    with ExitStack() as hooks:
        for pattern, function in changes.items():
            for name in _matching(model, pattern):
                if name.endswith(WEIGHTS):
                    raise UserError(f"{name} can be captured, not changed: the kernels never write them down.")
                hooks.enter_context(model.get_submodule(name).register_forward_hook(partial(change, function)))
        yield


def _matching(model: GPT, pattern: str) -> list[str]:
    known = names_of(model)
    if found := [name for name in known if fnmatchcase(name, pattern)]:
        return found
    raise UserError(f"{pattern} is nothing in this network.{did_you_mean(pattern, known)}")
