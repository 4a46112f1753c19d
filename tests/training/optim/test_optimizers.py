import copy
from contextlib import suppress

import pytest
import torch

from conftest import defaults, tiny_config
from gptlab.model.gpt import GPT
from gptlab.training.config import AdamWConfig, ComponentOptimizerConfig, MuonConfig
from gptlab.training.optim.optimizers import SkippedStep, build_optimizer, skip_step_if

ADAMW = AdamWConfig(name="adamw", lr=0.1, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.1, fused="auto")
MUON = MuonConfig(**defaults("optimizer/muon.yaml"))
OPTIMIZERS = {
    "adamw": ADAMW,
    "muon": MUON,
    **{name: ComponentOptimizerConfig(**defaults(f"optimizer/{name}.yaml")) for name in ("sgd", "adafactor", "lion")},
    "own": ComponentOptimizerConfig(**{"_target_": f"{__name__}.Own", "lr": 0.1}),
}


class Own(torch.optim.Optimizer):
    """An optimizer that needs a gradient for every parameter, and counts its steps in the parameter groups."""

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr, "steps": 0})

    @torch.no_grad()
    def step(self, closure=None):
        closure()
        for group in self.param_groups:
            group["steps"] += 1
            for parameter in group["params"]:
                self.state[parameter]["last"] = parameter.grad.clone()
                parameter -= group["lr"] * parameter.grad / group["steps"]


@pytest.mark.parametrize("tied", [True, False])
def test_weight_decay_applies_to_matrices_and_embeddings_only(tied):
    model = GPT(tiny_config(n_layer=1, tie_weights=tied))
    names = {parameter: name for name, parameter in model.named_parameters()}
    groups = build_optimizer(model, ADAMW, fused=False).param_groups
    decay = {group["weight_decay"]: {names[parameter] for parameter in group["params"]} for group in groups}
    matrices = {f"h.0.{leaf}.weight" for leaf in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    head = set() if tied else {"lm_head.weight"}
    assert decay == {
        0.1: matrices | {"wte.weight", "wpe.weight"} | head,
        0.0: {name for name, parameter in model.named_parameters() if parameter.dim() == 1},
    }


@pytest.mark.parametrize("fused", [True, False])
def test_one_adamw_step_matches_the_formula(fused):
    torch.manual_seed(0)
    model = GPT(tiny_config()).double()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = build_optimizer(model, ADAMW, fused=fused)
    model(torch.arange(16)[None]).square().sum().backward()
    optimizer.step()
    for name, parameter in model.named_parameters():
        g, decay = parameter.grad, 0.1 if parameter.dim() > 1 else 0.0
        # Loshchilov and Hutter 2019, algorithm 2, at t = 1: the bias-corrected moments are g and g**2
        expected = before[name] * (1 - 0.1 * decay) - 0.1 * g / (g.abs() + 1e-8)
        torch.testing.assert_close(parameter.detach(), expected, atol=1e-10, rtol=1e-7, msg=name)


@pytest.mark.parametrize("bad_step", [0, 2])
@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", ["adamw", "muon", "sgd", "adafactor", "lion", "own"])
def test_a_skipped_step_changes_neither_weights_nor_optimizer_state(name, fused, bad_step):
    config = OPTIMIZERS[name]
    torch.manual_seed(0)
    model = GPT(tiny_config())
    optimizer = build_optimizer(model, config, fused=fused)
    twin = copy.deepcopy(model)  # does not have the bad step
    its_optimizer = build_optimizer(twin, config, fused=fused)
    for step in range(4):
        is_bad = step == bad_step
        for one, its in ((model, optimizer), (twin, its_optimizer)):
            one(torch.arange(16)[None] + step).square().sum().backward()
            if one is model and is_bad:
                one.wpe.weight.grad[3, 5] = float("nan")
                one.h[1].mlp.c_fc.weight.grad[3, 5] = float("inf")
            if one is model or not is_bad:
                with suppress(SkippedStep):
                    its.step(lambda its=its, bad=is_bad: skip_step_if(its, torch.tensor(float(bad))))
            its.zero_grad()
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), twin.parameters(), strict=True))
    (state, groups), (its_state, its_groups) = (
        (found["state"], found["param_groups"]) for found in (optimizer.state_dict(), its_optimizer.state_dict())
    )
    assert groups == its_groups
    assert len(state) == len(list(model.parameters()))
    for number, values in state.items():
        assert all(torch.equal(value, its_state[number][name]) for name, value in values.items()), number
        assert values.get("step", 3) == 3  # Muon has no step count
