"""Writes random tokens of GPT-2's vocabulary in nanoGPT's format: python random_tokens.py <directory>."""

import sys
from pathlib import Path

import numpy as np

TOKENS = {"train": 40_000_000, "val": 2_000_000}


def main() -> None:
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    for split, tokens in TOKENS.items():
        ids = (50256 * rng.power(0.35, tokens)).astype(np.uint16)  # a skewed distribution, like that of words
        ids.tofile(folder / f"{split}.bin")


if __name__ == "__main__":
    main()
