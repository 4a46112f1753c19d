"""What is known of a model beside its weights. Imports no torch."""

from pathlib import Path
from typing import NamedTuple, Self

from gptlab.data.shards.manifest import load_manifest
from gptlab.pretrained.source import ModelSource
from gptlab.tracking.run_store.runs import Run


class ModelCardInfo(NamedTuple):
    """Of a run, where its weights are the best; all None for a model of another origin.

    Attributes:
        dataset: What it was trained on, without the place where that lies.
        step: After which its weights are taken.
        tokens: Seen until then.
        val_loss: In nats per token.
        bits_per_byte: The same per byte of text.
    """

    dataset: str | None = None
    step: int | None = None
    tokens: int | None = None
    val_loss: float | None = None
    bits_per_byte: float | None = None

    @classmethod
    def of(cls, source: ModelSource) -> Self:
        """Gather what the run directory holds."""
        if not source.is_run:
            return cls()
        origin = load_manifest(source.path).origin
        dataset = Path(origin).name if Path(origin).is_absolute() else origin  # no path of this machine
        scored = [row for row in Run(source.path).rows if "val/loss" in row]
        if not scored:
            return cls(dataset)
        best = min(scored, key=lambda row: row["val/loss"])
        step, tokens = int(best["step"]), int(best["tokens"])
        return cls(dataset, step, tokens, best["val/loss"], best.get("val/bits_per_byte"))


def model_title(source: ModelSource) -> str:
    """Name a model without the place where it lies."""
    return Run(source.path).name if source.is_run else Path(source.name.removeprefix("hf://")).name
