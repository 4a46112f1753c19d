"""Histograms of weights and gradients, compared with numpy and with a plain training loop."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from commands import assert_success
from gptlab.tracking.histograms import Histogram, _write_to_wandb, count_values
from reference_training import plain_training

pytestmark = pytest.mark.slow  # whole runs

WATCH = ("callbacks=[default,watch]", "callbacks.watch.every=4", "trainer.precision=32-true")


def test_counts_are_those_of_numpy():
    values = torch.randn(5000, generator=torch.Generator().manual_seed(1)).view(50, 100)
    found = count_values(values, 16)
    counts, edges = np.histogram(values.numpy(), bins=16)
    assert found is not None
    assert found.counts == counts.tolist()
    assert found.edges == pytest.approx(edges.tolist(), abs=1e-6)
    assert found.total == pytest.approx(values.sum().item())
    assert found.squares == pytest.approx(values.square().sum().item())


def test_equal_values_have_a_histogram_and_values_that_are_not_finite_have_none():
    zeros = count_values(torch.zeros(7), 4)
    assert zeros is not None
    assert (sum(zeros.counts), zeros.edges[0], zeros.edges[-1]) == (7, -0.5, 0.5)
    assert count_values(torch.tensor([1.0, torch.nan]), 4) is None
    assert count_values(torch.tensor([1.0, torch.inf]), 4) is None


def test_wandb_gets_the_counts_and_edges():
    rows = []
    logger = SimpleNamespace(log_metrics=lambda metrics, step: rows.append((metrics, step)))
    _write_to_wandb(logger, {"weights/a": Histogram([1.0, 2.0], [0.0, 0.5, 1.0], 0.0, 0.0)}, 5)
    ((metrics, step),) = rows
    assert step == 5
    assert list(metrics["weights/a"].histogram) == [1.0, 2.0]
    assert list(metrics["weights/a"].bins) == [0.0, 0.5, 1.0]


def shown_histograms(directory) -> dict[str, dict[int, SimpleNamespace]]:
    """Returns the histograms of TensorBoard by name and step."""
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    shown = events.EventAccumulator(str(directory / "tensorboard"), size_guidance={"histograms": 0}).Reload()
    names = shown.Tags()["histograms"]
    return {name: {event.step: event.histogram_value for event in shown.Histograms(name)} for name in names}


@pytest.mark.parametrize("devices", [(), pytest.param(("trainer=fsdp", "trainer.devices=2"), marks=pytest.mark.slow)])
def test_tensorboard_shows_the_weights_and_gradients_of_a_plain_loop(user, monkeypatch, devices):
    assert_success(user.train(*WATCH, "logger=tensorboard", *devices))
    directory = user.only_run()
    expected: dict[tuple[str, int], torch.Tensor] = {}
    step, models = [0], []
    clip_grad_norm_ = torch.nn.utils.clip_grad_norm_

    def clip(parameters, limit):
        for name, parameter in models[-1].named_parameters():
            expected[f"weights/{name}", step[0]] = parameter.detach().clone()
            expected[f"gradients/{name}", step[0]] = parameter.grad.clone()
        return clip_grad_norm_(parameters, limit)

    def begin(number, model, _):
        step[0] = number + 1
        models.append(model)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
    plain_training(user, directory, 4, begin)
    shown = shown_histograms(directory)
    assert shown.keys() == {name for name, _ in expected}
    for name, steps in shown.items():
        assert steps.keys() == {1, 4}
        for number, found in steps.items():
            tensor = expected[name, number].double()
            assert found.num == tensor.numel()
            # rounding moves the smallest gradients, which are only rounding (biases of keys)
            assert found.sum_squares == pytest.approx(tensor.square().sum().item(), rel=1e-3, abs=1e-9), name
            low = tensor.min() if tensor.min() < tensor.max() else tensor.min() - 0.5
            assert found.min == pytest.approx(low.item(), rel=1e-2, abs=1e-6), name


def test_without_such_a_logger_it_says_that_it_has_no_effect(user):
    done = user.train(*WATCH, "train.max_steps=2")
    assert_success(done)
    assert "callbacks.watch has no effect" in done.stdout
