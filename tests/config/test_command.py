"""Checks of the command line before Hydra parses it."""

import pytest
from hydra._internal.utils import get_args_parser

from canary import Canary
from gptlab.exit_codes import CONFIG_ERROR


@pytest.mark.parametrize("flag", ["--experimental-rerun", "--exp"])
def test_hydras_flag_that_unpickles_a_file_is_refused(user, flag):
    canary = Canary(user.folder / "canary")
    canary.write(user.folder / "config.pickle", "bare")
    done = user.python("gptlab.train", flag, "config.pickle")
    assert "--experimental-rerun=config.pickle is refused" in done.stderr
    assert done.returncode == CONFIG_ERROR
    assert not canary.was_run()
    assert not (user.folder / "outputs").exists()


def test_hydras_private_parser_returns_the_checked_flags_and_overrides():
    arguments = ["-m", "--config-dir", "more", "--experimental-rerun=x.pickle", "seed=1,2", "name=a"]
    flags = get_args_parser().parse_args(arguments)
    assert flags.overrides == ["seed=1,2", "name=a"]
    assert (flags.config_dir, flags.experimental_rerun) == ("more", "x.pickle")
    none = get_args_parser().parse_args([])
    assert (none.config_dir, none.experimental_rerun, none.overrides) == (None, None, [])
