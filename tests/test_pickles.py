"""No pickle is executed: the source code has no unsafe calls, and no input file of a command triggers one."""

import ast
import hashlib
import json
from pathlib import Path

import pytest
import yaml

import gptlab
from canary import Canary
from gptlab.config.command import configuration_folder
from gptlab.config.components import iter_targets
from gptlab.data.shards.manifest import load_manifest
from gptlab.data.tokenizers.gpt2_vocabulary import SHA256, gpt2_merges
from gptlab.errors import UserError
from gptlab.exit_codes import CONFIG_ERROR
from gptlab.tracking.run_directory import load_config

SOURCES = sorted(Path(gptlab.__file__).parent.rglob("*.py"))
UNSAFE = {
    *("pickle.load", "pickle.loads", "pickle.Unpickler", "pickle._load", "pickle._loads", "pickle._Unpickler"),
    *("dill.load", "dill.loads", "cloudpickle.load", "cloudpickle.loads", "joblib.load", "shelve.open"),
    *("marshal.load", "marshal.loads", "pandas.read_pickle", "torch.jit.load", "numpy.lib.format.read_array"),
    *("yaml.unsafe_load", "yaml.unsafe_load_all", "yaml.full_load", "yaml.full_load_all"),
    *("yaml.Loader", "yaml.UnsafeLoader", "yaml.FullLoader", "eval", "exec", "__import__"),
    *("hydra.utils.instantiate", "hydra.utils.call", "hydra.utils.get_method", "hydra.utils.get_object"),
}
# keyword, the value that makes it safe, and whether that is the default
SAFE_BY = {
    "torch.load": ("weights_only", "True", False),
    "numpy.load": ("allow_pickle", "False", True),
    "datasets.load_dataset": ("trust_remote_code", "False", True),
    "yaml.load": ("Loader", "yaml.SafeLoader", False),
    "yaml.load_all": ("Loader", "yaml.SafeLoader", False),
}


def full_names(tree: ast.Module) -> dict[str, str]:
    """Returns the qualified name of each imported name."""
    names = {}
    for node in ast.walk(tree):
        for alias in node.names if isinstance(node, ast.Import | ast.ImportFrom) else ():
            if isinstance(node, ast.ImportFrom):
                names[alias.asname or alias.name] = f"{node.module}.{alias.name}"
            elif alias.asname:
                names[alias.asname] = alias.name
    return names


def unsafe(source: str) -> set[str]:
    """Returns names in a source that could execute what they read, except for restricted unpicklers."""
    tree, found, restricted = ast.parse(source), set(), set()
    names = full_names(tree)

    def full(node: ast.expr) -> str:
        first, dot, rest = ast.unparse(node).partition(".")
        return names.get(first, first) + dot + rest

    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and any(getattr(part, "name", None) == "find_class" for part in node.body):
            restricted |= {base for base in node.bases if full(base) == "pickle.Unpickler"}
        if isinstance(node, ast.Call) and full(node.func) in SAFE_BY:
            keyword, value, by_default = SAFE_BY[full(node.func)]
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if given.get(keyword, value if by_default else None) != value:
                found.add(full(node.func))
        if isinstance(node, ast.Call) and full(node.func).endswith((".fit", ".validate")):
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if "ckpt_path" in given and given.get("weights_only") != "True":
                found.add(full(node.func))
    mentioned = {node for node in ast.walk(tree) if isinstance(node, ast.Name | ast.Attribute)} - restricted
    return found | {full(node) for node in mentioned} & UNSAFE


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_no_source_file_can_execute_what_it_reads(path):
    # components are built only if they are of a trusted package
    allowed = {"hydra.utils.instantiate"} if path.match("config/components.py") else set()
    assert unsafe(path.read_text(encoding="utf-8")) == allowed


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import pickle\npickle.load(file)", "pickle.load"),
        ("import pickle as p\nread = p.loads", "pickle.loads"),
        ("from pickle import load as plain\nplain(file)", "pickle.load"),
        ("import pickle\npickle.Unpickler(file).load()", "pickle.Unpickler"),
        ("import pickle\nclass Reader(pickle.Unpickler):\n    x = 1", "pickle.Unpickler"),
        ("import torch\ntorch.load(path)", "torch.load"),
        ("import torch\ntorch.load(path, weights_only=False)", "torch.load"),
        ("from torch import load\nload(path, weights_only=flag)", "torch.load"),
        ("import numpy as np\nnp.load(path, allow_pickle=True)", "numpy.load"),
        ("import yaml\nyaml.load(text, Loader=yaml.FullLoader)", "yaml.FullLoader"),
        ("import yaml\nyaml.load(text)", "yaml.load"),
        ("import datasets\ndatasets.load_dataset(path, trust_remote_code=True)", "datasets.load_dataset"),
        ("trainer.fit(module, ckpt_path=path)", "trainer.fit"),
        ("eval(text)", "eval"),
        ("from hydra.utils import instantiate\ninstantiate(config)", "hydra.utils.instantiate"),
    ],
)
def test_the_search_finds_unsafe_names(source, name):
    assert name in unsafe(source)


def test_the_search_accepts_safe_calls():
    reader = (
        "import pickle\nclass Plain(pickle.Unpickler):\n    def find_class(self, module, name):\n        raise Error"
    )
    for source in (reader, "import torch\ntorch.load(path, weights_only=True)", "import numpy as np\nnp.load(path)"):
        assert unsafe(source) == set()


@pytest.mark.parametrize("name", SHA256)
def test_a_payload_in_a_vocabulary_file_is_not_executed(tmp_path, name):
    canary = Canary(tmp_path / "canary")
    for file in SHA256:
        (tmp_path / file).write_text("{}")
    canary.write(tmp_path / name, "bare")
    with pytest.raises(UserError, match=r"is not GPT-2's (vocab\.bpe|encoder\.json): its SHA-256 is"):
        gpt2_merges(str(tmp_path))
    assert not canary.was_run()


def test_a_payload_in_a_manifest_is_not_executed(tmp_path):
    canary = Canary(tmp_path / "canary")
    canary.write(tmp_path / "manifest.json", "bare")
    with pytest.raises(UserError, match=r"manifest\.json is not a manifest"):
        load_manifest(tmp_path)
    assert not canary.was_run()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("!!python/object/apply:os.mkdir [{path}]", "config.yaml cannot be read"),
        ("_target_: os.mkdir\npath: {path}", "Unknown config key `_target_`"),
        ("model:\n  _target_: os.mkdir\n  path: {path}", "model.block_size is missing"),
        ("data:\n  _target_: os.mkdir\n  path: {path}", "data._target_ is not supported"),
        ("callbacks:\n  samples:\n    _target_: os.mkdir", "callbacks.samples._target_ is not supported"),
    ],
)
def test_the_configuration_of_a_run_executes_nothing(tmp_path, content, message):
    (tmp_path / "config.yaml").write_text(content.format(path=tmp_path / "canary"))
    with pytest.raises(UserError) as error:
        load_config(tmp_path)
    assert message in str(error.value)
    assert not (tmp_path / "canary").exists()


def test_the_yaml_payload_works_with_an_unsafe_loader(tmp_path):
    yaml.unsafe_load(f"!!python/object/apply:os.mkdir [{tmp_path / 'canary'}]")
    assert (tmp_path / "canary").exists()


def test_conf_has_only_targets_of_gptlab_and_of_the_libraries_that_it_names():
    libraries = ("gptlab.", "torch.optim.", "pytorch_optimizer.", "lightning.pytorch.", "aim.")
    for path in configuration_folder().rglob("*.yaml"):
        allowed = "hydra_plugins.gptlab." if path.parent.name in ("sweeper", "launcher") else libraries
        targets = [target for _, target in iter_targets(yaml.safe_load(path.read_text(encoding="utf-8")))]
        assert all(target.startswith(allowed) or target == "???" for target in targets), path


@pytest.mark.slow
def test_no_command_executes_a_payload_in_a_checkpoint(user, runs):
    directory = runs.give(user, "halted", "train.max_steps=6", "schedule.decay_steps=9", "callbacks=checkpoint")
    canary = Canary(user.folder / "canary")
    kept = (directory / "metrics.csv").read_bytes()
    for kind in ("bare", "archive"):
        for checkpoint in (directory / "checkpoints").iterdir():
            content = canary.write(checkpoint / "state.pt", kind).read_bytes()
            (checkpoint / "padding").write_bytes(bytes(10**6))  # as large as the model
            record = json.loads((checkpoint / "record.json").read_text())  # an attacker could write this file, too
            record["files"] = {"state.pt": {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}}
            (checkpoint / "record.json").write_text(json.dumps(record))
        for done in (
            user.python("gptlab.train", f"resume={directory}", "train.max_steps=9"),
            user.train(f"init_from={directory}"),
            user.train(f"init_from={directory / 'checkpoints' / 'step_000006' / 'state.pt'}"),
            user.python("gptlab.sample", f"run={directory}"),
        ):
            assert "state.pt " in done.stderr
            assert "Traceback" not in done.stderr
            assert done.returncode == CONFIG_ERROR, done.stdout + done.stderr
            assert not canary.was_run()
    assert not (user.folder / "outputs" / "quickstart").exists()
    assert (directory / "metrics.csv").read_bytes() == kept
