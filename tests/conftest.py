"""What tests share: a small model's configuration, and commands run as a user runs them."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from gptlab.model.config import GPTConfig

TINY: dict[str, Any] = {
    "block_size": 16,
    "vocab_size": 61,
    "n_layer": 2,
    "n_head": 2,
    "n_embd": 32,
    "bias": True,
    "dropout": 0.0,
    "activation": "gelu_tanh",
    "tie_weights": True,
    "pad_vocab_to_multiple_of": 1,
    "activation_checkpointing": False,
}


def tiny_config(**changes: Any) -> GPTConfig:
    return GPTConfig(**TINY | changes)


class User:
    """Types commands in an empty folder, with a small text at hand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.environment = os.environ | {"GPTLAB_CACHE": str(folder / "cache"), "OMP_NUM_THREADS": "1"}
        # varied enough that a model learns something, and as much of it as the tests need
        lines = (f"line {i}: the {['cat', 'dog', 'cow'][i % 3]} has {i * i % 97} of {i % 7}\n" for i in range(2000))
        (folder / "text.txt").write_text("".join(lines))

    def run(self, *command: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, cwd=self.folder, env=self.environment, capture_output=True, text=True, timeout=timeout, check=False
        )

    def python(self, module: str, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        return self.run(sys.executable, "-m", module, *arguments, **options)

    def train(self, *arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
        """Train a tiny model on the text, quickly; ``arguments`` come after the small settings."""
        small = ("data=text", "data.source=text.txt", "model=tiny", "model.block_size=32", "train.max_steps=6")
        rhythm = ("train.eval_every=3", "train.eval_windows=10", "train.log_every=1")
        return self.python("gptlab.train", *small, *rhythm, *arguments, **options)

    def only_run(self, name: str = "quickstart") -> Path:
        """The one run directory there is under a name."""
        (directory,) = (self.folder / "outputs" / name).iterdir()
        return directory


@pytest.fixture
def user(tmp_path: Path) -> User:
    return User(tmp_path)
