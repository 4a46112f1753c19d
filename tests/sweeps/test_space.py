"""Search space of a sweep: grids and distributions from command-line overrides."""

import pytest
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

from gptlab.errors import UserError
from gptlab.sweeps.space import SearchSpace


def test_grid_has_every_combination_with_the_last_key_fastest():
    space = SearchSpace({}, ["optimizer.lr=1e-3,2e-3", "train.max_steps=4", "seed=range(1,4)"])
    assert space.fixed == ["train.max_steps=4"]
    assert space.written == {"optimizer.lr": "1e-3,2e-3", "seed": "range(1,4)"}
    points = [(point["optimizer.lr"], point["seed"]) for point in space.grid()]
    assert points == [(lr, seed) for lr in ("0.001", "0.002") for seed in ("1", "2", "3")]


def test_command_line_takes_precedence_over_params():
    space = SearchSpace({"optimizer.lr": "1,2,3", "seed": "1,2"}, ["seed=7", "sweeps=lr"])
    assert list(space.varied) == ["optimizer.lr"]
    assert space.fixed == ["seed=7", "sweeps=lr"]


def test_config_groups_and_added_keys_can_be_varied():
    space = SearchSpace({}, ["model=nano,tiny", "+data.x=1,2", "~debug"])
    assert next(list(point.items()) for point in space.grid()) == [("model", "nano"), ("+data.x", "1")]
    assert space.fixed == ["~debug"]


def test_overrides_become_optuna_distributions():
    space = SearchSpace(
        {},
        ["optimizer.lr=tag(log, interval(1e-4, 1e-2))", "model.n_layer=int(interval(2, 8))", "model.norm=layer,rms"],
    )
    assert space.distributions() == {
        "optimizer.lr": FloatDistribution(1e-4, 1e-2, log=True),
        "model.n_layer": IntDistribution(2, 8),
        "model.norm": CategoricalDistribution(["layer", "rms"]),
    }
    assert space.ends() == [
        {"optimizer.lr": "0.0001", "model.n_layer": "2", "model.norm": "layer"},
        {"optimizer.lr": "0.01", "model.n_layer": "8", "model.norm": "rms"},
    ]


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["optimizer.lr=interval(1, 2)"], "infinitely many values"),
        (["seed=range(3,3)"], "has no values"),
    ],
)
def test_invalid_grid_raises(arguments, sentence):
    with pytest.raises(UserError, match=sentence):
        SearchSpace({}, arguments).grid()


def test_space_without_varied_keys_is_a_grid_of_one_point():
    space = SearchSpace({}, ["train.max_steps=3"])
    assert space.grid() == [{}]
    with pytest.raises(UserError, match="No key is varied"):
        space.distributions()


def test_empty_interval_raises():
    with pytest.raises(UserError, match="is an empty interval"):
        SearchSpace({}, ["optimizer.lr=interval(2, 1)"]).distributions()


def test_only_points_of_the_space_are_contained_in_it():
    space = SearchSpace({}, ["optimizer=adamw,muon", "optimizer.lr=interval(0.1, 1)", "seed=range(1,3)", "name=a"])
    point = {"optimizer": "muon", "optimizer.lr": "0.25", "seed": "2"}
    assert space.contains(point)
    assert space.contains(point | {"optimizer.lr": "1e-05"})
    for changes in (
        {"optimizer": "sgd"},
        {"optimizer": "{_target_:os.system}"},
        {"seed": "3"},
        {"optimizer.lr": "${oc.env:HOME}"},
        {"optimizer.lr": "{a:1}"},
        {"name": "b"},
        {"+callbacks.x": "1"},
    ):
        assert not space.contains(point | changes), changes
    assert not space.contains({"seed": "2"})
    for grid in (*space.ends(), *SearchSpace({}, ["model=nano,tiny", "model.norm='rms',layer"]).grid()):
        assert SearchSpace({}, [f"{key}={value},x" for key, value in grid.items()]).contains(grid)
