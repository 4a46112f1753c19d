"""Configurations of earlier versions get the defaults in conf/ for the keys that they lack."""

import contextlib
from copy import deepcopy
from typing import Any

import pytest
import yaml
from pydantic import ValidationError

from configs import resolved
from gptlab.config.base import get_value
from gptlab.config.schema import RunConfig
from gptlab.config.stored import _default, complete
from gptlab.errors import UserError
from gptlab.tracking.run_directory import load_config

# without a default: they are missing only in damaged files
MANDATORY = {
    *("model.block_size", "model.n_layer", "model.n_head", "model.n_embd", "data.source", "optimizer.lr"),
    *("optimizer.name", "schedule.name", "tokenizer.name"),
}


@pytest.fixture(scope="module")
def values() -> dict[str, Any]:
    overrides = ("model=tiny", "data=text", "data.source=a.txt", "callbacks=[default,early_stopping]", "lora=all")
    return resolved(*overrides, "logger=wandb", "tokenizer=bpe", "init_from=gpt2").model_dump(mode="json")


def leaves(values: dict[str, Any], prefix: str = "") -> list[str]:
    groups = {key: value for key, value in values.items() if isinstance(value, dict) and value}
    nested = [key for name, group in groups.items() for key in leaves(group, f"{prefix}{name}.")]
    return nested + [prefix + key for key in values.keys() - groups.keys()]


def without(values: dict[str, Any], key: str) -> dict[str, Any]:
    rest, (*parents, name) = deepcopy(values), key.split(".")
    del (get_value(rest, ".".join(parents)) if parents else rest)[name]
    return rest


def is_valid(values: dict[str, Any]) -> bool:
    with contextlib.suppress(ValidationError):
        RunConfig.model_validate(values)
        return True
    return False


def test_every_key_that_is_missing_gets_its_default(values):
    keys = [key for key in leaves(values) if key not in MANDATORY and not is_valid(without(values, key))]
    assert len(keys) > 100
    for key in keys:
        completed, added = complete(without(values, key))
        assert added.keys() == {key}
        assert RunConfig.model_validate(completed | {"init_from": "gpt2"}) == RunConfig.model_validate(values), key


def test_a_mandatory_key_is_not_added(values):
    assert all(complete(without(values, key))[1] == {} for key in MANDATORY)


@pytest.mark.parametrize("group", ["logger", "trainer", "callbacks"])
def test_a_truncated_configuration_is_an_error(values, tmp_path, group):
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(without(values, group)))
    with pytest.raises(UserError, match=rf"config\.yaml is not valid: {group} is missing"):
        load_config(tmp_path)


def test_a_complete_configuration_is_unchanged(values):
    assert complete(values) == (values, {})


def test_defaults_are_read_only_from_the_configuration_folder(tmp_path):
    (tmp_path / "secret.yaml").write_text("eps: 5\n")
    assert _default("optimizer.eps", {"optimizer": {"name": "adamw"}}) == (1e-8,)
    assert _default("optimizer.eps", {"optimizer": {"name": f"{'../' * 20}{tmp_path}/secret"}}) is None


def test_flags_that_have_become_keys_are_moved(values):
    earlier = deepcopy(values)
    del earlier["trainer"]["deterministic"]
    assert RunConfig.model_validate(complete(earlier)[0]).trainer.deterministic is False
    earlier["trainer"]["flags"] = {"deterministic": "warn", "benchmark": True, "detect_anomaly": True}
    trainer = RunConfig.model_validate(complete(earlier)[0]).trainer
    assert (trainer.deterministic, trainer.flags) == (True, {"detect_anomaly": True})
