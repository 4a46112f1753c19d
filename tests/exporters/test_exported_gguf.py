"""Content of GGUF files, read with the gguf package, and the text that llama.cpp generates with them."""

import gguf
import numpy as np
import pytest
import torch

from exports import export, random_model, tokenizer_of
from gptlab.exporters.reference import greedy_continuation

NAMES = {
    "transformer.wte.weight": "token_embd.weight",
    "transformer.wpe.weight": "position_embd.weight",
    "transformer.h.1.ln_1.bias": "blk.1.attn_norm.bias",
    "transformer.h.0.attn.c_attn.weight": "blk.0.attn_qkv.weight",
    "transformer.h.0.attn.c_proj.bias": "blk.0.attn_output.bias",
    "transformer.h.1.ln_2.weight": "blk.1.ffn_norm.weight",
    "transformer.h.0.mlp.c_fc.weight": "blk.0.ffn_up.weight",
    "transformer.h.1.mlp.c_proj.weight": "blk.1.ffn_down.weight",
    "transformer.ln_f.weight": "output_norm.weight",
    "lm_head.weight": "output.weight",
}


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_gguf_file_matches_the_layout_of_the_converter(tmp_path, monkeypatch, dtype):
    tokenizer = tokenizer_of("bpe")
    model = random_model(vocab_size=tokenizer.vocab_size, tie_weights=False, pad_vocab_to_multiple_of=64, bias=False)
    export(monkeypatch, tmp_path / "out", model, "gguf", dtype, tokenizer)
    reader = gguf.GGUFReader(tmp_path / "out" / "model.gguf")
    held = {key: field.contents() for key, field in reader.fields.items()}
    expected = {
        "general.architecture": "gpt2",
        "general.file_type": 1 if dtype == "float16" else 0,
        "gpt2.block_count": 2,
        "gpt2.context_length": 16,
        "gpt2.embedding_length": 32,
        "gpt2.feed_forward_length": 128,
        "gpt2.attention.head_count": 2,
        "gpt2.attention.layer_norm_epsilon": pytest.approx(1e-5),
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "gpt-2",
        "tokenizer.ggml.bos_token_id": tokenizer.vocab_size - 1,
        "tokenizer.ggml.eos_token_id": tokenizer.vocab_size - 1,
        "tokenizer.ggml.token_type": [1] * (tokenizer.vocab_size - 1) + [3],
    }
    assert {key: held[key] for key in expected} == expected
    assert held["tokenizer.ggml.tokens"][-1] == "<|endoftext|>"
    assert len(held["tokenizer.ggml.merges"]) == tokenizer.vocab_size - 257
    there = {tensor.name: tensor.data for tensor in reader.tensors}
    state, size = dict(model.named_parameters()), tokenizer.vocab_size
    for ours, theirs in NAMES.items():
        weight = state.get(ours.removeprefix("transformer."))
        weight = torch.zeros(32) if weight is None else weight[:size]  # no padding; zeros for a bias
        half = dtype == "float16" and weight.dim() == 2 and "wpe" not in ours
        np.testing.assert_array_equal(there[theirs], weight.numpy().astype(np.float16 if half else np.float32))
        assert there[theirs].dtype == (np.float16 if half else np.float32)
    assert len(there) == 29


GPT2 = pytest.param("gpt2", "float32", marks=pytest.mark.slow)


@pytest.mark.parametrize(("kind", "dtype"), [("bytes", "float32"), ("bpe", "float16"), GPT2])
def test_llama_cpp_generates_the_same_text(tmp_path, monkeypatch, kind, dtype):
    xllamacpp = pytest.importorskip("xllamacpp")
    tokenizer = tokenizer_of(kind)
    model = random_model(vocab_size=tokenizer.vocab_size, block_size=64)
    whole = [i for i in range(256) if (token := tokenizer.to_bytes([i])).isascii() and token.decode().isprintable()]
    likely = torch.zeros(tokenizer.vocab_size, 1)
    likely[whole] = 1
    model.wte.weight.mul_(likely)  # only complete characters, as llama.cpp returns no other tokens
    certificate = export(monkeypatch, tmp_path / "out", model, "gguf", dtype, tokenizer)
    compared = {check.what: check for check in certificate.checks}
    assert compared["tensors"].result == "28 of 28 bit-identical"
    scored = compared[f"log-probabilities of the top {min(1000, tokenizer.vocab_size):,} tokens"]
    assert 0 < scored.difference < scored.tolerance
    assert compared["greedy continuation of a prompt of 8 tokens"].result == "16 of 16 tokens identical"
    assert compared["tokenizer"].result.startswith("token IDs of 3 of 3 texts identical")
    settings = xllamacpp.CommonParams()  # with default settings
    settings.model.path = str(tmp_path / "out" / "model.gguf")
    settings.n_gpu_layers = settings.verbosity = 0
    server = xllamacpp.Server(settings)
    response = server.handle_completions({"prompt": "the cow", "max_tokens": 12, "temperature": 0})
    prompt = tokenizer.encode("the cow").tolist()
    assert response["choices"][0]["text"] == tokenizer.decode(greedy_continuation(model, prompt, 12).ids)


def test_certificate_without_llama_cpp_lists_unchecked_quantities(tmp_path, monkeypatch):
    monkeypatch.setattr("gptlab.exporters.gguf.find_spec", lambda name: None)
    model = random_model(vocab_size=257)
    certificate = export(monkeypatch, tmp_path / "out", model, "gguf", tokenizer=tokenizer_of("bytes"))
    note = "not checked: logits, continuation and tokenizer, because xllamacpp (llama.cpp) is not installed"
    assert note in certificate.lines()
    assert note in (tmp_path / "out" / "README.md").read_text()
    assert [check.what for check in certificate.checks] == ["tensors"]
