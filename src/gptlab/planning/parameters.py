"""Where the parameters are. Imports no torch."""

from typing import NamedTuple

from gptlab.model.config import GPTConfig, parameter_count


class ParameterShares(NamedTuple):
    """Parameters of one device.

    Attributes:
        blocks: Of all blocks.
        matrices: Of them those that Muon trains: the matrices of the blocks.
        rest: Embeddings, last norm, a head of its own.
    """

    blocks: int
    matrices: int
    rest: int

    @property
    def all(self) -> int:
        """Every parameter."""
        return self.blocks + self.rest


def count_by_part(config: GPTConfig) -> dict[str, int]:
    """Count the parameters of each part of the network; together they are ``parameter_count``."""
    width, rows = config.n_embd, config.padded_vocab_size
    parts = {
        "wte": rows * width,
        "wpe": config.block_size * width if config.positions == "learned" else 0,
        "value_embeds": config.value_embeddings * rows * width,
        "attention": config.n_layer * (4 * width * width + 4 * width * config.bias),
        "mlp": config.n_layer * (8 * width * width + 5 * width * config.bias),
        "lm_head": 0 if config.tie_weights else rows * width,
    }
    norms = parameter_count(config) - sum(parts.values())  # and the few weights that mix
    return {name: count for name, count in (parts | {"norms": norms}).items() if count}


def count_shares(config: GPTConfig, split: int = 1) -> ParameterShares:
    """Count the parameters of a device, where so many share the blocks between them (norms stay whole)."""
    total = parameter_count(config)
    parts = count_by_part(config)
    matrices = config.n_layer * 12 * config.n_embd**2
    last = config.n_embd * (2 if config.bias and config.norm == "layer" else 1) * (1 + config.embedding_norm)
    rest = last + sum(parts.get(name, 0) for name in ("wte", "wpe", "value_embeds", "lm_head"))
    blocks = total - rest
    return ParameterShares(blocks - matrices + matrices // split, matrices // split, rest)
