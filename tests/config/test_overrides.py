"""Command lines, and the overrides that Hydra's parser returns for them."""

import pytest
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser

from gptlab.config.base import similar_keys
from gptlab.config.overrides import parse_command_line
from gptlab.errors import UserError

KEYS = ("seed", "name", "run", "runs", "optimizer.lr", "train.global_batch_size", "train.micro_batch_size",
        "train.max_steps", "model.n_layer", "callbacks.hellaswag.batch_size", "data.source")  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "overrides", "multirun"),
    [
        ("seed=1 -m name=a", "seed=1 name=a", True),
        ("-m seed=1,2 name=a", "seed=1,2 name=a", True),
        ("seed=1,2 --multirun", "seed=1,2", True),
        ("--seed=1 name=a", "seed=1 name=a", False),
        ("name=a --optimizer.lr=1e-3 -m --seed=2", "name=a optimizer.lr=1e-3 seed=2", True),
        ("--config-dir more seed=1 -m name=more", "seed=1 name=more", True),
        ("-cd more more=1", "more=1", False),
        ("~optimizer.lr +x.y=1", "~optimizer.lr +x.y=1", False),
    ],
)
def test_flags_and_overrides_in_any_order(arguments, overrides, multirun):
    line = parse_command_line(arguments.split(), KEYS)
    flags = get_args_parser().parse_args(line.arguments)  # as Hydra parses them
    assert line.overrides == flags.overrides == overrides.split()
    assert flags.multirun == multirun
    assert flags.config_dir == ("more" if "more" in arguments.split()[:2] else None)


@pytest.mark.parametrize(
    ("argument", "is_sweep", "value"),
    [
        ("name=a=b", False, "a=b"),
        ("name=é", False, "é"),
        ("name=it's", False, "it's"),
        ("name=a,b=c", False, "a,b=c"),
        ("name='a'", False, "a"),
        ("name=a=b,é,[c,d],'e,f'", True, ["'a=b'", "'é'", "[c,d]", "'e,f'"]),
        ("name=x y, z=1", True, [r"x\ y", "'z=1'"]),
        ("name=\\", False, "\\"),
    ],
)
def test_values_outside_of_hydras_grammar_are_quoted(argument, is_sweep, value):
    line = parse_command_line([*(["-m"] if is_sweep else []), argument], KEYS)
    (override,) = OverridesParser.create().parse_overrides(line.overrides)
    assert (list(override.sweep_string_iterator()) if is_sweep else override.value()) == value


def test_paths_without_a_key_are_the_main_input_of_a_command():
    assert parse_command_line(["outputs/a b", "seed=1"], KEYS, subject="run").overrides == [
        "seed=1",
        "run='outputs/a b'",
    ]
    assert parse_command_line(["a", "-m", "b"], KEYS, subject="runs").overrides == ["runs=['a','b']"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--lr 1e-3", "Unknown flag --lr. Config keys are set without dashes, as <key>=<value>. Did you mean optim"),
        ("-seed", "Unknown flag -seed. Config keys are set without dashes, as <key>=<value>. Did you mean seed=<v"),
        ("seed=1 outputs/a", "'outputs/a' is not an override, which has the form <key>=<value>."),
        ("=5", "'=5' is not an override"),
        ("--cfg nothing", "Argument --cfg/-c: invalid choice: 'nothing'"),
        ("--config-dir", "Argument --config-dir/-cd: expected one argument."),
    ],
)  # fmt: skip
def test_an_argument_that_is_no_override_is_an_error(arguments, message):
    with pytest.raises(UserError) as raised:
        parse_command_line(arguments.split(), KEYS)
    assert str(raised.value).startswith(message)


@pytest.mark.parametrize(
    ("word", "found"),
    [
        ("lr", ["optimizer.lr"]),
        ("train.lr", ["optimizer.lr"]),
        ("batch_size", ["train.micro_batch_size", "train.global_batch_size"]),
        ("hellaswag.batch_size", ["callbacks.hellaswag.batch_size"]),
        ("modle.n_layer", ["model.n_layer"]),
        ("n_layers", ["model.n_layer"]),
        ("max_stps", ["train.max_steps"]),
        ("sed", ["seed"]),
        ("entirely_different", []),
    ],
)
def test_similar_keys_prefer_the_same_last_part(word, found):
    assert similar_keys(word, KEYS) == found
