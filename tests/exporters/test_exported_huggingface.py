"""Models exported to transformers: identical weights and logits, the same tokenizer and the same generated text."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, pipeline

from exports import TEXT, export, random_model, tokenizer_of
from gptlab.data.tokenizers.external import tokenizer_record
from gptlab.exporters import exporter
from gptlab.model.config import SamplingConfig
from gptlab.model.generation.generate import collect_tokens, generate, plain_decoder
from gptlab.pretrained.source import open_model_source
from gptlab.pretrained.weights import load_model

IDX = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(1))
VARIANTS = {"plain": {}, "untied": {"tie_word_embeddings": False}, "exact": {"activation_function": "gelu"}}


@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_round_trip_from_transformers_is_bit_identical(tmp_path, variant):
    torch.manual_seed(0)
    sizes = {"vocab_size": 61, "n_positions": 16, "n_embd": 32, "n_layer": 2, "n_head": 2}
    theirs = GPT2LMHeadModel(GPT2Config(**sizes, **variant, bos_token_id=None, eos_token_id=None)).eval()
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    theirs.save_pretrained(tmp_path / "theirs")
    source = open_model_source(str(tmp_path / "theirs"))
    exporter.export_model(source, "hf", "float32", tmp_path / "out")
    before, after = (load_file(tmp_path / name / "model.safetensors") for name in ("theirs", "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    again, loading = GPT2LMHeadModel.from_pretrained(tmp_path / "out", dtype=torch.float64, output_loading_info=True)
    assert not any(loading.values())
    with torch.no_grad():
        logits = again.eval()(IDX).logits
        torch.testing.assert_close(logits, theirs.double()(IDX).logits, atol=1e-9, rtol=0)
        torch.testing.assert_close(logits, load_model(source).double()(IDX), atol=1e-9, rtol=0)


@pytest.mark.parametrize(
    "changes",
    [{}, {"bias": False}, {"pad_vocab_to_multiple_of": 64}, {"tie_weights": False, "pad_vocab_to_multiple_of": 64}],
    ids=["with biases", "without", "padded", "untied and padded"],
)
@pytest.mark.parametrize("block", [16, 9], ids=["whole", "cropped"])
def test_exported_model_has_the_same_logits_in_transformers(tmp_path, monkeypatch, changes, block):
    model = random_model(**changes)
    model.crop_block_size(block)
    assert not export(monkeypatch, tmp_path / "out", model, "hf").failed
    theirs = GPT2LMHeadModel.from_pretrained(tmp_path / "out", dtype=torch.float64).eval()
    assert theirs.config.n_positions == theirs.config.n_ctx == block
    assert theirs.transformer.wte.weight.shape == (61, 32)
    there = load_file(tmp_path / "out" / "model.safetensors")
    assert (there["transformer.h.0.attn.c_attn.bias"] == 0).all() == (not model.config.bias)
    assert (there["transformer.ln_f.bias"] == 0).all() == (not model.config.bias)
    assert theirs.config.eos_token_id is None
    with torch.no_grad():
        ours = model.double()(IDX[:, :block])
        torch.testing.assert_close(theirs(IDX[:, :block]).logits, ours, atol=1e-9, rtol=0)


@pytest.mark.parametrize("kind", ["bytes", "bpe", "gpt2", "characters"])
def test_exported_tokenizer_and_generated_text_match(tmp_path, monkeypatch, kind):
    tokenizer = tokenizer_of(kind)
    model = random_model(vocab_size=tokenizer.vocab_size, block_size=64)
    certificate = export(monkeypatch, tmp_path / "out", model, "hf", tokenizer=tokenizer)
    assert "tokenizer" in [check.what for check in certificate.checks]
    assert tokenizer_record(tmp_path / "out", 0) == tokenizer.record()
    theirs = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer.encode(TEXT).tolist()
    assert theirs(TEXT, verbose=False).input_ids == ids
    assert theirs.decode(ids) == TEXT
    assert theirs.eos_token_id == tokenizer.end_of_text
    greedy = SamplingConfig(temperature=0, top_k=None, top_p=None, min_p=None, repetition_penalty=1)
    prompt = tokenizer.encode("the cow").tolist()
    settings = {"seeds": [0], "max_new_tokens": 12, "decoder": plain_decoder(model), "device": torch.device("cpu")}
    ours = collect_tokens(generate(model, [prompt], greedy, **settings))[0]
    assert tokenizer.end_of_text not in ours  # transformers would stop there
    generator = pipeline("text-generation", str(tmp_path / "out"), dtype=torch.float32)
    (written,) = generator("the cow", max_new_tokens=12, do_sample=False)
    assert written["generated_text"] == tokenizer.decode(prompt + ours)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_weights_are_rounded_to_the_dtype_once(tmp_path, monkeypatch, dtype):
    model, kind = random_model(), getattr(torch, dtype)
    certificate = export(monkeypatch, tmp_path / "out", model, "hf", dtype)
    there = load_file(tmp_path / "out" / "model.safetensors")
    assert torch.equal(there["transformer.h.1.mlp.c_fc.weight"], model.h[1].mlp.c_fc.weight.to(kind).T)
    assert GPT2LMHeadModel.from_pretrained(tmp_path / "out", dtype="auto").dtype == kind
    rounded = random_model()
    for parameter in rounded.parameters():
        parameter.data = parameter.to(kind).float()
    prompts = certificate.reference.prompts
    expected = (rounded(prompts) - model(prompts)).abs().max().item()
    assert certificate.reference.rounding == pytest.approx(expected)
    assert certificate.lines()[-1].startswith(f"rounding the weights to {dtype} changes the logits by up to 0.")


def test_certificate_contains_the_comparisons_with_transformers(tmp_path, monkeypatch):
    certificate = export(monkeypatch, tmp_path / "out", random_model(), "hf")
    saved = json.loads((tmp_path / "out" / "certificate.json").read_text())
    assert saved["passed"]
    tensors, logits, continuation = saved["checks"]
    assert tensors["result"] == "28 of 28 bit-identical"
    assert logits["by"].startswith("transformers 5")
    assert 0 <= logits["difference"] <= logits["tolerance"]
    assert continuation["result"] == "8 of 8 tokens identical"  # up to the block size of 16
    assert saved["not_checked"] == ["tokenizer, because the tokenizer of this model is unknown and was not exported"]
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert all(line in card for line in certificate.lines())
