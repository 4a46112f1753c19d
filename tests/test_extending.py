"""docs/extending.md: its examples are the files of the project template, and its commands and messages are true."""

import re
import shlex
import sys
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from commands import assert_success, metrics
from gptlab.config.command import configuration_folder
from gptlab.config.resolve import resolve
from gptlab.errors import UserError
from gptlab.launch.components import check_components
from gptlab.projects.project import PACKAGE, TEMPLATE
from processes import TWO

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text(encoding="utf-8")
EXAMPLES = PAGE.partition("## Examples\n")[2].partition("## Checks\n")[0]
FILES = dict(re.findall(r"```(?:python|yaml)\n# (\S+)\n(.*?)```", PAGE, re.DOTALL))
COMMANDS = [
    line.partition("   #")[0]
    for block in re.findall(r"```sh\n(.*?)```", EXAMPLES, re.DOTALL)
    for line in block.splitlines()
]
MESSAGES = re.findall(r"^\| `(.*?)` \| (.*) \|$", PAGE.partition("## Checks\n")[2].partition("## Trust\n")[0], re.M)
SHORT = ("trainer=cpu", "train.max_steps=2", "train.eval_every=2", "train.eval_windows=4")


def test_the_examples_are_the_files_of_the_template():
    assert {name: (TEMPLATE / name).read_text(encoding="utf-8") for name in FILES} == FILES


def test_every_part_of_the_template_is_on_the_page():
    parts = {f"{PACKAGE}/{path.name}" for path in (TEMPLATE / PACKAGE).glob("*.py") if path.stem != "__init__"}
    groups = ("callbacks", "logger", "optimizer", "schedule", "model", "loss", "data", "tokenizer")
    options = {f"conf/{group}/{path.name}" for group in groups for path in (TEMPLATE / "conf" / group).iterdir()}
    assert len(parts) == 13
    assert FILES.keys() - {"conf/experiment/combined.yaml"} == parts | options


@pytest.fixture
def template_package(monkeypatch):
    """Makes the package of the template importable; a package of the same name of other tests is not used."""

    def forget():
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.partition(".")[0] == PACKAGE}

    others = forget()
    monkeypatch.syspath_prepend(TEMPLATE)
    yield
    forget()
    sys.modules.update(others)


@pytest.mark.usefixtures("template_package")
@pytest.mark.parametrize(("command_line", "message"), MESSAGES)
def test_an_invalid_component_has_the_message_of_the_page(command_line, message):
    words = command_line.split()
    search_path = f"hydra.searchpath=[file://{TEMPLATE / 'conf'}]"
    with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
        values = compose("train", overrides=[*words, search_path])
    with pytest.raises(UserError) as raised:
        check_components(resolve(values, words))
    assert str(raised.value) == message


def test_the_page_has_messages_and_commands():
    assert len(MESSAGES) == 10
    assert len(COMMANDS) == 23


@pytest.mark.slow
@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_work(user, command):
    assert_success(user.python("gptlab.new", PACKAGE))
    user.folder /= PACKAGE
    python, flag, module, *arguments = shlex.split(command)
    assert (python, flag) == ("python", "-m")
    options = () if module == "gptlab.prepare" else SHORT
    assert_success(user.python(module, *arguments, *options))


@pytest.mark.slow
def test_the_histogram_of_a_sharded_gradient_is_that_of_the_whole_gradient(user):
    assert_success(user.python("gptlab.new", PACKAGE))
    user.folder /= PACKAGE
    shares = []
    for name, arguments in {"one": ("trainer=cpu",), "two": ("trainer=fsdp", *TWO[1:])}.items():
        options = ("model=tiny", "callbacks=gradient_histogram", *SHORT[1:], f"name={name}", *arguments)
        assert_success(user.python("gptlab.train", *options))
        directory = user.only_run(name)
        shares.append([metrics(directory, f"gradient_decade/{decade}")[1] for decade in range(-8, 0)])
    assert sum(shares[0]) == pytest.approx(1)
    assert shares[1] == pytest.approx(shares[0], abs=1e-3)  # shards differ slightly in size
