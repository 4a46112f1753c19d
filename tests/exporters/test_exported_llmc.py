"""llm.c files compared byte by byte with the layout of its train_gpt2.py."""

import struct

import numpy as np
import pytest
import tiktoken

from exports import export, random_model, tokenizer_of

BLOCK = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")


def as_float32(values: np.ndarray) -> bytes:
    return values.astype("<f4").tobytes()


def as_bfloat16(values: np.ndarray) -> bytes:
    """Rounds to nearest, ties to even."""
    bits = np.ascontiguousarray(values, dtype="<f4").view("<u4")
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()


@pytest.mark.parametrize(
    ("dtype", "version", "written"), [("float32", 3, as_float32), ("bfloat16", 5, as_bfloat16)], ids=["3", "5"]
)
@pytest.mark.parametrize(("bias", "vocab_size"), [(True, 61), (False, 61), (True, 128)])
def test_weights_match_the_layout_of_llmc(tmp_path, monkeypatch, dtype, version, written, bias, vocab_size):
    model = random_model(bias=bias, vocab_size=vocab_size, pad_vocab_to_multiple_of=64)
    state = {name: tensor.numpy() for name, tensor in model.state_dict().items()}
    export(monkeypatch, tmp_path / "out", model, "llmc", dtype)
    header = struct.pack("<256i", 20240326, version, 16, vocab_size, 2, 2, 32, 128, *[0] * 248)
    wte = np.zeros((128, 32), dtype=np.float32)
    wte[:vocab_size] = state["wte.weight"][:vocab_size]
    tensors = [wte, state["wpe.weight"]]
    for part in BLOCK:
        weights = [state[f"h.{layer}.{part}.weight"] for layer in range(2)]
        zeros = [np.zeros(len(weight), dtype=np.float32) for weight in weights]
        tensors += weights + ([state[f"h.{layer}.{part}.bias"] for layer in range(2)] if bias else zeros)
    tensors += [state["ln_f.weight"], state["ln_f.bias"] if bias else np.zeros(32, dtype=np.float32)]
    expected = header + b"".join(map(written, tensors))
    assert (tmp_path / "out" / "model.bin").read_bytes() == expected


def test_gpt2_tokens_match_the_layout_of_llmc(tmp_path, monkeypatch):
    tokenizer = tokenizer_of("gpt2")
    export(monkeypatch, tmp_path / "out", random_model(vocab_size=50257), "llmc", tokenizer=tokenizer)
    content = (tmp_path / "out" / "gpt2_tokenizer.bin").read_bytes()
    assert struct.unpack("<5i", content[:20]) == (20240328, 2, 50257, 50256, 0)
    encoding = tiktoken.Encoding("x", pat_str=".", mergeable_ranks=tokenizer.merges, special_tokens={})
    at, tokens = 1024, []
    while at < len(content):
        tokens.append(content[at + 1 : at + 1 + content[at]])
        at += 1 + content[at]
    assert tokens == [*(encoding.decode_single_token_bytes(i) for i in range(50256)), b"<|endoftext|>"]
