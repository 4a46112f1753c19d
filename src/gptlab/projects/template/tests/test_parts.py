"""The parts of the project, compared with formulas that are written independently."""

import json
import math

import pytest
import torch
from gptlab.model.attention import AttentionContext, CausalSelfAttention
from gptlab.model.config import OPTIONS, GPTConfig
from gptlab.model.modern import build_gpt
from torch import nn

from mylab.activations import QuickGELU
from mylab.attention import GatedAttention
from mylab.callbacks import Decades, decade_shares
from mylab.loggers import JSONLinesLogger
from mylab.losses import focal_loss
from mylab.models import Bigram
from mylab.norms import ScaleNorm
from mylab.optimizers import Lion
from mylab.param_groups import embedding_groups
from mylab.readers import Docstrings, read_docstrings
from mylab.schedules import inverse_sqrt
from mylab.tokenizers import WordsAndBytes

GPT2 = {name: option.gpt2 for name, option in OPTIONS.items()}
TINY = GPT2 | {"block_size": 8, "vocab_size": 13, "n_layer": 2, "n_head": 2, "n_embd": 16}
IDX = torch.arange(8).view(1, 8)


def build(**changes):
    torch.manual_seed(0)
    return build_gpt(GPTConfig(**TINY | changes))


def test_callback_counts_the_values_of_each_decade():
    gradients = [torch.tensor([[0.0, 2e-3], [-3e-3, 5e-2]]), torch.tensor([4e-9, 7.0, -0.2, 0.9])]
    assert decade_shares(gradients, Decades(-4, -1)).tolist() == [2 / 8, 2 / 8, 1 / 8, 3 / 8]


def test_logger_writes_one_object_per_row(tmp_path):
    logger = JSONLinesLogger(str(tmp_path), "rows.jsonl")
    logger.log_metrics({"loss": 2.5}, 1)
    logger.log_metrics({"loss": 2.0}, 2)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert rows == [{"step": 1, "loss": 2.5}, {"step": 2, "loss": 2.0}]


def test_lion_is_the_formula_of_the_paper():
    gradients, lr, beta1, beta2, decay = (1.0, -3.0, 0.2), 0.1, 0.9, 0.99, 0.5
    parameter = nn.Parameter(torch.tensor([2.0], dtype=torch.float64))
    optimizer = Lion([{"params": [parameter]}], lr=lr, betas=(beta1, beta2), weight_decay=decay)
    weight, momentum = 2.0, 0.0
    for gradient in gradients:
        parameter.grad = torch.tensor([gradient], dtype=torch.float64)
        optimizer.step()
        update = math.copysign(1, beta1 * momentum + (1 - beta1) * gradient)
        weight -= lr * (update + decay * weight)
        momentum = beta2 * momentum + (1 - beta2) * gradient
        assert parameter.item() == pytest.approx(weight, rel=1e-12)


def test_parameter_groups_have_every_parameter_once():
    model = build()
    groups = embedding_groups(model, 0.01, 0.1)
    assert [len(group["params"]) for group in groups] == [2, 8, 18]  # wte is also the head
    assert {id(p) for group in groups for p in group["params"]} == {id(p) for p in model.parameters()}


def test_schedule_increases_linearly_and_then_decreases():
    rates = [inverse_sqrt(step, lr=1.0, max_steps=100, warmup_steps=4) for step in (0, 1, 3, 15)]
    assert rates == [0.25, 0.5, 1.0, 0.5]


def test_block_with_scale_1_is_the_built_in_block():
    block = {"_target_": "mylab.blocks.LayerScaleBlock", "scale": 1.0}
    assert torch.equal(build(block=block)(IDX), build()(IDX))
    assert not torch.equal(build(block=block | {"scale": 0.9})(IDX), build()(IDX))


def test_attention_with_a_gate_of_one_half_is_half_the_built_in_attention():
    config, x = GPTConfig(**TINY), torch.randn(1, 8, 16)
    plain, gated = CausalSelfAttention(config, 0), GatedAttention(config, 0)
    gated.load_state_dict(plain.state_dict() | {"gate.weight": torch.zeros(16, 16), "gate.bias": torch.zeros(16)})
    ctx = AttentionContext(torch.arange(8)[None], None, None)
    assert torch.equal(gated(x, ctx), plain(x, ctx) / 2)


def test_norm_has_the_length_of_its_scale():
    x = torch.randn(2, 3, 16, dtype=torch.float64)
    expected = x * 4 / (x * x).sum(-1, keepdim=True).sqrt()
    assert torch.allclose(ScaleNorm(GPTConfig(**TINY), 1e-5)(x), expected, rtol=1e-12)


def test_activation_is_x_times_sigmoid():
    values = [-2.0, 0.0, 3.0]
    expected = [x / (1 + math.exp(-1.5 * x)) for x in values]
    assert QuickGELU(1.5)(torch.tensor(values)).tolist() == pytest.approx(expected, rel=1e-6)


def test_bigram_depends_only_on_the_latest_token():
    model = Bigram(GPTConfig(**TINY))
    assert torch.equal(model(torch.tensor([[1, 2, 3]]))[:, -1], model(torch.tensor([[3]]))[:, -1])
    assert model(IDX).shape == (1, 8, 13)


def test_focal_loss_is_the_formula_of_the_paper():
    logits, targets = torch.randn(4, 5), torch.tensor([1, -100, 0, 4])
    p = [logits[n].softmax(0)[targets[n]].item() for n in (0, 2, 3)]
    expected = sum(-((1 - x) ** 2) * math.log(x) for x in p) / 3
    assert focal_loss(logits, targets, gamma=2.0).item() == pytest.approx(expected, rel=1e-5)


def test_reader_yields_docstrings(tmp_path):
    path = tmp_path / "module.py"
    path.write_text('"""Module."""\n\n\nclass A:\n    """Class.\n\n    More.\n    """\n\n    def f(self): ...\n')
    assert list(read_docstrings(path)) == [("0", "Module.\n"), ("4", "Class.\n\nMore.\n")]


def test_reader_names_every_document_once():
    names = [name for name, _ in Docstrings(["json"]).documents()]
    assert len(names) > 10
    assert len(set(names)) == len(names)


def test_tokenizer_restores_the_text():
    tokenizer = WordsAndBytes(["the", "self"])
    text = "the théâtre, self.the\n"
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert [ids.count(i) for i in (256, 257)] == [2, 1]
