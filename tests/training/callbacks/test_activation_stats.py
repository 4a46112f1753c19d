"""Activation statistics, computed independently from the model's own forward pass; training does not change."""

import pytest
import torch

from commands import assert_config_error, assert_success, metrics, newest_state
from gptlab.training.callbacks.activation_stats import _moments
from reference_training import plain_training

pytestmark = pytest.mark.slow  # whole runs

STATS = ("callbacks=[checkpoint,activation_stats]", "callbacks.activation_stats.every=4", "trainer.precision=32-true")
KINDS = ("mean", "std", "kurtosis", "zeros", "max")


def expected_stats(x: torch.Tensor) -> dict[str, float]:
    x = x.detach().double().flatten()
    centered = x - x.mean()
    return {
        "mean": x.mean().item(),
        "std": x.std(unbiased=False).item(),
        "kurtosis": (centered.pow(4).mean() / centered.square().mean() ** 2).item(),
        "zeros": (x == 0).double().mean().item(),
        "max": x.abs().max().item(),
    }


def test_statistics_match_those_of_a_plain_loop(user, runs):
    directory = runs.give(user, "activations", *STATS)
    found: dict[str, dict[int, dict[str, float]]] = {}
    step = [0]

    def begin(number, model, _):
        step[0] = number + 1
        if number == 0:
            for name in ("h.0.attn", "h.1.mlp", "ln_f"):
                model.get_submodule(name).register_forward_hook(
                    lambda _, __, out, name=name: found.setdefault(name, {}).__setitem__(step[0], expected_stats(out))
                )

    plain_training(user, directory, 4, begin)
    for name, by_step in found.items():
        for kind in KINDS:
            values = metrics(directory, f"activation_{kind}/{name}")
            assert values.keys() == {1, 4}
            assert values == pytest.approx({n: by_step[n][kind] for n in values}, rel=1e-3, abs=1e-6), (name, kind)


@pytest.mark.parametrize("options", [(), ("model.dropout=0.1", "train.micro_batch_size=4")])
def test_statistics_do_not_change_training(user, runs, options):
    without = runs.give(user, "without", "callbacks=checkpoint", "trainer.precision=32-true", *options)
    measured = runs.give(user, "activations", *STATS, *options)
    assert metrics(measured, "train/loss") == metrics(without, "train/loss")
    weights = [newest_state(directory)["state_dict"] for directory in (without, measured)]
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


@pytest.mark.slow
def test_statistics_of_a_compiled_model_are_those_of_an_eager_one(user, runs):
    eager = runs.give(user, "activations", *STATS)
    assert_success(user.train("name=compiled", *STATS, "train.compile=true", timeout=600))
    for kind in KINDS:
        name = f"activation_{kind}/h.1.mlp"
        assert metrics(user.only_run("compiled"), name) == pytest.approx(metrics(eager, name), rel=1e-3), name


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_statistics_of_two_processes_are_those_of_one(user, runs, strategy):
    one = runs.give(user, "activations", *STATS)
    assert_success(user.train("name=two", *STATS, f"trainer={strategy}", "trainer.devices=2"))
    for kind in KINDS:
        name = f"activation_{kind}/ln_f"
        assert metrics(user.only_run("two"), name) == pytest.approx(metrics(one, name), rel=1e-3, abs=1e-6), name


def test_moments_of_known_values():
    values = [0.0, 0.0, 1.0, 3.0]  # mean 1, variance 1.5
    sums = [sum(value**power for value in values) for power in (1, 2, 3, 4)]
    fourth = sum((value - 1) ** 4 for value in values) / 4
    assert _moments(4, *sums, 2) == pytest.approx(
        {"mean": 1.0, "std": 1.5**0.5, "kurtosis": fourth / 1.5**2, "zeros": 0.5}
    )


def test_an_unknown_activation_is_reported(user):
    done = user.train(*STATS, "callbacks.activation_stats.modules=[h.*.attention]")
    assert_config_error(done, "callbacks.activation_stats.modules: h.*.attention matches no activation")
