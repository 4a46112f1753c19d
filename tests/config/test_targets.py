"""What a configuration could have Hydra call, and what it cannot."""

import pytest
from hydra import compose, initialize_config_dir

from canary import Canary
from gptlab.config.command import configuration_folder
from gptlab.config.targets import checked_targets
from gptlab.errors import UserError
from gptlab.exit_codes import CONFIG_ERROR


def composed(*overrides: str):
    with initialize_config_dir(str(configuration_folder()), version_base="1.3"), checked_targets():
        return compose("train", overrides=list(overrides), return_hydra_config=True)


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["hydra/job_logging=default", "hydra/hydra_logging=default"],
        ["hydra/job_logging=stdout", "hydra/hydra_logging=hydra_debug"],
        ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled"],
        ["hydra.launcher._target_=hydra._internal.core_plugins.basic_launcher.BasicLauncher"],
        ["sweeps=lr"],
        ["data.cache_dir=${oc.env:HOME}/cache", "seed=${oc.decode:'7'}"],
    ],
)
def test_what_hydra_itself_brings_is_allowed(overrides):
    assert composed(*overrides).hydra.launcher


@pytest.mark.parametrize(
    ("overrides", "named"),
    [
        (["+hydra.callbacks.x._target_=os.mkdir"], "hydra.callbacks.x._target_=os.mkdir"),
        (["+hydra.callbacks.x={a:[{_target_:os.mkdir}]}"], "hydra.callbacks.x.a.0._target_=os.mkdir"),
        (["hydra.launcher._target_=os.mkdir"], "hydra.launcher._target_=os.mkdir"),
        (["+hydra.sweeper.x._target_=os.mkdir"], "hydra.sweeper.x._target_=os.mkdir"),
        (["+x={_target_:os.mkdir}", "+hydra.callbacks.x=${x}"], "hydra.callbacks.x._target_=os.mkdir"),
        (["+x={y:{_target_:os.mkdir}}", "hydra.callbacks=${x}"], "hydra.callbacks.y._target_=os.mkdir"),
        (["+hydra.callbacks.x._target_=${oc.env:CALLED}"], "hydra.callbacks.x._target_=os.mkdir"),
        (
            ["+hydra.callbacks.x=\"${oc.create:${oc.decode:'{_${y}_: os.mkdir}'}}\"", "+y=target"],
            "hydra.callbacks.x._target_",
        ),
        # by a name under which a module has imported it, and not one that it defines
        (["+hydra.callbacks.x._target_=gptlab.config.command.os.mkdir"], "gptlab.config.command.os.mkdir"),
        (["+hydra.callbacks.x._target_=gptlab.config.targets.Callback"], "gptlab.config.targets.Callback"),
        (["+hydra.callbacks.x._target_=gptlab.data.shards.manifest.sync"], "gptlab.data.shards.manifest.sync"),
        (["+hydra.callbacks.x._target_=gptlab.nothing.here"], "gptlab.nothing.here"),
        (["+hydra.callbacks.x._target_=hydra.utils.get_method"], "hydra.utils.get_method"),
        (["+hydra.callbacks.x._target_=null"], "hydra.callbacks.x._target_=None"),
        (["+hydra.job_logging.handlers.x.class=os.mkdir"], "hydra.job_logging.handlers.x.class=os.mkdir"),
        (["+hydra.job_logging.handlers.x=${x}", "+x.class=os.mkdir"], "hydra.job_logging.handlers.x=${x}"),
        (["hydra.job_logging=${x}", "+x.root.class=os.mkdir"], "hydra.job_logging=${x}"),
        (["+hydra.hydra_logging.handlers.x={stream:'ext://os.mkdir'}"], "stream=ext://os.mkdir"),
        (["+hydra.hydra_logging.handlers.x={stream:'cfg://x.y'}"], "stream=cfg://x.y"),
    ],
)
def test_what_would_call_anything_else_is_refused_by_its_key(monkeypatch, overrides, named):
    monkeypatch.setenv("CALLED", "os.mkdir")
    with pytest.raises(UserError) as error:
        composed(*overrides)
    assert named in str(error.value)
    assert "is refused: a configuration can" in str(error.value)


def test_the_check_ends_with_the_command():
    composed()
    with initialize_config_dir(str(configuration_folder()), version_base="1.3"):
        compose("train", overrides=["+hydra.callbacks.x._target_=os.mkdir"])


CALLING = "_target_: os.mkdir\npath: {path}\n"
FACTORY = "version: 1\nroot: {{handlers: [x]}}\nhandlers:\n  x: {{(): os.mkdir, path: {path}}}\n"


@pytest.mark.parametrize(
    ("content", "file", "arguments"),
    [
        ("", None, ["+hydra.callbacks.x._target_=os.mkdir", "+hydra.callbacks.x.path={path}"]),
        (CALLING, "hydra/callbacks/x.yaml", ["--config-dir=more", "+hydra/callbacks@hydra.callbacks.x=x"]),
        (CALLING, "hydra/callbacks/x.yaml", ["hydra.searchpath=[more]", "+hydra/callbacks@hydra.callbacks.x=x"]),
        (FACTORY, "hydra/job_logging/x.yaml", ["--config-dir=more", "hydra/job_logging=x"]),
        (FACTORY, "hydra/hydra_logging/x.yaml", ["-m", "hydra/hydra_logging=x", "hydra.searchpath=[more]", "seed=1,2"]),
    ],
    ids=["command line", "folder", "search path", "log of a job", "log of a sweep"],
)
def test_no_command_calls_what_it_is_given(user, content, file, arguments):
    path = user.folder / "canary"
    if file is not None:
        (user.folder / "more" / file).parent.mkdir(parents=True)
        (user.folder / "more" / file).write_text(content.format(path=path))
    done = user.python("gptlab.train", *(argument.format(path=path) for argument in arguments), "model.n_layer=abc")
    assert "=os.mkdir is refused: a configuration can" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.returncode == CONFIG_ERROR
    assert not path.exists()


@pytest.mark.parametrize("flag", ["--experimental-rerun", "--exp"])
def test_hydra_s_flag_that_unpickles_is_refused(user, flag):
    canary = Canary(user.folder / "canary")
    canary.write(user.folder / "config.pickle", "bare")
    done = user.python("gptlab.train", flag, "config.pickle")
    assert "--experimental-rerun=config.pickle is refused: it would unpickle the file" in done.stderr
    assert done.returncode == CONFIG_ERROR
    assert not canary.was_run()
    assert not (user.folder / "outputs").exists()
