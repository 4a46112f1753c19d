"""What "auto" means, as far as no device has to be asked for it. Imports no torch."""

from typing import Literal

from gptlab.model.config import GPTConfig
from gptlab.training.config import TrainConfig, TrainerConfig

WIDE = 384  # n_embd from which a CPU gains by bfloat16
WIDER = 512  # and from which it gains by compilation, and a run is long enough for it to pay
MAX_LOGITS = 2**26  # bytes of float32 logits that may be there at a time


def resolve_loss_chunk(wanted: int | Literal["auto"] | None, model: GPTConfig) -> int | None:
    """Tokens whose logits are there at a time; on "auto" as many as need 64 MiB."""
    return MAX_LOGITS // (4 * model.padded_vocab_size) if wanted == "auto" else wanted


def is_for_speed(trainer: TrainerConfig, model: GPTConfig, width: int) -> bool:
    """Whether a CPU is to train a large model; several processes on one only try out what GPUs will do."""
    return trainer.strategy == "single" and model.n_embd >= width


def resolve_compile(trainer: TrainerConfig, train: TrainConfig, *, gains: bool) -> Literal[False, "whole", "blocks"]:
    """Say what is compiled where a device gains by it, or does not.

    Sharding runs hooks between the blocks, so that these alone can be compiled there.
    """
    if not (gains if train.compile == "auto" else train.compile):
        return False
    return "blocks" if train.compile == "blocks" or trainer.strategy in ("fsdp", "fsdp_tp") else "whole"
