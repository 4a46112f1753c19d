"""gptlab: a PyTorch Lightning + Hydra experiment framework for GPT-2 class language models."""

import sys
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from gptlab.errors import TrainingError, UserError
    from gptlab.launch.train_process import train
    from gptlab.pretrained.language_model import LanguageModel, load
    from gptlab.tracking.run_store.runs import Run

if sys.platform == "win32":  # before modules that do not exist there are imported
    sys.stderr.write("gptlab: Windows is not supported. Use the Windows Subsystem for Linux (WSL 2).\n")
    raise SystemExit(2)  # CONFIG_ERROR in gptlab.exit_codes

__all__ = ["LanguageModel", "Run", "TrainingError", "UserError", "load", "train"]

_MODULES = {
    "LanguageModel": "gptlab.pretrained.language_model",
    "Run": "gptlab.tracking.run_store.runs",
    "TrainingError": "gptlab.errors",
    "UserError": "gptlab.errors",
    "load": "gptlab.pretrained.language_model",
}


def __getattr__(name: str) -> Any:
    """Imports public names on first access, since importing torch takes seconds and most commands start without it."""
    if name == "train":
        return import_module("gptlab.train")  # a module that can be called
    if name in _MODULES:
        return getattr(import_module(_MODULES[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
