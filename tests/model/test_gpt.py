"""GPT: parity with transformers' GPT-2, and properties of the model's options."""

import math

import pytest
import torch
import torch.nn.functional as F
from transformers import GPT2Config, GPT2LMHeadModel

from conftest import tiny_config
from generating import generated, sampling
from gptlab.model.gpt import GPT
from gptlab.model.modern import build_gpt

TRANSPOSED = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # HF's Conv1D


def pair(dtype: torch.dtype, activation: str = "gelu_tanh") -> tuple[GPT, GPT2LMHeadModel]:
    """Returns gptlab's and transformers' model with the same random weights."""
    torch.manual_seed(0)
    config = tiny_config(vocab_size=97, n_layer=3, n_head=4, n_embd=48, block_size=24, activation=activation)
    theirs = GPT2LMHeadModel(
        GPT2Config(
            vocab_size=97,
            n_positions=24,
            n_embd=48,
            n_layer=3,
            n_head=4,
            activation_function={"gelu_tanh": "gelu_new", "gelu": "gelu"}[activation],
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    for parameter in theirs.parameters():  # biases not 0 and LayerNorms not 1, so that they have an effect
        torch.nn.init.normal_(parameter, std=0.2)
    ours = GPT(config)
    ours.load_state_dict(to_ours(theirs.state_dict()))
    return ours.to(dtype), theirs.to(dtype)


def to_ours(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {
        name.removeprefix("transformer."): tensor.T if name.endswith(TRANSPOSED) else tensor
        for name, tensor in state.items()
    }


@pytest.fixture
def idx() -> torch.Tensor:
    return torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("activation", ["gelu_tanh", "gelu"])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 2e-4)])
def test_logits_match_transformers(dtype, tolerance, activation, idx):
    ours, theirs = pair(dtype, activation)
    torch.testing.assert_close(ours(idx), theirs(idx).logits, atol=tolerance, rtol=0)


def test_loss_and_gradients_match_transformers(idx):
    ours, theirs = pair(torch.float64)
    loss = F.cross_entropy(ours(idx)[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    loss.backward()
    expected = F.cross_entropy(theirs(idx).logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten())
    expected.backward()
    torch.testing.assert_close(loss, expected, atol=1e-12, rtol=0)
    # transformers computes its own loss in float32 for every dtype of the model
    torch.testing.assert_close(loss.float(), theirs(idx, labels=idx).loss, atol=1e-6, rtol=0)
    gradients = to_ours({name: parameter.grad for name, parameter in theirs.named_parameters()})
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-9, rtol=0, msg=name)


def test_three_optimizer_steps_match_transformers(idx):
    ours, theirs = pair(torch.float64)
    optimizers = [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in (ours, theirs)]
    for step in range(3):
        batch = (idx + 7 * step) % 97
        losses = [
            F.cross_entropy(logits[:, :-1].flatten(0, 1), batch[:, 1:].flatten())
            for logits in (ours(batch), theirs(batch).logits)
        ]
        torch.testing.assert_close(*losses, atol=1e-9, rtol=0)
        for optimizer, loss in zip(optimizers, losses, strict=True):
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    for name, tensor in to_ours(theirs.state_dict()).items():
        torch.testing.assert_close(ours.state_dict()[name], tensor, atol=1e-9, rtol=0, msg=name)


def test_greedy_continuation_matches_transformers(idx):
    ours, theirs = pair(torch.float64)
    prompt = idx[:, :5]
    expected = theirs.generate(prompt, max_new_tokens=19, do_sample=False, pad_token_id=0, eos_token_id=None)
    assert generated(ours, prompt.tolist(), tokens=19) == expected[:, 5:].tolist()


def test_logits_do_not_depend_on_later_tokens(idx):
    ours, _ = pair(torch.float64)
    changed = idx.clone()
    changed[:, 10:] = (changed[:, 10:] + 1) % 97
    assert torch.equal(ours(idx)[:, :10], ours(changed)[:, :10])
    assert not torch.equal(ours(idx)[:, 10:], ours(changed)[:, 10:])


def test_padding_of_the_vocabulary_has_no_effect():
    torch.manual_seed(0)
    config = tiny_config(vocab_size=61, pad_vocab_to_multiple_of=64)
    padded, plain = GPT(config), GPT(tiny_config(vocab_size=61))
    plain.load_state_dict(
        {n: t[:61] if n in ("wte.weight", "lm_head.weight") else t for n, t in padded.state_dict().items()}
    )
    idx = torch.randint(61, (2, 16))
    assert padded.wte.weight.shape == (64, 32)
    torch.testing.assert_close(padded(idx), plain(idx), atol=1e-6, rtol=0)
    F.cross_entropy(padded(idx).flatten(0, 1), idx.flatten()).backward()
    assert torch.equal(padded.wte.weight.grad[61:], torch.zeros(3, 32))  # never learned
    with torch.no_grad():
        padded.wte.weight[61:] = 100 * torch.ones(3, 32)  # their logits would be the largest
    drawn = generated(padded, idx.tolist(), sampling(temperature=5.0), tokens=50)
    assert max(map(max, drawn)) < 61  # never sampled


@pytest.mark.parametrize("options", [{}, {"tie_weights": False}, {"positions": "rotary", "value_embeddings": 1}])
def test_initial_weights_do_not_depend_on_the_padding_of_the_vocabulary(options):
    models, random = [], []
    for multiple in ("auto", 64):
        torch.manual_seed(0)
        models.append(build_gpt(tiny_config(vocab_size=61, pad_vocab_to_multiple_of=multiple, **options)))
        random.append(torch.rand(4))
    assert torch.equal(*random)
    assert (models[1].wte.num_embeddings, models[1].lm_head.out_features) == (64, 64)
    assert (models[1].lm_head.weight is models[1].wte.weight) == ("tie_weights" not in options)
    plain = dict(models[0].named_parameters())
    padded = dict(models[1].named_parameters())
    assert list(plain) == list(padded)
    for name, weight in padded.items():
        assert torch.equal(weight[: len(plain[name])], plain[name])
        assert not weight[len(plain[name]) :].any()


def test_initial_weights_have_gpt2_s_standard_deviations():
    torch.manual_seed(0)
    model = GPT(tiny_config(n_embd=256, n_layer=8, vocab_size=2000, n_head=4))
    for name, parameter in model.named_parameters():
        if name.endswith("c_proj.weight"):
            assert parameter.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.02), name
        elif parameter.dim() == 2:
            assert parameter.std().item() == pytest.approx(0.02, rel=0.02), name
        else:
            assert set(parameter.tolist()) == {1.0 if "ln_" in name and name.endswith("weight") else 0.0}, name


def test_the_loss_of_an_untrained_model_is_log_v():
    torch.manual_seed(0)
    idx = torch.randint(61, (64, 16))
    loss = F.cross_entropy(GPT(tiny_config())(idx).flatten(0, 1), torch.randint(61, (64 * 16,)))
    assert loss.item() == pytest.approx(math.log(61), abs=0.05)


def test_gradients_with_activation_checkpointing_are_bit_identical():
    gradients = []
    for checkpointing in (False, True):
        torch.manual_seed(0)
        model = GPT(tiny_config(activation_checkpointing=checkpointing, dropout=0.1))
        model(torch.arange(16)[None]).logsumexp(-1).sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters()])
    assert all(torch.equal(*both) for both in zip(*gradients, strict=True))


def test_dropout_is_applied_only_in_training():
    torch.manual_seed(0)
    model, idx = GPT(tiny_config(dropout=0.5)), torch.arange(16)[None]
    assert not torch.equal(model(idx), model(idx))
    model.eval()
    assert torch.equal(model(idx), model(idx))


def test_weight_tying_shares_the_head_s_weight():
    tied, untied = GPT(tiny_config()), GPT(tiny_config(tie_weights=False))
    assert tied.lm_head.weight is tied.wte.weight
    assert untied.lm_head.weight is not untied.wte.weight


def test_cropped_block_size_gives_the_same_logits_and_rejects_longer_sequences():
    torch.manual_seed(0)
    model, idx = GPT(tiny_config()), torch.arange(8)[None]
    before = model(idx)
    model.crop_block_size(8)
    assert torch.equal(model(idx), before)
    assert model.wpe.weight.shape == (8, 32)
    with pytest.raises(ValueError, match=r"9 tokens .*block_size=8"):
        model(torch.arange(9)[None])
    with pytest.raises(ValueError, match="cannot crop block_size=8 to 16"):
        model.crop_block_size(16)


def test_parameter_names_are_gpt2_s():
    names = {name for name, _ in GPT(tiny_config(n_layer=1)).named_parameters()}
    leaves = ("ln_1", "attn.c_attn", "attn.c_proj", "ln_2", "mlp.c_fc", "mlp.c_proj")
    block = {f"h.0.{leaf}.{kind}" for leaf in leaves for kind in ("weight", "bias")}
    assert names == block | {"wte.weight", "wpe.weight", "ln_f.weight", "ln_f.bias"}
