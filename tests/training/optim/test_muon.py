"""Muon, compared with torch's Muon, with a singular value decomposition, and with hand-computed values."""

import copy
import io

import pytest
import torch
from torch import nn

from conftest import defaults, tiny_config
from gptlab.errors import UserError
from gptlab.model.gpt import GPT
from gptlab.training.config import ConstantConfig, LinearConfig, MuonConfig
from gptlab.training.optim import muon
from gptlab.training.optim.muon import StackedMuon, orthogonalize, stack_by_shape
from gptlab.training.optim.optimizers import build_optimizer, name_state, number_state, set_step_hyperparameters

MUON = MuonConfig(**defaults("optimizer/muon.yaml") | {"ns_dtype": "float32"})
PLAIN = {"ns_dtype": "float64", "cautious": False}
COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # Jordan et al. 2024
SHAPES = [
    (12, 4),
    (4, 4),
    (16, 4),
    (4, 16),
    (12, 4),
    (4, 4),
    (16, 4),
    (4, 16),
    (5, 3),
]  # two blocks, and one more matrix


def matrices(dtype: torch.dtype) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in SHAPES]


def give_gradients(parameters: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=generator).to(parameter)


@pytest.mark.parametrize(("elements", "ranks", "longest"), [(2**20, 1, 2), (100, 1, 1), (100, 2, 2)])
def test_matrices_of_one_shape_are_stacked_up_to_the_limit_or_one_per_rank(elements, ranks, longest, monkeypatch):
    monkeypatch.setattr(muon, "CPU_STACK", elements)
    numbered = [(matrix, number, number) for number, matrix in enumerate(matrices(torch.float32))]
    found = [[number for _, number, _ in stack] for stack in stack_by_shape(numbered, ranks=ranks)]
    tall = [[2, 6]] if longest > 1 else [[2], [6]]
    wide = [[3, 7]] if longest > 1 else [[3], [7]]
    assert found == [[0, 4], [1, 5], *tall, *wide, [8]]


@pytest.mark.parametrize("adjust_lr", ["original", "match_rms_adamw"])
@pytest.mark.parametrize("dtype", ["float64", "float32", "bfloat16"])
def test_stacked_muon_matches_torch_s_muon(dtype, adjust_lr, monkeypatch):
    if dtype != "bfloat16":  # the only dtype of torch's Muon
        monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.clone)
    weights = torch.float64 if dtype == "float64" else torch.float32
    ours, theirs = matrices(weights), matrices(weights)
    options = {"lr": 0.05, "weight_decay": 0.3, "momentum": 0.9, "adjust_lr_fn": adjust_lr}
    stacked = StackedMuon([{"params": ours}], ns_dtype=dtype, cautious=False, **options)
    torch_s = torch.optim.Muon(theirs, **options)
    for step in range(5):
        for parameters, optimizer in ((ours, stacked), (theirs, torch_s)):
            give_gradients(parameters, step)
            optimizer.step()
    tolerance = {"float64": 1e-14, "float32": 1e-6, "bfloat16": 1e-3}[dtype]
    for mine, its in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, its, atol=tolerance, rtol=0)
        momenta = [optimizer.state[p]["momentum_buffer"] for optimizer, p in ((stacked, mine), (torch_s, its))]
        assert torch.equal(*momenta)


@pytest.mark.parametrize("shape", [(4, 7), (7, 4), (5, 5)])
@pytest.mark.parametrize("steps", [1, 5])
def test_orthogonalize_applies_a_polynomial_to_the_singular_values(steps, shape):
    x = torch.randn(3, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    u, s, v = torch.linalg.svd(x, full_matrices=False)
    s = s / s.square().sum(1, keepdim=True).sqrt()
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        s = a * s + b * s**3 + c * s**5
    found = orthogonalize(x, COEFFICIENTS, steps, 1e-7)
    torch.testing.assert_close(found, u @ torch.diag_embed(s) @ v, atol=1e-12, rtol=0)
    if steps == 5 and shape != (5, 5):  # a square matrix has tiny singular values
        assert 0.6 < s.min() < s.max() < 1.3


def test_a_zero_gradient_changes_nothing():
    parameters = matrices(torch.float64)
    before = copy.deepcopy(parameters)
    for parameter in parameters:
        parameter.grad = torch.zeros_like(parameter)
    StackedMuon([{"params": parameters}], lr=1.0, weight_decay=0.0, **PLAIN).step()
    assert all(torch.equal(a, b) for a, b in zip(parameters, before, strict=True))


def test_cautious_weights_decay_only_where_the_update_has_their_sign():
    # for one element, the orthogonalized update is its sign times 0.701, the value of the polynomial at 1
    weights = [nn.Parameter(torch.tensor([[value]], dtype=torch.float64)) for value in (2.0, -2.0, 2.0, -2.0)]
    for weight, gradient in zip(weights, (3.0, -3.0, -3.0, 3.0), strict=True):
        weight.grad = torch.full_like(weight, gradient)
    cautious = StackedMuon(
        [{"params": weights}], lr=0.1, weight_decay=0.5, ns_steps=1, ns_dtype="float64", cautious=True
    )
    cautious.step()
    expected = [2 * (1 - 0.05) - 0.0701, -2 * (1 - 0.05) + 0.0701, 2 + 0.0701, -2 - 0.0701]
    assert [weight.item() for weight in weights] == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("skipping", [None, 0.0, 1.0], ids=["no guard", "guard", "skipped step"])
@pytest.mark.parametrize("cautious", [True, False])
@pytest.mark.parametrize("ns_dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_precision_takes_the_step_of_float64(dtype, ns_dtype, cautious, skipping):
    def step(parameters: list[nn.Parameter], precision: str, decay: float) -> list[nn.Parameter]:
        optimizer = StackedMuon(
            [{"params": parameters}], lr=0.05, weight_decay=decay, ns_dtype=precision, cautious=cautious
        )
        optimizer.found_inf = None if skipping is None else torch.tensor(skipping)
        give_gradients(parameters, 0)
        optimizer.step()
        return parameters

    before = matrices(dtype)
    exact, undecayed = ([nn.Parameter(p.detach().double()) for p in before] for _ in range(2))
    found = zip(before, step(matrices(dtype), ns_dtype, 0.3), step(exact, "float64", 0.3), strict=True)
    for (old, new, its), plain in zip(found, step(undecayed, "float64", 0.0), strict=True):
        assert new.dtype == dtype
        assert torch.equal(new, old) == bool(skipping)
        has_clear_sign = (plain - old).abs() >= 0.1 * 0.05  # of the update, which decides whether a weight decays
        rounding = max(torch.finfo(dtype).eps, torch.finfo(getattr(torch, ns_dtype)).eps * 0.05 * 4)  # lr, shape
        close = torch.isclose(new.double(), its, atol=2 * rounding, rtol=2 * torch.finfo(dtype).eps)
        assert (close | ~has_clear_sign).all()


class WithValueEmbeddings(GPT):
    def __init__(self, config):
        super().__init__(config)
        self.value_embeds = nn.ModuleList(nn.Embedding(61, 32) for _ in range(2))
        self.h[0].mix = nn.Parameter(torch.ones(2))


@pytest.mark.parametrize("tied", [True, False])
def test_muon_optimizes_exactly_the_matrices_of_the_blocks(tied):
    model = WithValueEmbeddings(tiny_config(n_layer=1, tie_weights=tied))
    groups = build_optimizer(model, MUON, fused=False).param_groups
    names = {parameter: name for name, parameter in model.named_parameters()}
    found = {group["lr"]: {names[parameter] for parameter in group["params"]} for group in groups}
    embeddings, head = (
        {"wte.weight", "wpe.weight", "value_embeds.0.weight", "value_embeds.1.weight"},
        {"lm_head.weight"},
    )
    if tied:  # the tied token embedding is in the head's group
        head = {"wte.weight"}
        embeddings -= head
    assert found == {
        MUON.lr: {f"h.0.{leaf}.weight" for leaf in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")},
        MUON.embedding_lr: embeddings,
        MUON.head_lr: head,
        MUON.vector_lr: {name for name, parameter in model.named_parameters() if parameter.dim() == 1},
    }
    assert [group["weight_decay"] for group in groups] == [MUON.weight_decay, *[MUON.adamw_weight_decay] * 2, 0.0]
    assert ["momentum" in group for group in groups] == [True, False, False, False]


def test_all_learning_rates_follow_the_schedule_and_momentum_warms_up():
    config = MUON.model_copy(update={"momentum_warmup_steps": 4})
    schedule = LinearConfig(name="linear", warmup_steps=0, decay_steps=10, min_lr_ratio=0.0)
    optimizer = build_optimizer(GPT(tiny_config(tie_weights=False)), config, fused=False)
    base = [MUON.lr, MUON.embedding_lr, MUON.head_lr, MUON.vector_lr]
    momenta = {0: 0.85, 1: 0.875, 2: 0.9, 4: 0.95, 5: 0.95, 9: 0.95}
    for step in (5, 0, 1, 9, 4, 2):  # a function of the step only
        set_step_hyperparameters(optimizer, step, config, schedule, max_steps=10)
        lrs = [group["lr"] for group in optimizer.param_groups]
        assert lrs == pytest.approx([lr * (1 - step / 10) for lr in base], rel=1e-12)
        assert optimizer.param_groups[0]["momentum"] == pytest.approx(momenta[step], abs=1e-12)
    constant = ConstantConfig(name="constant", warmup_steps=0)
    set_step_hyperparameters(optimizer, 0, MUON.model_copy(update={"momentum_warmup_steps": 0}), constant, max_steps=10)
    assert optimizer.param_groups[0]["momentum"] == 0.95


def steps(model: GPT, optimizer: torch.optim.Optimizer, numbers: range) -> None:
    for number in numbers:
        model(torch.arange(16)[None] + number).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("fused", [True, False])
def test_a_loaded_optimizer_is_bit_identical_and_keeps_its_own_hyperparameters(fused):
    torch.manual_seed(0)
    model = GPT(tiny_config())
    optimizer = build_optimizer(model, MUON, fused=fused)
    steps(model, optimizer, range(3))
    other = copy.deepcopy(model)
    changed = MUON.model_copy(update={"lr": 0.5, "momentum": 0.7})
    file = io.BytesIO()
    torch.save(name_state(optimizer.state_dict(), model, MUON), file)
    file.seek(0)
    named = torch.load(file, weights_only=True)
    assert set(named["state"]) == {name for name, _ in model.named_parameters()}
    assert set(named["state"]["h.1.mlp.c_proj.weight"]) == {"momentum_buffer"}
    assert set(named["state"]["wte.weight"]) == {"step", "exp_avg", "exp_avg_sq"}
    its = build_optimizer(other, changed, fused=fused)
    its.load_state_dict(number_state(named, other, changed))
    assert [group["initial_lr"] for group in its.param_groups][:2] == [0.5, MUON.embedding_lr]
    assert its.param_groups[0]["momentum"] == 0.7
    its.param_groups[0].update(lr=MUON.lr, momentum=MUON.momentum)
    for one, of_one in ((model, optimizer), (other, its)):
        steps(one, of_one, range(3, 6))
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))
    assert its.state[other.wte.weight]["step"] == 6


def test_the_state_of_another_optimizer_raises():
    model = GPT(tiny_config())
    optimizer = build_optimizer(model, MUON, fused=False)
    state = torch.optim.AdamW(model.parameters()).state_dict()
    with pytest.raises(UserError, match="that of another optimizer"):
        optimizer.load_state_dict(state)
