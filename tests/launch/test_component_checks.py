"""Checks of a run's components against the interfaces of their nodes, and counts of their parameters and state."""

import functools
import inspect
import json
import re
from collections.abc import Mapping

import pytest
import torch
from lightning.pytorch import Trainer

from configs import resolved
from gptlab.config.base import validate
from gptlab.config.components import TARGET
from gptlab.config.schema import RunConfig
from gptlab.errors import UserError
from gptlab.launch.components import (
    build_callbacks,
    build_component_loggers,
    check_components,
    count_components,
    try_components,
)
from gptlab.model.config import parameter_count
from gptlab.model.modern import build_gpt
from gptlab.planning.memory import count_by_part, count_shares, optimizer_state_size
from gptlab.training.config import OWNED_FLAGS
from gptlab.training.optim.optimizers import build_optimizer
from own_package import NODES, make_importable

make_importable()

LORA = {"rank": 1, "alpha": 1, "targets": ["attn.c_attn"]}
TENSOR_PARALLEL = {"trainer.strategy": "fsdp_tp", "trainer.devices": 2, "trainer.tensor_parallel": 2}
FREE_FLAGS = {  # arguments of the Trainer that trainer.flags may set
    *("limit_test_batches", "limit_predict_batches", "detect_anomaly", "sync_batchnorm"),
    *("model_registry", "enable_autolog_hparams"),
}


def node(key: str, **values: object) -> dict[str, object]:
    """Returns the changes of the configuration that set a component."""
    if key == "model":
        return {f"model.{name}": value for name, value in values.items()}
    return {key: {"lr": 1} | values if key == "optimizer" else values}


@functools.cache
def base() -> str:
    return json.dumps(resolved("data=text", "data.source=text.txt", "model=tiny").model_dump(mode="json"))


def config_with(changes: Mapping[str, object]) -> RunConfig:
    """Returns the configuration of a tiny run with changes by dotted key."""
    values = json.loads(base())
    for key, value in changes.items():
        *groups, name = key.split(".")
        functools.reduce(lambda part, group: part[group], groups, values)[name] = value
    return validate(RunConfig, values)


def error_of(changes: Mapping[str, object]) -> str:
    """Returns the message of the error of a configuration with these changes, which must have one line."""
    with pytest.raises(UserError) as error:
        check_components(config_with(changes))
    assert "\n" not in str(error.value)
    return str(error.value)


KEYS = (
    *("callbacks.x", "logger.x", "optimizer", "schedule", "model", "model.block", "model.activation", "model.norm"),
    *("model.attention", "loss"),
)


@pytest.mark.parametrize("key", KEYS)
@pytest.mark.parametrize("target", ["os.system", "gptlab.verification.runs.RunProcess", "subprocess.Popen"])
def test_a_target_without_the_interface_of_its_node_is_refused(key, target):
    message = error_of(node(key, _target_=target))
    assert re.match(rf"{re.escape(key)}\._target_={re.escape(target)} is (not|neither) a", message), message


@pytest.mark.parametrize("key", KEYS)
def test_a_target_that_does_not_exist_is_reported_with_its_key(key):
    assert error_of(node(key, _target_="mylab.Nothing")).startswith(f"{key}._target_=mylab.Nothing cannot be imported")


ARGUMENTS = {
    "unknown argument of a callback": (
        node("callbacks.x", _target_="mylab.callbacks.StepLog", file="a", evry=2),
        "Unknown argument callbacks.x.evry: StepLog has no such argument. Did you mean every?",
    ),
    "missing argument of a callback": (
        node("callbacks.x", _target_="mylab.callbacks.StepLog"),
        "callbacks.x.file is missing",
    ),
    "wrong type in a callback": (
        node("callbacks.x", _target_="mylab.callbacks.StepLog", file="a", every="often"),
        "callbacks.x.every='often' is not valid: it should be an integer.",
    ),
    "checkpoint callback": (
        node("callbacks.x", _target_="mylab.callbacks.BestCheckpoint"),
        "callbacks.x._target_=mylab.callbacks.BestCheckpoint: gptlab writes the checkpoints of a run.",
    ),
    "Lightning's checkpoint callback": (
        node("callbacks.x", _target_="lightning.pytorch.callbacks.ModelCheckpoint"),
        "Set the keys of callbacks.checkpoint.",
    ),
    "unknown argument of a logger": (
        node("logger.x", _target_="mylab.loggers.LineLogger", prefx="a"),
        "Unknown argument logger.x.prefx: LineLogger has no such argument. Did you mean prefix?",
    ),
    "unknown argument of an optimizer": (
        node("optimizer", _target_="torch.optim.SGD", momentun=0.9),
        "Unknown argument optimizer.momentun: SGD has no such argument. Did you mean momentum?",
    ),
    "parameters of an optimizer": (
        node("optimizer", _target_="torch.optim.SGD", params=1),
        "optimizer.params cannot be set: gptlab passes this argument to SGD.",
    ),
    "learning rate of the wrong type": (
        node("optimizer", _target_="torch.optim.SGD", lr="fast"),
        "optimizer.lr='fast' is not valid: it should be",
    ),
    "parameter groups that are no function": (
        node("optimizer", _target_="torch.optim.SGD", param_groups={"_target_": "mylab.model"}),
        "optimizer.param_groups._target_=mylab.model is neither a class nor a function.",
    ),
    "unknown argument of a schedule": (
        node("schedule", _target_="mylab.schedules.inverse_root", powr=1),
        "Unknown argument schedule.powr: inverse_root has no such argument. Did you mean power?",
    ),
    "learning rate of a schedule": (
        node("schedule", _target_="mylab.schedules.inverse_root", lr=1),
        "schedule.lr cannot be set: gptlab passes this argument to inverse_root.",
    ),
    "function without the arguments of a schedule": (
        node("schedule", _target_="mylab.losses.focal", gamma=1),
        "schedule._target_=mylab.losses.focal is not a function f(step, *, lr, max_steps)",
    ),
    "unknown argument of a model": (
        node("model", _target_="mylab.model.ScaledGPT", scal=1),
        "Unknown argument model.scal: ScaledGPT has no such argument. Did you mean scale?",
    ),
    "configuration of a model": (
        node("model", _target_="mylab.model.ScaledGPT", config={}),
        "model.config cannot be set: gptlab passes this argument to ScaledGPT.",
    ),
    "module that is no model": (
        node("model", _target_="torch.nn.Linear"),
        "model._target_=torch.nn.Linear is not a subclass of gptlab.model.causal_lm.CausalLM.",
    ),
    "layer of a block": (
        node("model.block", _target_="mylab.model.ScaledBlock", layer=1),
        "model.block.layer cannot be set: gptlab passes this argument to ScaledBlock.",
    ),
    "missing argument of a norm": (
        node("model.norm", _target_="torch.nn.LayerNorm"),
        "model.norm.normalized_shape is missing",
    ),
    "function that is not annotated to return a module": (
        node("model.activation", _target_="mylab.tools.touch", path="a"),
        "model.activation._target_=mylab.tools.touch is neither a part of a model",
    ),
    "missing argument of a loss": (node("loss", _target_="mylab.losses.focal"), "loss.gamma is missing"),
    "targets of a loss": (
        node("loss", _target_="mylab.losses.of_states", targets=1),
        "loss.targets cannot be set: gptlab passes this argument to of_states.",
    ),
    "class as a loss": (
        node("loss", _target_="torch.nn.CrossEntropyLoss"),
        "loss._target_=torch.nn.CrossEntropyLoss is not a function f(logits, targets, ...)",
    ),
    "unknown Trainer flag": (
        {"trainer.flags.detect_anomly": True},
        "Unknown argument trainer.flags.detect_anomly: Trainer has no such argument. Did you mean detect_anomaly?",
    ),
    "Trainer flag of the wrong type": ({"trainer.flags.detect_anomaly": 3}, "trainer.flags.detect_anomaly=3"),
    "block and norm": (
        node("model.block", _target_="mylab.model.ScaledBlock") | node("model.norm", _target_="mylab.model.ScaleNorm"),
        "norm cannot be a component if block is one, which builds its own norm",
    ),
    "block and value_residual": (
        node("model.block", _target_="mylab.model.ScaledBlock") | {"model.value_residual": True},
        "value_residual=True is not supported if block is a component",
    ),
    "attention and skips": (
        node("model.attention", _target_="mylab.model.DecayAttention") | {"model.unet_skips": True},
        "unet_skips=True is not supported if attention is a component",
    ),
    "lora": (
        node("model", _target_="mylab.model.ScaledGPT") | {"lora": LORA, "init_from": "x"},
        "lora is not implemented for a model, block or attention that is a component",
    ),
    "tensor parallelism": (
        node("model.activation", _target_="mylab.model.Swish") | TENSOR_PARALLEL,
        "trainer=fsdp_tp is not implemented for models with components",
    ),
}


@pytest.mark.parametrize(("changes", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_an_invalid_component_is_reported_in_one_sentence(changes, message):
    assert message in error_of(changes)


@pytest.mark.parametrize("flag", OWNED_FLAGS)
def test_a_flag_that_gptlab_sets_is_refused_with_the_key_that_sets_it(flag):
    message = error_of({f"trainer.flags.{flag}": 1})
    assert message == f"trainer.flags: the Trainer's {flag} is set by {OWNED_FLAGS[flag]}."


def test_every_argument_of_the_trainer_is_either_owned_or_free():
    names = set(inspect.signature(Trainer).parameters)
    assert set(OWNED_FLAGS) | FREE_FLAGS == names
    assert not set(OWNED_FLAGS) & FREE_FLAGS


def test_keys_that_own_flags_exist():
    values = json.loads(base())
    for owner in OWNED_FLAGS.values():
        for key in re.findall(r"\b(?:train|trainer|callbacks|data)\.[a-z_]+", owner):
            group, _, name = key.partition(".")
            assert name in values[group], key


def test_a_run_with_all_components_is_valid_and_its_callbacks_keep_their_order(tmp_path):
    config = resolved(
        "data=text",
        "data.source=text.txt",
        *NODES,
        "+callbacks.a={_target_:lightning.pytorch.callbacks.LearningRateMonitor}",
    )
    check_components(config)
    assert [type(callback).__name__ for callback in build_callbacks(config)] == ["StepLog", "LearningRateMonitor"]
    (logger,) = build_component_loggers(config, tmp_path)
    assert (logger.path.parent, logger.run, logger.prefix) == (tmp_path, config.name, "own/")
    assert logger.path.read_text() == '{"run": "quickstart", "lr": 0.001}\n'  # the hyperparameters


def test_a_function_that_returns_no_module_is_reported_when_it_is_built():
    config = config_with(node("model.activation", _target_="mylab.model.no_module")).with_vocabulary(61).model
    with pytest.raises(UserError, match=r"model\.activation\._target_=mylab\.model\.no_module returns str"):
        build_gpt(config)


def test_a_function_that_builds_a_part_gets_the_number_of_the_block():
    config = config_with(node("model.activation", _target_="mylab.model.gated")).with_vocabulary(61)
    check_components(config)
    assert [block.mlp.act.beta for block in build_gpt(config.model).h] == [1.0, 2.0]


@pytest.mark.parametrize("key", ["callbacks.x", "logger.x", "model.activation"])
def test_partial_is_ignored_for_what_gptlab_calls(tmp_path, key):
    targets = {
        "callbacks.x": {"_target_": "mylab.callbacks.StepLog", "file": "a"},
        "logger.x": {"_target_": "mylab.loggers.LineLogger"},
        "model.activation": {"_target_": "mylab.model.Swish"},
    }
    config = config_with(node(key, **targets[key], _partial_=True)).with_vocabulary(61)
    check_components(config)
    built = [*build_callbacks(config), *build_component_loggers(config, tmp_path), build_gpt(config.model)]
    assert not any("partial" in type(part).__name__.lower() for part in built)


FAILING = {
    "parameter groups": (node("optimizer", _target_="torch.optim.LBFGS"), "optimizer._target_=torch.optim.LBFGS fails"),
    "width": (node("model.activation", _target_="torch.nn.GLU"), "model.activation._target_=torch.nn.GLU fails"),
    "untyped argument": (
        node("schedule", _target_="mylab.schedules.untyped", power="x"),
        "schedule._target_=mylab.schedules.untyped fails: TypeError",
    ),
    "not a scalar": (node("loss", _target_="mylab.losses.per_token"), "instead of a tensor without dimensions"),
}


@pytest.mark.parametrize("case", FAILING)
def test_a_component_that_cannot_work_is_reported_before_the_run(case):
    changes, message = FAILING[case]
    config = config_with(changes).with_vocabulary(61)
    check_components(config)
    with pytest.raises(UserError) as error:
        try_components(config)
    assert message in str(error.value)


def test_working_components_pass_the_trial():
    config = resolved("data=text", "data.source=text.txt", *NODES).with_vocabulary(61)
    check_components(config)
    try_components(config)


def test_a_whole_model_is_no_activation():
    assert "neither a part of a model" in error_of(node("model.activation", _target_="gptlab.model.gpt.GPT"))


def test_positional_arguments_of_a_component_are_refused():
    changes = node("callbacks.x", _target_="mylab.callbacks.StepLog", _args_=["a"])
    assert error_of(changes).startswith("callbacks.x._args_ is not supported")


def test_a_component_on_the_command_line_replaces_the_built_in_option():
    text = ("data=text", "data.source=text.txt")
    config = resolved(*text, "+optimizer._target_=torch.optim.RMSprop", "+optimizer.alpha=0.5")
    assert config.optimizer.model_dump(exclude_none=True) == {
        "_target_": "torch.optim.RMSprop",
        "alpha": 0.5,
        "lr": resolved(*text).optimizer.lr,
    }
    config = resolved(*text, "+schedule={_target_: mylab.schedules.untyped, power: 2}")
    assert config.schedule.model_dump(exclude_none=True) == {"_target_": "mylab.schedules.untyped", "power": 2}


MODELS = {
    "own parts": node("model.attention", _target_="mylab.model.DecayAttention")
    | node("model.norm", _target_="mylab.model.ScaleNorm"),
    "block": node("model.block", _target_="mylab.model.ScaledBlock"),
    "bigram": node("model", _target_="mylab.model.Bigram"),
}


@pytest.mark.parametrize("changes", MODELS.values(), ids=MODELS)
def test_parameters_of_an_own_model_are_counted_as_they_are(changes):
    config = count_components(config_with(changes).with_vocabulary(61))
    model = build_gpt(config.model)
    assert parameter_count(config.model) == sum(parameter.numel() for parameter in model.parameters())
    parts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    parts.pop("lm_head", None)  # tied
    assert {name: count for name, count in count_by_part(config.model).items() if count} == {
        name: count for name, count in parts.items() if count
    }
    assert count_shares(config.model).all == parameter_count(config.model)


OPTIMIZERS = {
    "SGD": (node("optimizer", _target_="torch.optim.SGD"), 0),
    "SGD with momentum": (node("optimizer", _target_="torch.optim.SGD", momentum=0.9), 1),
    "Lion": (node("optimizer", _target_="pytorch_optimizer.Lion", lr=1), 1),
    "AdamW": (node("optimizer", _target_="torch.optim.AdamW"), 2),
    "Adafactor": (node("optimizer", _target_="torch.optim.Adafactor"), None),
    "own": (node("optimizer", _target_="mylab.optimizers.SignSGD"), 1),
    "own groups": (
        node("optimizer", _target_="torch.optim.AdamW", param_groups={"_target_": "mylab.optimizers.one_group"}),
        2,
    ),
}


@pytest.mark.parametrize(("changes", "per_parameter"), OPTIMIZERS.values(), ids=OPTIMIZERS)
def test_the_state_of_an_optimizer_is_counted_as_it_is_after_a_step(changes, per_parameter):
    config = count_components(config_with(changes).with_vocabulary(61))
    model = build_gpt(config.model)
    optimizer = build_optimizer(model, config.optimizer, fused=False)
    model(torch.zeros(1, 4, dtype=torch.int64)).sum().backward()
    optimizer.step()
    state = [tensor for state in optimizer.state.values() for tensor in state.values()]
    real = sum(tensor.numel() for tensor in state if isinstance(tensor, torch.Tensor) and tensor.dim())
    assert optimizer_state_size(config, count_shares(config.model)) == real
    if per_parameter is None:
        assert real < 0.2 * parameter_count(config.model)  # a row and a column for every matrix
    else:
        assert real == per_parameter * parameter_count(config.model)


def test_an_optimizer_that_cannot_step_without_data_is_counted_like_adamw(monkeypatch):
    from mylab.optimizers import SignSGD

    def step(self, closure=None):
        self.param_groups[0]["params"][0].numpy()

    monkeypatch.setattr(SignSGD, "step", step)
    changes = node("optimizer", _target_="mylab.optimizers.SignSGD")
    config = count_components(config_with(changes).with_vocabulary(61))
    assert config.optimizer.state_size is None
    assert optimizer_state_size(config, count_shares(config.model)) == 2 * parameter_count(config.model)


def test_a_run_without_components_is_not_changed_by_counting():
    config = config_with({}).with_vocabulary(61)
    assert count_components(config) is config


def test_weight_decay_is_in_the_groups_and_an_argument_only_if_the_class_has_it():
    config = config_with(node("optimizer", _target_="torch.optim.SGD", weight_decay=0.5)).with_vocabulary(61)
    optimizer = build_optimizer(build_gpt(config.model), config.optimizer, fused=False)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.5, 0.0]
    config = config_with(node("optimizer", _target_="torch.optim.Rprop", weight_decay=0.5)).with_vocabulary(61)
    check_components(config)
    assert TARGET in config.optimizer.model_extra
    build_optimizer(build_gpt(config.model), config.optimizer, fused=False)
