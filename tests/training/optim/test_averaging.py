"""Averages of the weights, compared with explicit weighted sums."""

import math
from contextlib import suppress

import pytest
import torch

from conftest import defaults, tiny_config
from gptlab.errors import UserError
from gptlab.model.gpt import GPT
from gptlab.training.config import AdamWConfig, MuonConfig
from gptlab.training.optim.averaging import enable_averaging, set_decay, swap_in_averages, swap_out_averages
from gptlab.training.optim.optimizers import SkippedStep, build_optimizer, skip_step_if

ADAMW = AdamWConfig(name="adamw", lr=0.01, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused="auto")
MUON = MuonConfig(**defaults("optimizer/muon.yaml") | {"ns_dtype": "float32"})
DECAY = 0.4  # reached by the warm-up 2/11, 3/12, 4/13, 5/14, 6/15 at the sixth step


def build(config=ADAMW, *, fused: bool = True):
    torch.manual_seed(0)
    model = GPT(tiny_config())
    optimizer = build_optimizer(model, config, fused=fused)
    enable_averaging(optimizer, DECAY)
    return model, optimizer


def make_step(model, optimizer, step: int, *, bad: bool = False) -> None:
    optimizer.zero_grad()
    set_decay(optimizer, step, DECAY)
    model(torch.arange(16)[None] + step).square().sum().backward()
    if bad:
        model.wpe.weight.grad[3, 5] = float("nan")
    with suppress(SkippedStep):
        optimizer.step(lambda: skip_step_if(optimizer, torch.tensor(float(bad))))


def averages(model, optimizer) -> dict[str, torch.Tensor]:
    return {name: optimizer.state[parameter]["average"].clone() for name, parameter in model.named_parameters()}


def weighted_sum(weights: list[torch.Tensor], decays: list[float]) -> torch.Tensor:
    """Returns the average as an explicit sum of the weights after all steps, in float64."""
    shares = [(1 - decay) * math.prod(decays[later + 1 :]) for later, decay in enumerate(decays)]
    assert sum(shares) == pytest.approx(1)
    return sum(share * weight.double() for share, weight in zip(shares, weights, strict=True))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_the_average_is_the_weighted_sum_over_all_steps(config, fused):
    model, optimizer = build(config, fused=fused)
    history = []
    for step in range(8):
        make_step(model, optimizer, step)
        history.append({name: p.detach().clone() for name, p in model.named_parameters()})
    decays = [0, 2 / 11, 3 / 12, 4 / 13, 5 / 14, 6 / 15, 0.4, 0.4]
    found = averages(model, optimizer)
    assert found.keys() == history[0].keys()
    assert "lm_head.weight" not in found  # tied to wte.weight
    for name, average in found.items():
        expected = weighted_sum([weights[name] for weights in history], decays)
        torch.testing.assert_close(average.double(), expected, atol=1e-6, rtol=0, msg=name)
        assert (average - history[-1][name]).abs().max() > 1e-4, name


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("config", [ADAMW, MUON], ids=["adamw", "muon"])
def test_a_skipped_step_does_not_change_the_average_and_the_next_step_does(config, fused):
    model, optimizer = build(config, fused=fused)
    for step in range(3):
        make_step(model, optimizer, step)
    before = averages(model, optimizer)
    make_step(model, optimizer, 3, bad=True)
    assert all(torch.equal(average, before[name]) for name, average in averages(model, optimizer).items())
    make_step(model, optimizer, 4)
    for name, parameter in model.named_parameters():
        expected = before[name].double() * 5 / 14 + parameter.detach().double() * 9 / 14
        torch.testing.assert_close(optimizer.state[parameter]["average"].double(), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("fused", [True, False])
def test_the_first_step_can_be_skipped(fused):
    model, optimizer = build(fused=fused)
    initial = model.wte.weight.detach().clone()
    make_step(model, optimizer, 0, bad=True)
    assert torch.equal(model.wte.weight, initial)
    make_step(model, optimizer, 1)
    state = optimizer.state[model.wte.weight]
    assert state["step"] == 1
    kept = 2 / 11 if fused else 0  # unfused, the average starts at this step
    expected = kept * initial.double() + (1 - kept) * model.wte.weight.detach().double()
    torch.testing.assert_close(state["average"].double(), expected, atol=1e-6, rtol=0)


def test_swapping_averages_in_and_out_is_in_place():
    model, optimizer = build()
    for step in range(3):
        make_step(model, optimizer, step)
    names = dict(model.named_parameters())
    trained = {name: p.detach().clone() for name, p in names.items()}
    addresses = {name: p.data_ptr() for name, p in names.items()}
    kept = swap_in_averages([optimizer])
    assert all(torch.equal(names[name], average) for name, average in averages(model, optimizer).items())
    assert model.lm_head.weight is model.wte.weight
    swap_out_averages(kept)
    assert all(torch.equal(names[name], weights) for name, weights in trained.items())
    assert addresses == {name: p.data_ptr() for name, p in model.named_parameters()}


def test_states_with_and_without_averages_are_incompatible():
    model, optimizer = build()
    plain = build_optimizer(model, ADAMW, fused=True)
    for one, others in ((plain, optimizer), (optimizer, plain)):
        with pytest.raises(UserError, match=r"train\.ema_decay\) can be neither enabled nor disabled"):
            one.load_state_dict(others.state_dict())
    make_step(model, optimizer, 0)
    plain.step()
    assert swap_in_averages([plain]) == []
    state = plain.state_dict()
    assert {moment for moments in state["state"].values() for moment in moments} == {"step", "exp_avg", "exp_avg_sq"}
    assert all("ema_decay" not in group for group in state["param_groups"])
