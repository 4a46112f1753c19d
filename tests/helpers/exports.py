"""Models to export, and exports within the test process."""

import copy
from pathlib import Path

import torch

from conftest import tiny_config
from gptlab.data.tokenizers.tokenizer import BPETokenizer, BytesTokenizer, CharactersTokenizer, GPT2Tokenizer, Tokenizer
from gptlab.exporters import exporter
from gptlab.exporters.certificate import Certificate
from gptlab.model.gpt import GPT
from gptlab.model.modern import build_gpt
from gptlab.pretrained.source import ModelSource

TEXT = "the cat, the dog and 3 cows; it's é\n\n\tand  more\n"


def random_model(**changes) -> GPT:
    """Returns a model whose biases and LayerNorm weights differ from 0 and 1, so that errors in them are visible."""
    model = build_gpt(tiny_config(**changes)).eval().requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.normal_(std=0.3, generator=generator)
    return model


def tokenizer_of(kind: str) -> Tokenizer:
    if kind == "bpe":
        return BPETokenizer.train([TEXT * 20], 280)
    return {
        "bytes": BytesTokenizer,
        "characters": lambda: CharactersTokenizer("".join(sorted(set(TEXT)))),
        "gpt2": lambda: GPT2Tokenizer(None),
    }[kind]()


def export(
    monkeypatch, out: Path, model: GPT, form: str, dtype: str = "float32", tokenizer: Tokenizer | None = None
) -> Certificate:
    """Exports ``model`` as if it had been loaded from a file."""
    monkeypatch.setattr(exporter, "load_model", lambda _: copy.deepcopy(model))
    record = tokenizer.record() if tokenizer is not None else None
    return exporter.export_model(ModelSource("model", out.parent, model.config, record, None), form, dtype, out)
