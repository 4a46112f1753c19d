"""The Python API gives the same results as the commands."""

import math

import pytest
import torch

import gptlab
from commands import assert_success
from gptlab.errors import UserError
from gptlab.pretrained.language_model import load

TEXT = "line 12: the cat has 4"


@pytest.fixture
def directory(user, runs):
    return runs.give(user, "begun", "callbacks=checkpoint")


def test_language_model_methods_match_the_commands(user, directory):
    assert gptlab.load is load
    model, tokenizer = load(str(directory))
    ids = torch.tensor([tokenizer.encode(TEXT).tolist()])
    assert torch.equal(model.logits(TEXT), model.network(ids)[0])
    assert torch.equal(model.logits(ids[0]), model.logits(ids[0].tolist()))
    log_p = model.logits(TEXT).log_softmax(-1)
    expected = [-log_p[t, i].item() for t, i in enumerate(ids[0, 1:].tolist())]
    loss = model.loss(TEXT)
    assert loss.nats.tolist() == pytest.approx(expected, rel=1e-5)
    assert loss.loss == pytest.approx(sum(expected) / len(expected), rel=1e-6)
    assert loss.bits_per_byte == pytest.approx(loss.loss / math.log(2), rel=1e-6)  # a token is a byte here
    assert model.tokens(TEXT) == list(TEXT)
    found = model.capture(TEXT, "h.*.attn.weights", "h.1.mlp.act")
    assert {name: tuple(tensor.shape) for name, tensor in found.items()} == {
        "h.0.attn.weights": (2, len(TEXT), len(TEXT)),
        "h.1.attn.weights": (2, len(TEXT), len(TEXT)),
        "h.1.mlp.act": (len(TEXT), 256),
    }
    with model.change({"lm_head": torch.zeros_like}):
        assert model.loss(TEXT).loss == pytest.approx(math.log(257), rel=1e-6)
    model.logits(TEXT)[-1, 7].backward()
    assert model.network.h[0].attn.c_attn.weight.grad.abs().sum() > 0
    done = user.python(
        "gptlab.sample", f"run={directory}", f"prompt={TEXT}", "max_new_tokens=9", "num_samples=2", "seed=5"
    )
    assert_success(done)
    assert model.generate(TEXT, num_samples=2, max_new_tokens=9, seed=5) == [
        text.strip("\n") for text in done.stdout.split("-" * 80)[:2]
    ]
    assert model.generate("", max_new_tokens=4, temperature=0) == model.generate("", max_new_tokens=4, top_k=1)
    assert repr(model).startswith("LanguageModel(118,")


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: model.logits("x" * 33), r"has 33 tokens, but the model accepts 1 to block_size=32"),
        (lambda model: model.logits([]), "has 0 tokens"),
        (lambda model: model.logits([3, 257]), "must be between 0 and 256, but got 257"),
        (lambda model: model.loss("x"), "requires at least two tokens"),
        (lambda model: model.generate("x", temprature=1), "Unknown config key `temprature`. Did you mean temperature"),
        (lambda model: model.capture("x", "h.0.mpl"), r"h\.0\.mpl matches no activation .* Did you mean h\.0\.mlp"),
    ],
    ids=range(6),
)
def test_invalid_arguments_raise_user_errors(directory, call, message):
    model, _ = load(str(directory))
    with pytest.raises(UserError, match=message):
        call(model)


def test_a_stop_string_may_be_given_alone(directory):
    model, _ = load(str(directory))
    text = model.generate("line", temperature=0, max_new_tokens=20)[0]
    stop = text[6:9]
    assert (
        model.generate("line", temperature=0, max_new_tokens=20, stop=stop)[0] == "line" + text[4:].partition(stop)[0]
    )
    for wrong in (3, ["a", ""], [None]):
        with pytest.raises(UserError, match=r"stop=.* is not valid"):
            model.generate("line", stop=wrong)


@pytest.mark.parametrize("temperature", [0, 1])
def test_a_model_with_nan_weights_generates_no_text(directory, temperature):
    model, _ = load(str(directory))
    model.network.ln_f.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match="its logits are not finite"):
        model.generate("line", temperature=temperature, max_new_tokens=20)


def test_package_exports_match_all():
    assert [getattr(gptlab, name).__name__.removeprefix("gptlab.") for name in gptlab.__all__] == gptlab.__all__
    with pytest.raises(AttributeError, match="module 'gptlab' has no attribute 'laod'"):
        _ = gptlab.laod
