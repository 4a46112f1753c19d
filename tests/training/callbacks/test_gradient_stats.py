"""Gradient statistics, compared with those of a plain training loop."""

import pytest
import torch

from commands import assert_config_error, assert_success, metrics
from conftest import tiny_config
from gptlab.model.gpt import GPT
from gptlab.training.callbacks.gradient_stats import group_parameters
from reference_training import plain_training

pytestmark = pytest.mark.slow  # whole runs

STATS = ("callbacks=[default,gradient_stats]", "callbacks.gradient_stats.every=4", "trainer.precision=32-true")
PARTS = ("wte", "wpe", "h.0", "h.1", "ln_f")


def by_part(model) -> dict[str, list[torch.nn.Parameter]]:
    return {part: [p for name, p in model.named_parameters() if f"{name}.".startswith(f"{part}.")] for part in PARTS}


@pytest.fixture
def reference(user, monkeypatch):
    """Returns a function that gives the statistics of each step of a plain loop, by metric, before clipping."""

    def measure(directory, steps):
        found: dict[str, dict[int, float]] = {}
        before: dict[str, torch.Tensor] = {}

        def flat(tensors) -> torch.Tensor:
            return torch.cat([tensor.detach().flatten().double() for tensor in tensors])

        def clip(parameters, limit):
            for part, members in by_part(models[-1]).items():
                gradient = flat(p.grad for p in members)
                for kind, value in (
                    ("norm", gradient.norm()),
                    ("rms", gradient.square().mean().sqrt()),
                    ("max", gradient.abs().max()),
                ):
                    found.setdefault(f"grad_{kind}/{part}", {})[step[0] + 1] = value.item()
            return clip_grad_norm_(parameters, limit)

        def begin(number, model, _):
            if before:
                update(model, number)
            step[0] = number
            models.append(model)
            before.update({part: flat(members) for part, members in by_part(model).items()})

        def update(model, number):
            for part, members in by_part(model).items():
                ratio = (flat(members) - before[part]).norm() / before[part].norm()
                found.setdefault(f"update_ratio/{part}", {})[number] = ratio.item()

        step, models = [0], []
        clip_grad_norm_ = torch.nn.utils.clip_grad_norm_
        monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", clip)
        _, model = plain_training(user, directory, steps, begin)
        update(model, steps)
        return found

    return measure


def test_statistics_match_a_plain_loop_before_clipping_and_with_accumulation(user, reference):
    assert_success(user.train(*STATS, "train.grad_clip=1.0", "train.micro_batch_size=4"))
    directory = user.only_run()
    expected = reference(directory, 6)
    assert len(expected) == 4 * len(PARTS)
    for name, values in expected.items():
        found = metrics(directory, name)
        assert found.keys() == {1, 4}, name
        assert found == pytest.approx({step: values[step] for step in found}, rel=2e-4), name
    assert max(expected["grad_norm/h.0"].values()) > 1  # clipping would have changed it


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_statistics_of_two_processes_are_those_of_one(user, runs, strategy):
    one = runs.give(user, "stats", *STATS)
    assert_success(user.train("name=two", *STATS, f"trainer={strategy}", "trainer.devices=2"))
    two = user.only_run("two")
    for part in PARTS:
        for kind in ("grad_norm", "grad_rms", "grad_max", "update_ratio"):
            name = f"{kind}/{part}"
            assert metrics(two, name) == pytest.approx(metrics(one, name), rel=1e-3), name
            assert len(metrics(one, name)) == 2


def test_statistics_do_not_change_training(user, runs):
    without = runs.give(user, "without", "trainer.precision=32-true")
    with_stats = runs.give(user, "stats", *STATS)
    assert metrics(with_stats, "train/loss") == metrics(without, "train/loss")


@pytest.mark.parametrize("every", ["0", "1.5", "often"])
def test_an_invalid_interval_is_reported_before_anything_is_written(user, every):
    done = user.train(*STATS, f"callbacks.gradient_stats.every={every}")
    assert_config_error(done, "it should be an integer greater than 0")
    assert not (user.folder / "outputs").exists()


def test_patterns_select_modules(user):
    model = GPT(tiny_config())
    groups = group_parameters(model, ["h.*.attn", "ln_f"], "key")
    assert groups.keys() == {"h.0.attn", "h.1.attn", "ln_f"}
    assert groups["h.1.attn"] == list(model.h[1].attn.parameters())
    done = user.train(*STATS, "callbacks.gradient_stats.modules=[h.*.atn]")
    assert_config_error(done, "callbacks.gradient_stats.modules: h.*.atn matches no module")
