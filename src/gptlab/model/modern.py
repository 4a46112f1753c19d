"""Model variants introduced after GPT-2, selected by the fields of ``GPTConfig``, which cites the papers.

A model and its parts can be components. Each is a class or function that is called with the arguments of its config
node and, if it has such parameters, with ``config`` (``GPTConfig``) and ``layer`` (number of the block, from 0; None
for norms outside of the blocks):

- ``model``: a ``CausalLM``, for example a subclass of ``GPT`` or ``ModernGPT``.
- ``model.block``: a module with ``forward(x, ctx)``, from the residual stream x (B, T, C) to the same shape. ``ctx`` is
  the ``AttentionContext``, for the attention of the block.
- ``model.attention``: a module with ``forward(x, ctx)``, from the normalized residual stream x (B, T, C) to the same
  shape. ``CausalSelfAttention.attend`` handles masks, dropout and the KV cache. A module that does not use
  ``ctx.cache`` still generates text, at the speed of a model without KV cache.
- ``model.norm``, ``model.activation``: a module with ``forward(x)``, from x (..., C) to the same shape.

A function instead of a class must be annotated to return a ``torch.nn.Module``.

Shapes: B batch, T time, C channels (``n_embd``), nh heads, hs head size.
"""

from inspect import isclass, isfunction
from typing import cast, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from gptlab.config.components import TARGET, build_component, check_component, import_target
from gptlab.errors import UserError
from gptlab.model.attention import AttentionContext, CausalSelfAttention, rotate
from gptlab.model.causal_lm import CausalLM
from gptlab.model.config import NORM_EPSILON, ComponentModelConfig, GPTConfig
from gptlab.model.gpt import ACTIVATIONS, GPT, MLP
from gptlab.model.kernels import attention_weights
from gptlab.model.loss import LogitSettings


def build_gpt(config: GPTConfig) -> GPT:
    """Builds the model of a configuration: its component, ``GPT`` if ``config.is_gpt2``, otherwise ``ModernGPT``.

    A component may be any ``CausalLM``. The annotation is ``GPT``, because only components can be another class.

    Raises:
        ValueError: ``config.vocab_size`` is None.
    """
    if isinstance(config, ComponentModelConfig):
        check_model(config)
        return cast(GPT, build_component(config.component, config=config))
    return GPT(config) if config.is_gpt2 else ModernGPT(config)


def meta_gpt(config: GPTConfig) -> GPT:
    """Builds a model on the meta device, where parameters use no memory; ``GPT.load_weights`` sets its weights."""
    with torch.device("meta"):
        return build_gpt(config)


def check_model(config: ComponentModelConfig) -> None:
    """Checks the class and the arguments of a model that is a component; raises UserError."""
    check_component("model", config.component, CausalLM, handed=("config",))


def check_part(config: GPTConfig, name: str) -> None:
    """Checks the target and the arguments of a part of the model that is a component; raises UserError.

    The target must be a subclass of ``torch.nn.Module``, or a function that is annotated to return one.
    """
    values = config.components[name]
    target = import_target(f"model.{name}", values[TARGET])
    returned = get_type_hints(target).get("return") if isfunction(target) else target
    if not (isclass(returned) and issubclass(returned, nn.Module)) or issubclass(returned, CausalLM):
        raise UserError(
            f"model.{name}.{TARGET}={values[TARGET]} is neither a part of a model, which is a subclass of "
            "torch.nn.Module, nor a function that is annotated to return one."
        )
    check_component(f"model.{name}", values, handed=("config", "layer"))


class ReLUSquared(nn.Module):
    """Squared ReLU (So et al. 2021, Primer, section 4.1)."""

    def forward(self, x: Tensor) -> Tensor:
        """Applies squared ReLU elementwise; same shape."""
        return F.relu(x).square()


MODERN_ACTIVATIONS = {**ACTIVATIONS, "relu_squared": ReLUSquared}


class WeightedSum(nn.Module):
    """Sum of tensors of one shape, each with a learned scalar weight."""

    def __init__(self, *initial: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(initial))

    def forward(self, *terms: Tensor) -> Tensor:
        """Returns the weighted sum of ``terms``, one per weight."""
        return sum(weight * term for weight, term in zip(self.weight.unbind(), terms, strict=True))  # type: ignore[return-value]


class ModernAttention(CausalSelfAttention):
    """Attention with optional sliding window, QK-norm, rotary positions and additional values."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__(config, layer)
        self.uses_window, self.qk_norm = not config.is_global(layer), config.qk_norm
        extra = config.num_extra_values(layer)
        self.mix_values = WeightedSum(*[0.5] * (1 + extra)) if extra else None  # as in modded-nanogpt

    def forward(  # type: ignore[override]  # also takes and returns values
        self, x: Tensor, ctx: AttentionContext, extra_values: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Computes self-attention over ``x`` (B, T, C), with ``extra_values`` (each B, T, C) mixed into its values.

        Returns:
            The output and the values before mixing, both (B, T, C).
        """
        q, k, values = self.c_attn(x).chunk(3, dim=2)
        v = values if self.mix_values is None else self.mix_values(values, *extra_values)
        q, k = self.queries_and_keys(q, k, ctx)
        return self.attend(q, k, self.split_heads(v), ctx), values

    def queries_and_keys(self, q: Tensor, k: Tensor, ctx: AttentionContext) -> tuple[Tensor, Tensor]:
        """Splits queries and keys (B, T, C) into heads (B, nh, T, hs), then normalizes and rotates them."""
        q, k = self.split_heads(q), self.split_heads(k)
        if self.qk_norm:
            # with autocast on CUDA, rms_norm returns float32 (since torch 2.12)
            q, k = (F.rms_norm(part, (self.head_size,), eps=NORM_EPSILON).to(part.dtype) for part in (q, k))
        if ctx.rotary is not None:
            q, k = rotate(q, ctx.rotary), rotate(k, ctx.rotary)
        return q, k

    def weights(self, x: Tensor, ctx: AttentionContext) -> Tensor:
        """Returns the attention weights (B, nh, T, T) of a forward pass without KV cache."""
        q, k, _ = self.c_attn(x).chunk(3, dim=2)
        return attention_weights(*self.queries_and_keys(q, k, ctx), self.mask(ctx))


class ModernBlock(nn.Module):
    """Pre-norm residual block that adds skip connections to its input."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.mix_skip = WeightedSum(1.0) if config.has_skip(layer) else None
        self.mix_x0 = WeightedSum(1.0, 0.0) if config.x0_skips else None
        self.ln_1 = _norm(config, layer)
        self.is_attention_builtin = config.attention is None
        self.attn = _attention(config, layer)
        self.ln_2 = _norm(config, layer)
        self.mlp = MLP(config, _activation(config, layer))

    def forward(
        self, x: Tensor, ctx: AttentionContext, x0: Tensor, skip: Tensor | None, extra_values: tuple[Tensor, ...]
    ) -> tuple[Tensor, Tensor]:
        """Transforms the residual stream.

        FSDP looks for tensors that need a gradient among the arguments, so these tensors are not part of ``ctx``.

        Args:
            x: Output of the previous block (B, T, C).
            ctx: Attention context of the forward pass.
            x0: Embedding (B, T, C), for ``x0_skips``.
            skip: Output (B, T, C) of the mirrored block of the first half, for ``unet_skips``.
            extra_values: Tensors (B, T, C) to mix into the values of the block.

        Returns:
            The output and the block's values before mixing, both (B, T, C).
        """
        if self.mix_skip is not None and skip is not None:
            x = x + self.mix_skip(skip)
        if self.mix_x0 is not None:
            x = self.mix_x0(x, x0)
        if self.is_attention_builtin:
            y, values = self.attn(self.ln_1(x), ctx, extra_values)
        else:
            y = values = self.attn(self.ln_1(x), ctx)  # its values are not used by other blocks
        x = x + y
        x = x + self.mlp(self.ln_2(x))
        return x, values


class ModernGPT(GPT):
    """GPT with any combination of options; see ``GPT``."""

    def __init__(self, config: GPTConfig) -> None:
        CausalLM.__init__(self, config)  # not GPT.__init__: the order of modules determines that of random draws
        self.logit_settings = LogitSettings(config.known_vocab_size, config.logit_soft_cap)
        size = config.known_vocab_size
        self.wte = nn.Embedding(size, config.n_embd)
        wpe = nn.Embedding(config.block_size, config.n_embd) if config.positions == "learned" else None
        self.register_module("wpe", wpe)
        self.ln_e = _norm(config, None) if config.embedding_norm else None
        self.value_embeds = nn.ModuleList(nn.Embedding(size, config.n_embd) for _ in range(config.value_embeddings))
        self.drop = nn.Dropout(config.dropout)
        self.h = nn.ModuleList(_block(config, layer) for layer in range(config.n_layer))
        self.ln_f = _norm(config, None)
        self.lm_head = nn.Linear(config.n_embd, size, bias=False)
        self.tie_weights()
        self.init_weights()
        self.pad_vocab(self.wte, *(embed for embed in self.value_embeds if isinstance(embed, nn.Embedding)))

    def hidden_states(self, idx: Tensor, ctx: AttentionContext) -> Tensor:
        """Returns the final hidden states (B, T, C), which are the input of the head."""
        config = self.config
        value_embeds = [embed(idx) for embed in self.value_embeds]  # (B, T, C) each
        x = self.wte(idx) if self.wpe is None else self.wte(idx) + self.wpe(ctx.positions)
        x = x0 = self.drop(x if self.ln_e is None else self.ln_e(x))
        first_values: tuple[Tensor, ...] = ()  # of the first block
        outputs: list[Tensor] = []  # of the first half of the blocks
        for layer, block in enumerate(self.h):
            if config.block is not None:
                x = self.run_block(block, x, ctx)
                continue
            number = config.value_embedding(layer)
            extra_values = first_values if number is None else (*first_values, value_embeds[number])
            skip = outputs.pop() if config.has_skip(layer) else None
            x, values = self.run_block(block, x, ctx, x0, skip, extra_values)
            if config.value_residual and layer == 0:
                first_values = (values,)
            if config.unet_skips and layer < config.n_layer // 2:
                outputs.append(x)
        return self.ln_f(x)

    def init_parameter(self, name: str, parameter: Tensor) -> None:
        """Initializes a parameter as in GPT-2; with ``zero_init``, projections and an untied head are 0."""
        if self.config.zero_init and name.endswith(("c_proj.weight", "lm_head.weight")):
            nn.init.zeros_(parameter)
        else:
            super().init_parameter(name, parameter)


def _block(config: GPTConfig, layer: int) -> nn.Module:
    return ModernBlock(config, layer) if config.block is None else _build_part(config, "block", layer)


def _attention(config: GPTConfig, layer: int) -> nn.Module:
    return ModernAttention(config, layer) if config.attention is None else _build_part(config, "attention", layer)


def _activation(config: GPTConfig, layer: int) -> nn.Module:
    if isinstance(config.activation, str):
        return MODERN_ACTIVATIONS[config.activation]()
    return _build_part(config, "activation", layer)


def _norm(config: GPTConfig, layer: int | None) -> nn.Module:
    """Builds the norm of a block or, if ``layer`` is None, that of the embedding or of the last block's output."""
    match config.norm:
        case "rms":
            return nn.RMSNorm(config.n_embd, eps=NORM_EPSILON)
        case "layer":
            return nn.LayerNorm(config.n_embd, eps=NORM_EPSILON, bias=config.bias)
    return _build_part(config, "norm", layer)


def _build_part(config: GPTConfig, name: str, layer: int | None) -> nn.Module:
    """Checks and builds a part of the model that is a component.

    Raises:
        UserError: The component is invalid, or a function that builds it returns no module.
    """
    check_part(config, name)
    part = build_component(config.components[name], config=config, layer=layer)
    if not isinstance(part, nn.Module):
        raise UserError(
            f"model.{name}.{TARGET}={config.components[name][TARGET]} returns {type(part).__name__}, which is not a "
            "torch.nn.Module."
        )
    return part
