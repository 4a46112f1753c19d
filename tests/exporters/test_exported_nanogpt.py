"""nanoGPT checkpoints: their content, and the logits in transformers and in gptlab."""

import pickle

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from exports import export, random_model, tokenizer_of
from gptlab.model.external import CONV1D
from gptlab.pretrained.source import open_model_source
from gptlab.pretrained.weights import load_model


@pytest.mark.parametrize("bias", [True, False], ids=["with biases", "without"])
def test_exported_checkpoint_has_the_same_logits(tmp_path, monkeypatch, bias):
    tokenizer = tokenizer_of("characters")
    size = tokenizer.vocab_size
    model = random_model(activation="gelu", bias=bias, vocab_size=size, pad_vocab_to_multiple_of=64, n_layer=1)
    export(monkeypatch, tmp_path / "out", model, "nanogpt", tokenizer=tokenizer)
    path = tmp_path / "out" / "ckpt.pt"
    checkpoint = torch.load(path, weights_only=True)
    state = checkpoint["model"]
    parts = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    kinds = ("weight", "bias") if bias else ("weight",)
    named = {f"transformer.{part}.{kind}" for part in ("ln_f", *(f"h.0.{part}" for part in parts)) for kind in kinds}
    assert state.keys() == named | {"transformer.wte.weight", "transformer.wpe.weight", "lm_head.weight"}
    assert checkpoint["model_args"] == {
        **{"n_layer": 1, "n_head": 2, "n_embd": 32, "block_size": 16, "bias": bias, "vocab_size": size, "dropout": 0.0}
    }
    assert checkpoint["optimizer"] is None
    idx = torch.arange(16)[None]
    sizes = {"vocab_size": size, "n_positions": 16, "n_embd": 32, "n_layer": 1, "n_head": 2}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, activation_function="gelu")).eval()
    turned = {name: tensor.T if CONV1D.search(name) else tensor for name, tensor in state.items()}
    missing = theirs.load_state_dict(turned, strict=False).missing_keys
    assert all(name.endswith(".bias") for name in missing)
    assert bool(missing) == (not bias)
    with torch.no_grad():  # in transformers and in gptlab
        torch.testing.assert_close(theirs(idx).logits, model(idx), atol=1e-5, rtol=0)
        assert torch.equal(load_model(open_model_source(str(path)))(idx), model(idx))


def test_characters_are_exported_in_meta_pkl(tmp_path, monkeypatch):
    tokenizer = tokenizer_of("characters")
    model = random_model(activation="gelu", vocab_size=tokenizer.vocab_size)
    export(monkeypatch, tmp_path / "out", model, "nanogpt", tokenizer=tokenizer)
    meta = pickle.loads((tmp_path / "out" / "meta.pkl").read_bytes())  # noqa: S301  (as nanoGPT does)
    assert meta["vocab_size"] == len(meta["stoi"]) == len(meta["itos"]) == tokenizer.vocab_size
    assert [meta["itos"][i] for i in range(meta["vocab_size"])] == sorted(meta["stoi"])
    assert open_model_source(str(tmp_path / "out" / "ckpt.pt")).record == tokenizer.record()


def test_omitted_tokenizer_is_listed_in_the_certificate(tmp_path, monkeypatch):
    tokenizer = tokenizer_of("bytes")
    model = random_model(activation="gelu", vocab_size=257)
    certificate = export(monkeypatch, tmp_path / "out", model, "nanogpt", tokenizer=tokenizer)
    assert any("tokenizer" in line and "was not exported" in line for line in certificate.unchecked)
    assert not (tmp_path / "out" / "meta.pkl").exists()
