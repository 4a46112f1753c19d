"""gptlab <command>: the list of commands, and the same results as python -m gptlab.<command>."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import gptlab
from commands import assert_config_error, assert_success
from conftest import SMALL
from gptlab.__main__ import COMMANDS
from gptlab.exit_codes import CONFIG_ERROR

PACKAGE = Path(gptlab.__file__).parent


def test_the_list_has_every_command_with_its_description(without_torch):
    done = without_torch.python("gptlab")
    assert_success(done)
    modules = {path.stem for path in PACKAGE.glob("*.py") if 'if __name__ == "__main__":' in path.read_text()}
    assert modules == {*COMMANDS, "worker", "__main__"}
    assert "  train      Trains a model\n" in done.stdout
    assert all(f"\n  {name} " in done.stdout for name in COMMANDS)
    assert max(map(len, done.stdout.splitlines())) <= 80
    assert without_torch.python("gptlab", "--help").stdout == done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["tran", "model=nano"], "Unknown command tran. Did you mean train?"),
        (["model=nano"], "as in gptlab train model=nano"),
        (["-m", "seed=1,2"], "as in gptlab train -m"),
        (["train", "model=nono"], "Unknown option model=nono"),
        (["train", "seed=x"], "seed"),
    ],
)
def test_an_unknown_command_or_option_is_a_config_error(without_torch, arguments, message):
    assert_config_error(without_torch.python("gptlab", *arguments), message)


@pytest.mark.parametrize("arguments", [["train", "--help"], ["train", "--cfg", "job", "model=tiny"], ["new", "--help"]])
def test_a_command_prints_what_its_module_prints(without_torch, arguments):
    done = without_torch.python("gptlab", *arguments)
    module = without_torch.python(f"gptlab.{arguments[0]}", *arguments[1:])
    assert (done.stdout, done.stderr, done.returncode) == (module.stdout, module.stderr, 0)


def test_the_version_is_printed(without_torch):
    assert without_torch.python("gptlab", "--version").stdout.startswith("gptlab 0.")


@pytest.mark.slow
def test_the_installed_script_trains_with_workers_and_records_its_command(user, wheel):
    user.environment["PYTHONPATH"] = str(wheel)
    arguments = (*SMALL, "trainer=ddp", "trainer.devices=2", "trainer.accelerator=cpu", "train.max_steps=2")
    script = wheel / "bin" / "gptlab"
    done = user.run(sys.executable, str(script), "train", *arguments)
    assert_success(done)
    command = json.loads((user.only_run() / "environment.json").read_text())["command"].split()
    assert command[1:] == [str(script), "train", *arguments]
    assert_config_error(user.run(sys.executable, str(script), "trian"), "Did you mean train?")


@pytest.mark.parametrize("arguments", [["gptlab"], ["gptlab.new", "--help"], ["gptlab.plan", "--help"]], ids=" ".join)
def test_a_command_whose_reader_is_gone_ends_quietly(tmp_path, arguments):
    read, write = os.pipe()
    os.close(read)  # as after `| head`
    done = subprocess.run(
        [sys.executable, "-m", *arguments], stdout=write, stderr=subprocess.PIPE, text=True, check=False, cwd=tmp_path
    )
    os.close(write)
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize("module", ["gptlab.train", "gptlab.prepare", "gptlab"])
def test_commands_say_that_windows_is_not_supported(module):
    code = f"import sys; sys.platform = 'win32'; import runpy; runpy.run_module({module!r}, run_name='__main__')"
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, check=False)
    assert done.returncode == CONFIG_ERROR
    assert done.stderr == "gptlab: Windows is not supported. Use the Windows Subsystem for Linux (WSL 2).\n"
