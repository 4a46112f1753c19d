"""gptlab: a PyTorch Lightning + Hydra experiment framework for GPT-2 class language models."""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptlab.pretrained.language_model import LanguageModel, load

__all__ = ["LanguageModel", "load"]


def __getattr__(name: str) -> Any:
    """Imports public names on first access, since importing torch takes seconds and most commands start without it."""
    if name in __all__:
        from gptlab.pretrained import language_model

        return getattr(language_model, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
