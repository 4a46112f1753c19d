"""Components: which are trusted, how they are checked and built."""

import os
import pickle
import re
import sys
from functools import partial
from importlib import metadata
from pathlib import Path
from types import SimpleNamespace

import pytest

from gptlab.config.components import (
    bind_component,
    build_component,
    check_component,
    component_record,
    import_target,
    iter_targets,
)
from gptlab.config.trust import TRUST, check_trusted, trust_components, trust_override, trust_packages
from gptlab.errors import UserError
from own_package import make_importable


@pytest.fixture(autouse=True)
def untrusted(monkeypatch):
    """Makes ``mylab`` importable, and no package trusted."""
    make_importable()
    monkeypatch.setenv(TRUST, "")


def nested(key: str, node: object) -> dict:
    """Returns a configuration with a node at a dotted key."""
    first, _, rest = key.partition(".")
    return {first: nested(rest, node) if rest else node}


TOUCH = {"_target_": "mylab.tools.Touch", "path": "canary"}
MAKE = {"_target_": "os.mkdir", "path": "canary"}
TYPED = {"_target_": "mylab.typed.Typed", "count": 1}
LAMBDA = {"_target_": "lightning.pytorch.callbacks.LambdaCallback"}
SGD = {"_target_": "torch.optim.SGD", "lr": 1}
PICKLE = {"path_or_url": "payload", "map_location": "cpu", "weights_only": False}
PAYLOADS = {  # what a stranger's configuration might have, and the name that would have to be trusted
    "own class": ("callbacks.x", TOUCH, "mylab"),
    "own class as optimizer": ("optimizer", TOUCH, "mylab"),
    "argument": ("callbacks.x", LAMBDA | {"on_fit_end": {"_target_": "mylab.tools.touch", "path": "canary"}}, "mylab"),
    "argument of a trusted class": ("optimizer", SGD | {"momentum": MAKE}, "os.mkdir"),
    "in a list": ("optimizer", SGD | {"betas": [0, MAKE]}, "os.mkdir"),
    "in a dict": ("model.block", {"_target_": "gptlab.model.gpt.Block", "options": {"a": {"b": MAKE}}}, "os.mkdir"),
    "positional": ("optimizer", SGD | {"_args_": [MAKE]}, "os.mkdir"),
    "partial": ("optimizer", SGD | {"a": {"_target_": "mylab.tools.Touch", **TOUCH, "_partial_": False}}, "mylab"),
    "trainer flag": ("trainer.flags.x", TOUCH, "mylab"),
    "function of the standard library": ("loss", MAKE, "os.mkdir"),
    "function of Lightning": (
        "callbacks.x",
        {"_target_": "lightning.fabric.utilities.cloud_io._load", **PICKLE},
        "lightning.fabric.utilities.cloud_io._load",
    ),
    "function that Lightning imports": (
        "callbacks.x",
        {"_target_": "lightning.fabric.utilities.cloud_io.torch.load", "f": "payload", "weights_only": False},
        "lightning.fabric.utilities.cloud_io.torch.load",
    ),
    "function that torch.optim imports": (
        "optimizer",
        {"_target_": "torch.optim.optimizer.torch.load", "f": "payload", "weights_only": False},
        "torch.optim.optimizer.torch.load",
    ),
    "logger that writes to any directory": (
        "logger.x",
        {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "canary"},
        "lightning.pytorch.loggers.CSVLogger",
    ),
}


class Payload:
    """Creates the directory "canary" when it is unpickled."""

    def __reduce__(self):
        return os.mkdir, ("canary",)


def build(node: dict) -> object:
    """Builds a node; what it returns may have other types than its target expects."""
    if node["_target_"].endswith("CSVLogger"):
        return build_component(node).experiment
    try:
        return build_component(node)
    except Exception as error:  # after its arguments have been built
        return error


@pytest.mark.parametrize(("key", "node", "name"), PAYLOADS.values(), ids=PAYLOADS)
def test_a_payload_in_a_stored_configuration_is_refused_until_it_is_trusted(tmp_path, monkeypatch, key, node, name):
    monkeypatch.chdir(tmp_path)
    Path("payload").write_bytes(pickle.dumps(Payload()))
    canary, values = Path("canary"), nested(key, node)
    monkeypatch.setenv(TRUST, name)
    check_trusted(values, "run")
    build(node)
    assert canary.exists(), "the payload has no effect, so the test would prove nothing"
    canary.rename("was here")
    monkeypatch.setenv(TRUST, "")
    with pytest.raises(UserError) as error:
        check_trusted(values, "somebody/run")
    assert re.search(r"in somebody/run would run code of the package (mylab|os|lightning|torch), ", str(error.value))
    assert f"trust=[{name}] or GPTLAB_TRUST={name}" in str(error.value)
    assert not canary.exists()


@pytest.mark.parametrize("target", ["mylab.tools.os.mkdir", "mylab.tools.subprocess.Popen", "mylab.tools.Path"])
def test_a_trusted_package_does_not_lend_its_trust_to_what_it_imports(monkeypatch, target):
    monkeypatch.setenv(TRUST, "mylab")
    with pytest.raises(UserError, match=r"code of the package (posix|subprocess|pathlib), which is not trusted"):
        check_trusted({"callbacks": {"x": {"_target_": target}}}, "run")
    monkeypatch.setenv(TRUST, f"mylab,{target}")
    check_trusted({"callbacks": {"x": {"_target_": target}}}, "run")


@pytest.mark.parametrize(
    "target",
    [
        *("mylab_evil.X", "mylabevil.X", "MyLab.tools.Touch", "MYLAB.tools.Touch", "mylab:tools.Touch", "mylab", ""),
        *(
            "lightning_evil.X",
            "lightningx.X",
            "gptlab_evil.X",
            "torch.optimizers.X",
            "torch.nnx.X",
            "torch.load",
            "tor",
        ),
        *(".mylab.tools.Touch", "mylab/tools.Touch", " mylab.tools.Touch", "mylab ", "torch.optim:torch.load"),
        *("${oc.env:LAB}.tools.Touch", "builtins.eval", "eval", "__main__.X", "hydra.utils.get_object"),
    ],
)
def test_only_the_exact_name_of_a_package_is_trusted(monkeypatch, target):
    monkeypatch.setenv(TRUST, "mylab.tools")
    monkeypatch.setenv("LAB", "mylab")
    monkeypatch.setitem(sys.modules, "mylab_evil", SimpleNamespace(X=dict))
    with pytest.raises(UserError, match=r"which is not trusted|is not a dotted path"):
        check_trusted({"callbacks": {"x": {"_target_": target}}}, "run")


@pytest.mark.parametrize("target", ["torch.nn.Module.__class__", "gptlab.model.losses.z_loss.__class__"])
def test_the_type_of_a_trusted_object_is_not_trusted(target):
    with pytest.raises(UserError, match="code of the package builtins"):
        check_trusted({"callbacks": {"x": {"_target_": target}}}, "run")


@pytest.mark.parametrize("target", ["gptlab.model.losses.z_loss.__globals__.get", "torch.nn.Module.load_state_dict"])
def test_a_method_of_a_trusted_object_is_not_trusted(target):
    with pytest.raises(UserError, match="which is not trusted"):
        check_trusted({"loss": {"_target_": target}}, "run")


def test_classes_of_gptlab_and_its_libraries_are_trusted_where_their_interface_is_checked():
    node = {
        "model": {"activation": {"_target_": "torch.nn.SiLU"}, "block": {"_target_": "gptlab.model.gpt.Block"}},
        "callbacks": {"x": {"_target_": "lightning.pytorch.callbacks.LearningRateMonitor"}},
        "optimizer": SGD,
        "loss": {"_target_": "gptlab.model.losses.z_loss", "coefficient": 1},
    }
    check_trusted(node, "run")
    for key in ("callbacks.x.y", "seed", "data.source", "trainer.flags.x", "model.wte", "loss.x", "optimizer.0"):
        with pytest.raises(UserError, match="which is not trusted"):
            check_trusted(nested(key, {"_target_": "gptlab.model.gpt.Block"}), "run")


def test_a_module_of_an_untrusted_package_is_not_imported(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    Path("imported.py").write_text("import os\nos.mkdir('canary')\n")
    with pytest.raises(UserError, match="code of the package imported"):
        check_trusted({"callbacks": {"x": {"_target_": "imported.X"}}}, "run")
    assert not Path("canary").exists()
    with pytest.raises(UserError, match=r"callbacks\.x\._target_=imported\.X cannot be imported"):
        import_target("callbacks.x", "imported.X")
    assert Path("canary").exists(), "the payload has no effect, so the test would prove nothing"


def test_a_component_of_a_library_on_the_command_line_does_not_make_the_library_trusted():
    trust_components(
        {
            "optimizer": SGD,
            "loss": {"_target_": "gptlab.model.losses.z_loss"},
            "callbacks": {"x": {"_target_": "lightning.pytorch.callbacks.LambdaCallback", "on_fit_end": MAKE}},
        }
    )
    for target in ("torch.hub.load", "gptlab.verification.runs.RunProcess", "os.system", "lightning.pytorch.Trainer"):
        with pytest.raises(UserError, match=re.escape(f"trust=[{target}]")):
            check_trusted({"optimizer": SGD | {"x": {"_target_": target}}}, "run")
    check_trusted({"callbacks": {"x": LAMBDA | {"on_fit_end": MAKE}}}, "run")  # the same component
    trust_components({"optimizer": {"_target_": "mylab.optimizers.SignSGD"}})
    check_trusted({"callbacks": {"x": TOUCH}}, "run")  # any of the user's own package


def test_a_package_that_declares_its_components_is_trusted(monkeypatch):
    points = {"gptlab.components": [metadata.EntryPoint("mylab", "mylab.tools:Touch", "gptlab.components")]}
    monkeypatch.setattr(metadata, "entry_points", lambda group: points[group])
    check_trusted({"callbacks": {"x": TOUCH}}, "run")


@pytest.mark.parametrize(
    "text", ["${oc.env:HOME}", r"\${oc.env:HOME}", r"\\${oc.env:HOME}", r"a\\\${oc.env:HOME}\\", "$${a}", "${", "\\"]
)
def test_strings_are_passed_literally(text):
    values = TYPED | {"text": text, "other": {"a": [text], "b": {"_target_": "builtins.list", "_args_": [[text]]}}}
    built = build_component(values)
    assert (built.text, built.other) == (text, {"a": [text], "b": [text]})


def test_targets_are_found_at_any_depth():
    values = {"a": {"_target_": "x", "_args_": [{"_target_": "y"}], "b": [[{"c": {"_target_": "z"}}]]}}
    assert list(iter_targets(values)) == [("a", "x"), ("a._args_.0", "y"), ("a.b.0.0.c", "z")]


def test_an_attribute_of_a_package_takes_precedence_over_its_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "twofold").mkdir()
    (tmp_path / "twofold" / "__init__.py").write_text("from twofold.thing import thing\n")
    (tmp_path / "twofold" / "thing.py").write_text("def thing(a=1):\n    return a\n")
    assert import_target("x", "twofold.thing")() == 1
    assert build_component({"_target_": "twofold.thing", "a": 3}) == 3  # hydra.utils.instantiate finds the same


ARGUMENTS = {
    "unknown": ({"cuont": 2}, "Unknown argument callbacks.x.cuont: Typed has no such argument. Did you mean count?"),
    "integer": ({"count": "many"}, "callbacks.x.count='many' is not valid: it should be an integer."),
    "no integer": ({"count": 1.5}, "callbacks.x.count=1.5 is not valid: it should be an integer."),
    "choice": ({"mode": "mean"}, "callbacks.x.mode='mean' is not valid: it should be 'min' or 'max'."),
    "dataclass": ({"span": {"first": "a"}}, "callbacks.x.span.first is not valid: it should be a valid integer"),
    "missing in a dataclass": ({"span": {"last": 1}}, "callbacks.x.span.first is not valid: Field required"),
    "unknown in a dataclass": ({"span": {"frist": 1}}, "Unknown argument callbacks.x.span.frist. Did you mean first?"),
    "model": ({"bounds": {"low": 0, "high": "b"}}, "callbacks.x.bounds.high is not valid: it should be a valid number"),
    "nested": ({"other": {"_target_": "mylab.tools.touch"}}, "callbacks.x.other.path is missing"),
    "nested in a list": ({"other": [{"_target_": "mylab.nothing.X"}]}, "callbacks.x.other.0._target_=mylab.nothing.X"),
}


@pytest.mark.parametrize(("arguments", "message"), ARGUMENTS.values(), ids=ARGUMENTS)
def test_an_invalid_argument_is_reported_with_its_key(arguments, message):
    with pytest.raises(UserError) as error:
        check_component("callbacks.x", TYPED | arguments)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_argument_is_reported():
    with pytest.raises(UserError, match=r"callbacks\.x\.count is missing: it is a required argument of Typed\."):
        check_component("callbacks.x", {"_target_": "mylab.typed.Typed"})


@pytest.mark.parametrize("name", ["window", "span"])
def test_a_mapping_becomes_the_dataclass_of_the_annotation(name):
    from mylab.typed import Window

    values = TYPED | {name: {"first": 3}, "bounds": {"low": 0, "high": 2}}
    check_component("callbacks.x", values)
    built = build_component(values)
    assert getattr(built, name) == Window(3, 9)
    assert built.bounds.high == 2.0


def test_own_values_take_precedence_over_those_of_gptlab():
    line = {"_target_": "mylab.loggers.LineLogger"}
    assert build_component(line, save_dir="a", name="b", other=1).path == Path("a/lines.jsonl")
    assert build_component(line | {"save_dir": "c"}, save_dir="a", name="b").path == Path("c/lines.jsonl")


def test_a_bound_function_has_built_arguments_and_calls_the_target_directly():
    bound = bind_component({"_target_": "mylab.losses.focal", "gamma": {"_target_": "builtins.float", "_args_": ["2"]}})
    assert isinstance(bound, partial)
    assert bound.keywords == {"gamma": 2.0}


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("mylab.nothing.X", "module mylab has no attribute nothing."),
        ("mylab.tools.Tuch", "module mylab.tools has no attribute Tuch. Did you mean Touch?"),
        ("mylab.tools.Touch.x", "type object 'Touch' has no attribute 'x'"),
    ],
)
def test_a_target_that_cannot_be_imported_is_reported_with_the_reason(target, reason):
    with pytest.raises(UserError) as error:
        import_target("callbacks.x", target)
    assert f"callbacks.x._target_={target} cannot be imported: {reason}" in str(error.value)


@pytest.mark.parametrize("target", ["", "X", "mylab:X", "mylab.tools."])
def test_a_target_must_be_a_dotted_path(target):
    with pytest.raises(UserError, match="is not a dotted path, such as"):
        import_target("callbacks.x", target)


def test_a_module_that_is_not_found_is_reported_with_the_searched_directories():
    with pytest.raises(UserError, match="cannot be imported: ModuleNotFoundError: No module named 'nolab'") as error:
        import_target("callbacks.x", "nolab.X")
    assert f"working directory ({Path.cwd()}), PYTHONPATH" in str(error.value)


def test_the_printed_override_trusts_exactly_what_is_not_trusted_already():
    values = {
        "model": {"activation": {"_target_": "torch.nn.SiLU"}, "block": {"_target_": "mylab.model.ScaledBlock"}},
        "callbacks": {"x": LAMBDA | {"on_fit_end": MAKE}, "y": TOUCH},
        "logger": {"x": {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": "a"}},
    }
    override = trust_override(values)
    assert override == " trust=[lightning.pytorch.loggers.CSVLogger,mylab,os.mkdir]"
    trust_packages(override.removeprefix(" trust=[").removesuffix("]").split(","))
    check_trusted(values, "run")
    assert trust_override({"optimizer": SGD}) == ""


def test_the_record_of_a_component_has_the_version_of_its_package_and_the_hash_of_its_source():
    import hashlib

    import torch

    record = component_record("optimizer", "torch.optim.SGD")
    source = Path(sys.modules["torch.optim.sgd"].__file__).read_bytes()
    assert record == {
        "target": "torch.optim.SGD",
        "package": "torch",
        "version": torch.__version__,
        "sha256": hashlib.sha256(source).hexdigest(),
    }
    assert component_record("x", "builtins.dict")["sha256"] is None
