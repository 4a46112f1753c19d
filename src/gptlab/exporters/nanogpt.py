"""nanoGPT checkpoint: ckpt.pt, and meta.pkl for a character tokenizer."""

import pickle
from pathlib import Path
from typing import Any

import torch

from gptlab.data.tokenizers.external import META_FILE
from gptlab.data.tokenizers.tokenizer import CharactersTokenizer, GPT2Tokenizer
from gptlab.exporters.certificate import compare_scores, compare_tensors, version
from gptlab.exporters.model_card import ModelCardInfo
from gptlab.exporters.reference import Reference
from gptlab.exporters.request import CheckResult, ExportRequest, omitted_tokenizer
from gptlab.model.external import EMBEDDING, HEAD, to_external
from gptlab.model.gpt import GPT
from gptlab.pretrained.source import open_model_source
from gptlab.pretrained.weights import load_model

CHECKPOINT = "ckpt.pt"
NO_LOSS = 1e9  # initial best_val_loss of nanoGPT's train.py


def write(model: GPT, job: ExportRequest, folder: Path) -> None:
    """Writes the checkpoint of nanoGPT's train.py without optimizer state, and meta.pkl for a character tokenizer."""
    config, info = model.config, ModelCardInfo.of(job.source)
    state = to_external(model, transposed=False, biases=False)
    state[HEAD] = state[f"transformer.{EMBEDDING}"]
    names = ("n_layer", "n_head", "n_embd", "block_size", "bias", "vocab_size", "dropout")
    checkpoint: dict[str, Any] = {
        "model": state,
        "optimizer": None,
        "model_args": {name: getattr(config, name) for name in names},
        "iter_num": info.step or 0,
        "best_val_loss": NO_LOSS if info.val_loss is None else info.val_loss,
        "config": {"out_dir": "out", "dataset": info.dataset or "gptlab", "init_from": "resume", "compile": False},
    }
    torch.save(checkpoint, folder / CHECKPOINT)
    if isinstance(job.tokenizer, CharactersTokenizer):
        characters = job.tokenizer.characters
        stoi = {character: i for i, character in enumerate(characters)}
        meta = {"vocab_size": len(characters), "itos": dict(enumerate(characters)), "stoi": stoi}
        (folder / META_FILE).write_bytes(pickle.dumps(meta))


def check(job: ExportRequest, folder: Path, reference: Reference) -> CheckResult:
    """Compares the exported model with the reference.

    Compares the exported weights, and the logits and greedy continuation that gptlab computes from them.
    """
    source = open_model_source(str(folder / CHECKPOINT))
    model = load_model(source)
    tensors = to_external(model, transposed=False, biases=False)
    checks = [compare_tensors(iter(tensors.items()), reference, f"{version('torch')} with weights_only=True")]
    with torch.no_grad():
        checks += compare_scores(model, reference, f"{version('gptlab')}, from the file", 0.0)
    no_package = "loading with nanoGPT, because it is not a Python package"
    reason = "nanoGPT only supports character tokenizers and GPT-2's tokenizer"
    return CheckResult(checks, [no_package, *omitted_tokenizer(job, (CharactersTokenizer, GPT2Tokenizer), reason)])
