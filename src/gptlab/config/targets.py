"""What Hydra may call for a configuration: its own plugins. Imports no torch.

gptlab builds what it needs itself, from checked values. Hydra builds the launcher, the sweeper, the callbacks and the
log handlers that a configuration names under ``hydra``, so these are looked at before it does.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import import_module
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.plugins import Plugins
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, OmegaConf

from gptlab.errors import UserError

BUILT, LOGGED = ("launcher", "sweeper", "callbacks"), ("job_logging", "hydra_logging")
HANDLERS = ("logging.StreamHandler", "logging.FileHandler", "logging.NullHandler")
STREAMS = ("ext://sys.stdout", "ext://sys.stderr")
LOG_FILES = ("${hydra.runtime.output_dir}/", "hydra-")  # how the names of Hydra's own begin, before what follows


@contextmanager
def checked_targets() -> Iterator[None]:
    """Check what Hydra composes, wherever its parts come from, before Hydra acts on it; that of a sweep's jobs, too."""
    compose = ConfigLoaderImpl.load_configuration

    def compose_and_check(loader: ConfigLoaderImpl, *args: Any, **options: Any) -> DictConfig:
        config = compose(loader, *args, **options)
        check_targets(config)
        return config

    ConfigLoaderImpl.load_configuration = compose_and_check  # type: ignore[assignment, method-assign]
    try:
        yield
    finally:
        ConfigLoaderImpl.load_configuration = compose  # type: ignore[method-assign]


def check_targets(config: DictConfig) -> None:
    """See that Hydra would call nothing but plugins and log handlers; UserError names the key that says otherwise."""
    for section in BUILT:
        found = OmegaConf.select(config, f"hydra.{section}")
        for key, value in _leaves(_plain(found, resolve=True), f"hydra.{section}"):
            if key.endswith("._target_") and not _is_allowed(value):
                raise UserError(f"{key}={value} is refused: a configuration can call Hydra's plugins and nothing else.")
    for section in LOGGED:  # unresolved: the run directory has no name yet
        node = config.hydra._get_node(section)
        for key, value in _leaves(_plain(node, resolve=False), f"hydra.{section}"):
            if not _is_harmless(key.rpartition(".")[2], value):
                raise UserError(
                    f"{key}={value} is refused: a configuration can log by {', '.join(HANDLERS)} and nothing else."
                )


def _plain(node: Any, *, resolve: bool) -> Any:
    """Turn a part of a configuration into plain data; an interpolation that is not resolved is its text."""
    if OmegaConf.is_config(node) and node._is_interpolation():
        return node._value()
    return OmegaConf.to_container(node, resolve=resolve) if OmegaConf.is_config(node) else node


def _leaves(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """Yield every value of nested plain data under its dotted key."""
    if isinstance(value, dict | list):
        for name, inside in value.items() if isinstance(value, dict) else enumerate(value):
            yield from _leaves(inside, f"{key}.{name}")
    else:
        yield key, value


def _is_allowed(target: Any) -> bool:
    """Whether a target is a plugin that Hydra has found, or a callback that is defined in gptlab by that name."""
    module, _, name = str(target).rpartition(".")
    if module.split(".")[0] != "gptlab":
        return target in Plugins.instance().class_name_to_class
    with suppress(ImportError):
        found = getattr(import_module(module), name, None)
        return isinstance(found, type) and issubclass(found, Callback) and found.__module__ == module
    return False


def _is_harmless(name: str, value: Any) -> bool:
    """Whether Python's logging makes nothing of a value but handlers and text."""
    if name in ("()", "class"):
        return name == "class" and value in HANDLERS
    if not isinstance(value, str) or value in STREAMS or value.startswith(LOG_FILES):
        return True
    return not value.startswith(("ext://", "cfg://")) and "${" not in value
