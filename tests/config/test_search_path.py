"""Configuration directories of the user: search order, help, errors, and a run with options from ./conf."""

import os
from pathlib import Path

import pytest
import yaml
from hydra._internal.core_plugins.file_config_source import FileConfigSource

from commands import assert_config_error, assert_success
from gptlab.config.search_path import UserDirectory, configuration_folder, user_directories

TRAIN = "gptlab.train"


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def shown(user, package: str, *arguments: str) -> object:
    """Returns a value of the composed configuration."""
    done = user.python(TRAIN, "--cfg", "job", "-p", package, *arguments)
    assert_success(done)
    return yaml.safe_load(done.stdout)


def unwrapped(text: str) -> str:
    """Joins the lines of each paragraph of the table of groups."""
    return text.replace("\n  ", " ")


def test_directories_are_searched_in_the_documented_order(user):
    folders = ("flag", "first", "second", "conf")
    for number, folder in enumerate(folders, 1):
        write(user.folder / folder / "optimizer" / "adamw_char.yaml", f"defaults: [adamw]\nbetas: [0, 0.{number}]\n")
    user.environment["GPTLAB_CONF"] = os.pathsep.join(("first", str(user.folder / "second")))
    flag, found = ["--config-dir=flag"], []
    for folder in folders:
        found.append(shown(user, "optimizer.betas", "optimizer=adamw_char", *flag)[1])
        (user.folder / folder / "optimizer" / "adamw_char.yaml").unlink()
    assert found == [0.1, 0.2, 0.3, 0.4]
    assert shown(user, "optimizer.betas", "optimizer=adamw_char", *flag) == [0.9, 0.99]  # gptlab's own


def test_directories_of_hydras_search_path_follow_gptlabs_own(user):
    for name in ("adamw_char", "mine"):
        write(user.folder / "more" / "optimizer" / f"{name}.yaml", "defaults: [adamw]\nbetas: [0, 0.5]\n")
    more = f"hydra.searchpath=[file://{user.folder}/more]"
    assert shown(user, "optimizer.betas", "optimizer=mine", more) == [0, 0.5]
    assert shown(user, "optimizer.betas", "optimizer=adamw_char", more) == [0.9, 0.99]
    assert "sgd; from more/: mine\n" in unwrapped(user.python(TRAIN, "--help", more).stdout)


def test_gptlabs_own_directory_and_repeated_directories_are_listed_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "conf").mkdir()
    monkeypatch.setenv("GPTLAB_CONF", os.pathsep.join(("conf", "", str(tmp_path / "conf"))))
    assert user_directories(None) == {tmp_path / "conf": "GPTLAB_CONF"}
    monkeypatch.chdir(configuration_folder().parent)
    monkeypatch.delenv("GPTLAB_CONF")
    assert user_directories(None) == {}
    assert user_directories("conf") == {}


@pytest.mark.parametrize("variable", [True, False])
def test_a_directory_that_does_not_exist_is_a_config_error(without_torch, variable):
    if variable:
        without_torch.environment["GPTLAB_CONF"] = f"{without_torch.folder}{os.pathsep}nowhere"
    flags = [] if variable else ["--config-dir", "nowhere"]
    source = "GPTLAB_CONF" if variable else "--config-dir"
    assert_config_error(without_torch.python(TRAIN, *flags), f"{source}=nowhere is not a directory")


def test_the_primary_configuration_of_another_program_is_not_used(user):
    write(user.folder / "conf" / "train.yaml", "lr: 1\n")
    write(user.folder / "conf" / "config.yaml", "lr: 1\n")
    assert shown(user, "train.max_steps") == 1200


def test_config_name_selects_a_primary_configuration_of_the_user(user):
    write(user.folder / "conf" / "mine.yaml", "defaults: [train, _self_]\nseed: 7\n")
    assert shown(user, "seed", "--config-name=mine") == 7


def test_an_option_that_replaces_gptlabs_is_reported(user):
    path = user.folder / "conf" / "model" / "gpt2.yaml"
    write(path, "defaults: [gpt]\nn_layer: 3\n")
    done = user.python(TRAIN, "--cfg", "job", "-p", "model.n_layer", "model=gpt2")
    assert done.stdout == "3\n"
    assert done.stderr == f"gptlab: {path} replaces gptlab's own model/gpt2.yaml.\n"


def test_help_lists_the_users_options_with_their_directory(without_torch):
    write(without_torch.folder / "conf" / "optimizer" / "mine.yaml", "defaults: [adamw]\n")
    write(without_torch.folder / "conf" / "model" / "gpt2.yaml", "defaults: [gpt]\n")
    write(without_torch.folder / "conf" / "experiment" / "score.yaml", "# @package _global_\nrun: gpt2\n")
    write(without_torch.folder / "conf" / "machine" / "big.yaml", "# @package _global_\nseed: 1\n")
    write(without_torch.folder / "mine" / "hydra" / "job_logging" / "json.yaml", "version: 1\n")
    done = without_torch.python(TRAIN, "--help", "--config-dir=mine")
    table = done.stdout.partition("Config groups")[2].partition("Configuration directories")[0]
    assert max(map(len, table.splitlines())) <= 80
    paragraphs = {line.partition(": ")[0]: line for line in unwrapped(table).splitlines()}
    assert paragraphs["optimizer"].endswith("muon_char, sgd; from conf/: mine")
    assert paragraphs["model"].endswith("nano, tiny; from conf/: gpt2 (replaces gptlab's)")
    assert "score" not in paragraphs["experiment"]  # for gptlab.evaluate
    assert paragraphs["machine"] == "machine: from conf/: big"
    assert paragraphs["hydra/job_logging"] == "hydra/job_logging: from mine/: json"
    other = without_torch.python("gptlab.evaluate", "--help").stdout
    assert "eval_gpt2_xl; from conf/: score\n" in unwrapped(other)
    assert "mine" not in other


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"n_layer: [1\nn_head: 2\n", "{file}, line 2: expected ',' or ']'"),
        (b"n_layer: 1\nn_layer: 2\n", "{file}, line 2: found duplicate key n_layer."),
        (b"- 1\n", "{file} cannot be read: it has no keys at its top level."),
        (b"n_layer: \xff\n", "{file} cannot be read: it is not UTF-8 text."),
        (b"n_layer: ${oops\n", "{file} cannot be read: "),
        (b"defaults: {gpt: 1}\n", "Invalid defaults list in 'model/mine'"),
        (b"defaults: [gpt: 1]\n", "Unsupported item value in defaults : int"),
        (b"# @package _global_\ndefaults:\n- /model: gpt\n", "A file includes itself in its defaults list."),
    ],
)
def test_an_invalid_file_is_a_config_error(without_torch, text, message):
    file = without_torch.folder / "conf" / "model" / "mine.yaml"
    write(file, "")
    file.write_bytes(text)
    assert_config_error(without_torch.python(TRAIN, "model=mine"), message.format(file=file))


def test_an_experiment_that_selects_an_option_without_override_is_a_config_error(without_torch):
    write(
        without_torch.folder / "conf" / "experiment" / "mine.yaml", "# @package _global_\ndefaults:\n- /model: tiny\n"
    )
    assert_config_error(without_torch.python(TRAIN, "experiment=mine"), "`- override /model: tiny`")


def test_a_sweep_of_the_user_is_found(user):
    text = "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params: {seed: '1,2'}\n"
    write(user.folder / "conf" / "sweeps" / "mine.yaml", text)
    done = user.python(TRAIN, "sweeps=mine", "--cfg", "hydra", "-p", "hydra.sweeper.params")
    assert yaml.safe_load(done.stdout) == {"seed": "1,2"}


def test_info_shows_the_directories(user):
    (user.folder / "conf").mkdir()
    done = user.python(TRAIN, "--info", "searchpath", "--config-dir=.")
    places = [line.split(" | ")[0].strip("| ") for line in done.stdout.splitlines() if "://" in line]
    # Hydra appends --config-dir once more
    assert places == ["hydra", "--config-dir", "working directory", "main", "command-line", "schema"]


def test_a_run_uses_options_and_a_hydra_callback_of_the_working_directory(user):
    files = {
        "conf/model/mine.yaml": "defaults: [gpt]\nn_layer: 1\nn_head: 2\nn_embd: 32\nblock_size: 32\n",
        "conf/optimizer/mine.yaml": "defaults: [adamw]\nlr: 0.01\nbetas: [0.5, 0.6]\n",
        "conf/experiment/mine.yaml": """# @package _global_
defaults:
- override /model: mine
- override /optimizer: mine
- override /data: text
name: mine
train: {max_steps: 2, eval_windows: 4}
""",
        "own.py": """from hydra.experimental.callback import Callback
class Greeting(Callback):
    def on_run_start(self, config, **kwargs):
        print("name is", config.name)
""",
    }
    for name, text in files.items():
        write(user.folder / name, text)
    greeting = "+hydra.callbacks.greeting._target_=own.Greeting"
    done = user.python(TRAIN, "+experiment=mine", "data.source=text.txt", "trainer=cpu", greeting)
    assert_success(done)
    assert "name is mine" in done.stdout
    config = yaml.safe_load((user.only_run("mine") / "config.yaml").read_text())
    assert (config["model"]["n_embd"], config["optimizer"]["betas"]) == (32, [0.5, 0.6])


def test_hydras_private_source_of_files_has_the_replaced_methods(tmp_path):
    assert FileConfigSource.load_config is not UserDirectory.load_config
    write(tmp_path / "model" / "mine.yaml", "n_layer: 1\n")
    source = FileConfigSource("test", f"file://{tmp_path}")
    assert (source.path, source.is_config("model/mine"), source.is_group("model")) == (str(tmp_path), True, True)
    assert source.load_config("model/mine").config == {"n_layer": 1}
