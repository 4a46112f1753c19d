"""Repeated training on the same tokens. Imports no torch."""

from gptlab.data.shards.manifest import Manifest

# Up to about this many epochs, repeated tokens are almost as good as new ones (Muennighoff et al. 2023, section 6)
MAX_EPOCHS = 4.0


def count_epochs(tokens: int, manifest: Manifest) -> float:
    """Returns how often a run that trains on ``tokens`` tokens reads the training split."""
    return tokens / manifest.tokens("train")


def repetition_warning(tokens: int, manifest: Manifest) -> str | None:
    """Returns a warning if a run repeats its training data more than about four times, or None.

    Args:
        tokens: Number of tokens that the run trains on.
        manifest: Manifest of its data.
    """
    epochs = count_epochs(tokens, manifest)
    if epochs <= MAX_EPOCHS:
        return None
    size, limit = manifest.tokens("train"), f"{MAX_EPOCHS:.0f} epochs"
    return (
        f"{tokens:,} training tokens are {epochs:,.1f} epochs of {manifest.origin} ({size:,} tokens). Beyond about "
        f"{limit}, repeated data is worth less than new data (Muennighoff et al. 2023), and the model may overfit. Use "
        "more data, or a shorter run."
    )
