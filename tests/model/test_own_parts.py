"""Models and parts of models that are components: equal to the built-in ones where they do the same, and generation."""

import pytest
import torch

from conftest import tiny_config
from generating import generated
from gptlab.errors import UserError
from gptlab.model.config import ComponentModelConfig, read_model_config
from gptlab.model.gpt import GPT
from gptlab.model.modern import ModernGPT, build_gpt, meta_gpt
from own_package import make_importable

make_importable()

BLOCK = {"_target_": "mylab.model.ScaledBlock"}
ATTENTION = {"_target_": "mylab.model.DecayAttention", "decay": 0.8}
PARTS = {"attention": ATTENTION, "norm": {"_target_": "mylab.model.ScaleNorm"}, "tie_weights": False}
TARGETS = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(1)).masked_fill_(
    torch.rand(3, 16, generator=torch.Generator().manual_seed(2)) < 0.2, -100
)
IDX = torch.randint(61, (3, 16), generator=torch.Generator().manual_seed(3))
DOCUMENTS = torch.tensor([[0] * 5 + [1] * 11, [0] * 16, [0, 1, 2, 3] * 4]).sort().values


def built(**options: object) -> GPT:
    torch.manual_seed(0)
    return build_gpt(tiny_config(**options))


def own(target: str, **options: object) -> GPT:
    """Returns a model that is a component, with the size and options of ``tiny_config``."""
    torch.manual_seed(0)
    return build_gpt(ComponentModelConfig(**tiny_config().model_dump() | {"_target_": target} | options))


def gradients(model: GPT, documents: torch.Tensor | None = None) -> dict[str, torch.Tensor]:
    model.train()
    model.loss(IDX, TARGETS, documents, None).backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


NEUTRAL = {
    "block": lambda: built(block=BLOCK | {"alpha": 1.0}),
    "block, recomputed": lambda: built(block=BLOCK | {"alpha": 1.0}, activation_checkpointing=True),
    "gptlab's block": lambda: built(block={"_target_": "gptlab.model.gpt.Block"}),
    "gptlab's attention": lambda: built(attention={"_target_": "gptlab.model.attention.CausalSelfAttention"}),
    "activation": lambda: built(activation={"_target_": "torch.nn.GELU", "approximate": "tanh"}),
    "model": lambda: own("mylab.model.ScaledGPT", scale=1.0),
    "gptlab's model": lambda: own("gptlab.model.gpt.GPT"),
}


@pytest.mark.parametrize("documents", [None, DOCUMENTS], ids=["packed", "masked"])
@pytest.mark.parametrize("other", NEUTRAL.values(), ids=NEUTRAL)
def test_a_neutral_component_is_bit_equal_to_the_builtin_part(other, documents):
    model, other = built(), other()
    assert list(other.state_dict()) == list(model.state_dict())
    assert torch.equal(other(IDX, documents), model(IDX, documents))
    expected = gradients(model, documents)
    for name, gradient in gradients(other, documents).items():
        assert torch.equal(gradient, expected[name]), name


def test_masked_documents_reach_an_own_block():
    model = built(block=BLOCK | {"alpha": 0.5})
    alone = torch.cat([model(IDX[:1, :5]), model(IDX[:1, 5:])], dim=1)
    torch.testing.assert_close(model(IDX[:1], DOCUMENTS[:1]), alone, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(model(IDX[:1]), alone, atol=1e-3)


def test_options_of_gpt2_hold_for_a_model_with_an_own_block():
    model = built(block=BLOCK, norm="rms", positions="rotary", tie_weights=False, pad_vocab_to_multiple_of=64)
    assert isinstance(model, ModernGPT)
    assert isinstance(model.ln_f, torch.nn.RMSNorm)
    assert model(IDX).shape == (3, 16, 61)


def randomized(model: GPT) -> GPT:
    torch.manual_seed(0)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def plain_greedy(model: GPT, prompt: list[int], tokens: int) -> list[int]:
    """Decodes greedily by recomputing the logits of the whole context; it must fit into ``block_size``."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(tokens):
            ids.append(int(model(torch.tensor([ids]))[0, -1].argmax()))
    return ids[len(prompt) :]


GENERATING = {
    "attention without cache": lambda: built(**PARTS),
    "bigram table": lambda: own("mylab.model.Bigram"),
    "block with cache": lambda: built(block=BLOCK | {"alpha": 0.5}),
    "model": lambda: own("mylab.model.ScaledGPT", scale=2.0),
    "model with own attention": lambda: own("mylab.model.ScaledGPT", scale=2.0, attention=ATTENTION),
}


@pytest.mark.parametrize("copies", [1, 2])
@pytest.mark.parametrize("model", GENERATING.values(), ids=GENERATING)
def test_generated_tokens_equal_those_of_a_loop_over_the_whole_context(model, copies):
    model = randomized(model())
    prompts = [[5], [1, 2, 3, 4, 5, 6, 7], [60, 59, 58]]
    expected = [plain_greedy(model, prompt, 9) for prompt in prompts for _ in range(copies)]
    assert generated(model, prompts, tokens=9, copies=copies) == expected


def test_a_model_without_cache_sees_the_last_block_of_a_long_text():
    model = randomized(built(**PARTS))
    (tokens,) = generated(model, [[1, 2, 3]], tokens=30)
    ids = [1, 2, 3, *tokens]
    for end in range(3, 33):
        assert [ids[end]] == plain_greedy(model, ids[max(0, end - 16) : end], 1)


def test_weights_of_a_meta_model_can_be_loaded():
    for model in (built(block=BLOCK), built(**PARTS), own("mylab.model.Bigram")):
        empty = meta_gpt(model.config)
        assert all(parameter.is_meta for parameter in empty.parameters())
        empty.load_weights(model.state_dict())
        assert torch.equal(empty.eval()(IDX), model.eval()(IDX))


def test_the_loss_of_a_model_without_a_head_is_the_cross_entropy_of_its_logits():
    model = own("mylab.model.Bigram")
    logits = model(IDX).double()
    log_p = logits - logits.logsumexp(dim=-1, keepdim=True)
    nats = -log_p.gather(2, TARGETS.clamp(min=0)[..., None])[..., 0] * (TARGETS != -100)
    torch.testing.assert_close(model.token_losses(IDX, TARGETS, None, None).double(), nats, atol=1e-6, rtol=0)
    mean = nats.sum() / (TARGETS != -100).sum()
    torch.testing.assert_close(model.loss(IDX, TARGETS, None, 4).double(), mean, atol=1e-6, rtol=0)
    assert model.loss(IDX, TARGETS, None, 4, lambda logits, targets: logits.sum() + targets.sum()).item() != mean
    assert torch.equal(model.logits_at(IDX, TARGETS != -100), model(IDX)[TARGETS != -100])
    assert model.blocks == []


@pytest.mark.parametrize("options", [{}, {"norm": "rms", "logit_soft_cap": None, "pad_vocab_to_multiple_of": 64}])
def test_a_loss_of_hidden_states_gets_the_states_and_the_weight_of_the_head(options):
    from mylab.losses import of_states

    model = built(**options)
    expected = model.loss(IDX, TARGETS, None, None)
    expected.backward()
    gradients = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    found = model.loss(IDX, TARGETS, None, 7, of_states)
    found.backward()
    assert torch.equal(found, expected)
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, atol=1e-7, rtol=1e-5)


def test_a_loss_of_logits_gets_them_in_float32_and_without_padding():
    seen = []
    model = built(pad_vocab_to_multiple_of=64, logit_soft_cap=2.0).bfloat16()
    model.loss(IDX, TARGETS, None, None, lambda logits, targets: seen.extend((logits, targets)) or logits.sum())
    assert seen[0].dtype == torch.float32
    assert seen[0].shape == (48, 61)
    assert seen[0].abs().max() <= 2
    assert torch.equal(seen[1], TARGETS.flatten())


def test_stored_configurations_of_models_keep_their_class():
    values = tiny_config().model_dump() | {"_target_": "mylab.model.ScaledGPT", "scale": 2}
    config = read_model_config(values)
    assert isinstance(config, ComponentModelConfig)
    assert config.component == {"_target_": "mylab.model.ScaledGPT", "scale": 2}
    assert not config.is_gpt2
    assert type(read_model_config(tiny_config().model_dump())) is type(tiny_config())


def test_the_model_of_an_unknown_class_is_not_built():
    with pytest.raises(UserError, match=r"model\._target_=torch\.nn\.Linear is not a subclass of"):
        own("torch.nn.Linear")
