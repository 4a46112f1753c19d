"""The predefined sweeps: each has a question, a baseline among its points, and paired seeds."""

from functools import cache
from itertools import product
from typing import Any

import pytest

from configs import read, resolved
from gptlab.config.command import configuration_folder
from gptlab.config.schema import RunConfig
from gptlab.model.config import parameter_count

FILES = sorted(path.stem for path in (configuration_folder() / "sweeps").glob("*.yaml"))


def options(params: dict[str, Any]) -> dict[str, list[str]]:
    return {key: str(value).split(",") for key, value in params.items()}


@cache
def configurations(name: str) -> dict[tuple[str, ...], RunConfig]:
    """Returns the configurations of a sweep for its first seed, keyed by the varied values."""
    values, sweeper = read(name)
    chosen = [
        f"{group.partition('/')[2]}={option}" for part in values.pop("defaults", []) for group, option in part.items()
    ]
    sections = {key: value if isinstance(value, dict) else {"": value} for key, value in values.items()}
    named = [
        f"{key}.{name}".rstrip(".") + f"={'null' if value is None else value}"
        for key, section in sections.items()
        for name, value in section.items()
    ]
    varied = {key: of for key, of in options(sweeper["params"]).items() if key != "seed"}
    points = product(*varied.values())
    return {point: resolved(*chosen, *named, *map("=".join, zip(varied, point, strict=True))) for point in points}


def test_the_sweeps_are_those_that_the_readme_names():
    assert FILES == ["batch_size", "ladder", "lr", "scaling", "seeds", "width_depth"]


@pytest.mark.parametrize("name", FILES)
def test_every_sweep_has_a_question_a_baseline_and_paired_seeds(name):
    _, sweeper = read(name)
    params = options(sweeper["params"])
    assert sweeper["question"].endswith("?")
    assert len(params["seed"]) == len(set(params["seed"])) >= 3
    for key, value in sweeper["baseline"].items():
        assert str(value) in params[key] or value in map(float, params[key])


@pytest.mark.parametrize("name", FILES)
def test_every_point_is_a_different_valid_configuration(name):
    found = list(configurations(name).values())
    assert all(found.count(config) == 1 for config in found)


def test_batches_are_compared_at_equal_tokens_and_rates():
    found = configurations("batch_size").values()
    assert {c.steps * c.train.global_batch_size * c.model.block_size for c in found} == {2**20}
    assert {c.optimizer.lr for c in found} == {2e-3}


def test_the_deep_and_the_wide_model_have_equal_blocks_and_tokens():
    found = configurations("width_depth")
    deep, wide = found["8", "64"], found["2", "128"]
    assert deep.model.n_layer * deep.model.n_embd**2 == wide.model.n_layer * wide.model.n_embd**2
    sizes = [parameter_count(c.with_vocabulary(257).model) for c in (deep, wide)]
    assert sizes[0] == pytest.approx(sizes[1], rel=0.1)
    assert len({(c.steps, c.train.global_batch_size, c.optimizer.lr) for c in found.values()}) == 1


def test_the_scaling_sweep_has_enough_sizes_and_lengths_for_a_fit():
    found = configurations("scaling").values()
    sizes = sorted({parameter_count(c.with_vocabulary(257).model) for c in found})
    lengths = sorted({c.steps for c in found})
    assert (len(sizes), len(lengths)) == (4, 4)
    assert sizes[-1] > 20 * sizes[0]
    assert lengths[-1] > 7 * lengths[0]
    assert all(c.schedule.warmup_steps < c.steps / 5 and c.schedule.decay_steps is None for c in found)
