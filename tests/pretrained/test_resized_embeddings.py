"""Weights for another vocabulary: rows of the embedding and the head are dropped, or added with the mean."""

import logging

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from gptlab.config.base import validate
from gptlab.errors import UserError
from gptlab.model.config import EXTERNAL_DEFAULTS, GPT2_OPTIONS, GPTConfig
from gptlab.model.external import resize_embeddings
from gptlab.model.gpt import GPT
from gptlab.pretrained.external import check_external_shape, read_hf_shape
from gptlab.pretrained.weights import load_weights


def build(vocab_size: int, **options: object) -> GPT:
    sizes = {"block_size": 8, "n_layer": 1, "n_head": 2, "n_embd": 16, "vocab_size": vocab_size}
    recorded = {"bias": True, "activation": "gelu_tanh", "tie_weights": True}
    return GPT(validate(GPTConfig, {**EXTERNAL_DEFAULTS, **GPT2_OPTIONS, **recorded, **sizes, **options}))


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(("rows", "multiple"), [(203, 1), (203, 64), (190, 1)])
def test_new_rows_are_the_mean_and_the_others_are_kept(tmp_path, caplog, tied, rows, multiple):
    torch.manual_seed(0)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=200, n_positions=8, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=tied)
    )
    if not tied:
        torch.nn.init.normal_(theirs.lm_head.weight)
    theirs.save_pretrained(tmp_path)
    model = build(rows, tie_weights=tied, pad_vocab_to_multiple_of=multiple, resize_embeddings=True)
    padding = model.wte.weight[rows:].detach().clone()
    with caplog.at_level(logging.INFO, logger="gptlab"):
        load_weights(model, tmp_path)
    for ours, other in ((model.wte, theirs.transformer.wte), (model.lm_head, theirs.lm_head)):
        kept = min(rows, 200)
        assert torch.equal(ours.weight[:kept], other.weight[:kept])
        mean = other.weight.double().mean(0).expand(rows - kept, -1)
        torch.testing.assert_close(ours.weight[kept:rows].double(), mean, rtol=0, atol=1e-7)
    assert torch.equal(model.wte.weight[rows:], padding)
    assert (model.wte.weight is model.lm_head.weight) == tied
    assert f"from 200 to {rows} token IDs" in caplog.text


def test_another_vocabulary_needs_the_option(tmp_path):
    theirs = GPT2LMHeadModel(GPT2Config(vocab_size=200, n_positions=8, n_embd=16, n_layer=1, n_head=2))
    theirs.save_pretrained(tmp_path)
    shape = read_hf_shape(tmp_path)
    with pytest.raises(UserError, match=r"model\.vocab_size=203, but the weights have 200.*resize_embeddings=true"):
        check_external_shape(tmp_path, shape, build(203).config)
    check_external_shape(tmp_path, shape, build(203, resize_embeddings=True).config)


def test_padding_of_the_trained_model_is_not_part_of_the_mean():
    trained, model = build(60, pad_vocab_to_multiple_of=64), build(70, resize_embeddings=True)
    resized = resize_embeddings(trained.state_dict(), 60, model)
    expected = trained.wte.weight[:60].double().mean(0).expand(10, -1)
    torch.testing.assert_close(resized["wte.weight"][60:].double(), expected, rtol=0, atol=1e-7)
