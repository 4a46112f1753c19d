"""Projects written by gptlab.new: names, files, experiments of nanoGPT, and their own tests and commands."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml

import gptlab.projects.project as project
from commands import assert_config_error, assert_success
from gptlab.errors import UserError
from gptlab.new import HELP, parse_arguments
from gptlab.projects.project import PACKAGE, template_files, write_project

NEW = "gptlab.new"


@pytest.fixture
def lab(tmp_path, monkeypatch):
    """Directory of a project named lab, with an environment in which its commands run."""
    monkeypatch.chdir(tmp_path)
    write_project(Path("lab"), "lab", [])
    monkeypatch.setenv("GPTLAB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    return tmp_path / "lab"


def run(lab: Path, *command: str, timeout: float = 600) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=lab, capture_output=True, text=True, timeout=timeout, check=False)


def test_a_project_has_the_files_of_the_template_with_its_own_name(without_torch):
    assert_success(without_torch.python(NEW, "lab"))
    root = without_torch.folder / "lab"
    written = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    assert written == {
        str(path).replace(PACKAGE, "lab").replace("gitignore", ".gitignore") for path in template_files()
    }
    assert {"Makefile", "README.md", ".gitignore", "lab/callbacks.py", "conf/optimizer/lion_lab.yaml"} <= written
    assert not [name for name in written if PACKAGE in (root / name).read_text()]
    assert "_target_: lab.optimizers.Lion" in (root / "conf/optimizer/lion_lab.yaml").read_text()


def test_the_project_declares_its_components(lab):
    values = tomllib.loads((lab / "pyproject.toml").read_text())
    assert values["project"]["name"] == "lab"
    assert values["project"]["entry-points"] == {"gptlab.components": {"lab": "lab"}}


def test_nothing_else_is_written(lab):
    assert [path.name for path in lab.parent.iterdir()] == ["lab"]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("class", "class is not a valid name"),
        ("2nd", "2nd is not a valid name"),
        ("my-lab", "my-lab is not a valid name"),
        ("lab_", "lab_ is not a valid name"),
        ("../lab", "../lab is not a valid name"),
        ("", " is not a valid name"),
        ("json", "json is an existing Python module"),
        ("torch", "torch is an existing Python module"),
        ("tests", "tests is a directory of every project"),
    ],
)
def test_an_invalid_name_is_a_config_error(without_torch, name, message):
    before = sorted(without_torch.folder.rglob("*"))
    assert_config_error(without_torch.python(NEW, name), message)
    assert sorted(without_torch.folder.rglob("*")) == before


def test_a_module_of_the_working_directory_is_not_hidden(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "mine.py").touch()
    with pytest.raises(UserError, match="mine is an existing Python module"):
        project.check_package_name("mine")
    (tmp_path / "empty").mkdir()
    project.check_package_name("empty")


def test_a_directory_with_files_is_left_unchanged(user):
    (user.folder / "lab").mkdir()
    (user.folder / "lab" / "notes.txt").write_text("mine")
    assert_config_error(user.python(NEW, "lab"), "lab exists and is not an empty directory")
    assert [path.name for path in (user.folder / "lab").iterdir()] == ["notes.txt"]
    (user.folder / "file").touch()
    assert_config_error(user.python(NEW, "file"), "file exists and is not an empty directory")


def test_an_empty_directory_is_used(user):
    (user.folder / "lab").mkdir()
    assert_success(user.python(NEW, "lab"))
    assert (user.folder / "lab" / "README.md").exists()


def test_an_interruption_leaves_nothing(tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(project, "_write_experiments", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_project(tmp_path / "lab", "lab", [])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "needs one name, not 0"),
        (["a", "b"], "needs one name, not 2"),
        (["a", "from_nanogtp=x.py"], "Did you mean from_nanogpt?"),
        (["a", "--force"], "Unknown argument --force"),
    ],
)
def test_invalid_arguments_are_config_errors(arguments, message):
    with pytest.raises(UserError, match=re.escape(message)):
        parse_arguments(arguments)


def test_the_help_text_fits_a_terminal(user):
    done = user.python(NEW, "--help")
    assert (done.returncode, done.stdout) == (0, HELP)
    assert max(map(len, HELP.splitlines())) <= 80


NANOGPT = """\
import os
open("attacked", "w").close()
out_dir = "out-tiny"
dataset = "shakespeare_char"
n_layer, n_head, n_embd, block_size = 2, 2, 32, 16
learning_rate = 1e-3
min_lr = 1e-4
max_iters = lr_decay_iters = 300
device = "cpu"
"""


def test_a_configuration_of_nanogpt_becomes_an_experiment(user):
    (user.folder / "train_tiny.py").write_text(NANOGPT)
    done = user.python(NEW, "lab", "from_nanogpt=train_tiny.py")
    assert_success(done)
    assert "train_tiny.py:2: open(" in done.stdout
    assert "note: out_dir='out-tiny' has no counterpart" in done.stdout
    assert done.stdout.endswith("From nanoGPT: cd lab && python -m gptlab.train experiment=train_tiny\n")
    assert not (user.folder / "attacked").exists()
    user.folder /= "lab"
    shown = user.python("gptlab.train", "experiment=train_tiny", "--cfg", "job")
    assert_success(shown)
    values = yaml.safe_load(shown.stdout)
    assert (values["model"]["n_embd"], values["optimizer"]["lr"], values["train"]["max_steps"]) == (32, 1e-3, 300)


@pytest.mark.parametrize(
    ("file", "text", "message"),
    [
        ("missing.py", None, "missing.py is not a file"),
        ("lion.py", "max_iters = 3\n", "The project already has an experiment named lion"),
        ("train.py", "max_iters = 'x'\n", "max_iters='x' is not valid"),
    ],
)
def test_an_invalid_configuration_of_nanogpt_writes_nothing(user, file, text, message):
    if text is not None:
        (user.folder / file).write_text(text)
    before = sorted(user.folder.rglob("*"))
    assert_config_error(user.python(NEW, "lab", f"from_nanogpt={file}"), message)
    assert sorted(user.folder.rglob("*")) == before


@pytest.mark.slow
def test_the_parts_of_a_project_pass_its_tests(lab):
    assert_success(run(lab, "python", "-m", "pytest", "-q", "tests/test_parts.py"))


@pytest.mark.skipif(shutil.which("ruff", path=str(Path(sys.executable).parent)) is None, reason="needs ruff")
def test_a_project_is_formatted_and_has_no_lint_errors(lab):
    assert_success(run(lab, "ruff", "check", "."))
    assert_success(run(lab, "ruff", "format", "--check", "."))


@pytest.mark.slow
def test_an_installed_project_is_trusted_everywhere(lab):
    site = lab.parent / "site"
    options = ("--no-deps", "--no-build-isolation", "--no-index", "--target", str(site))
    assert_success(run(lab, "python", "-m", "pip", "install", "-q", *options, "."))
    script = f"import sys; sys.path.append({str(site)!r}); from gptlab.config.trust import trusted_packages; "
    shown = run(lab.parent, "python", "-c", script + "print(trusted_packages())")
    assert shown.stdout == "{'lab'}\n"


def readme_commands(lab: Path) -> list[str]:
    (block,) = re.findall(r"```sh\n(.*?)```", (lab / "README.md").read_text(), re.DOTALL)
    return [line.partition("#")[0].strip() for line in block.splitlines()]


@pytest.mark.slow
def test_every_command_of_the_readme_works(lab):
    commands = readme_commands(lab)
    assert len(commands) == 9
    for command in commands:
        latest = sorted(lab.glob("outputs/combined/*"))[-1:]
        words = [word.replace("outputs/combined/<time>", str(*latest)) for word in shlex.split(command)]
        assert_success(run(lab, *words, timeout=900))
    done = run(lab, "python", "-m", "gptlab.train", "--help")
    assert "lion_lab" in done.stdout
