"""Opt-outs in W&B's own settings. The stricter of these and logger.wandb.mode applies."""

import os
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from gptlab.config.schema import WandbConfig
from gptlab.errors import UserError

FALSE_VALUES = ("", "0", "f", "false", "n", "no", "off")


class OptOut(NamedTuple):
    """Opt-out by an environment variable or a settings file of W&B.

    Attributes:
        mode: "offline" (no connection) or "disabled" (also no record).
        source: Setting and its origin, such as "mode=offline in ~/.config/wandb/settings".
    """

    mode: Literal["offline", "disabled"]
    source: str


def opt_out() -> OptOut | None:
    """Returns the opt-out in W&B's own settings, or None if they allow a connection.

    As in W&B, WANDB_MODE takes precedence over settings files. WANDB_DISABLED, which W&B's client no longer reads,
    takes precedence over both. Also considered are files that W&B ignores because another setting in them is invalid,
    and the file that `wandb offline` writes to WANDB_DIR, which W&B's client does not read.

    Raises:
        UserError: The mode is unknown to W&B.
    """
    disabled, mode = os.environ.get("WANDB_DISABLED", ""), os.environ.get("WANDB_MODE")
    if disabled.lower() not in FALSE_VALUES:
        return OptOut("disabled", f"WANDB_DISABLED={disabled}")
    if mode is not None:
        return _opt_out_of(mode, f"WANDB_MODE={mode}")
    found = [_opt_out_of(mode, f"mode={mode} in {path}") for path, mode in _modes_in_files()]
    return min((one for one in found if one), key=lambda one: one.mode, default=None)  # "disabled" < "offline"


def check_mode(settings: WandbConfig) -> None:
    """Checks that W&B's own settings do not contradict logger.wandb.mode=online.

    Raises:
        UserError: They forbid a connection, or the mode in W&B's settings is unknown.
    """
    forbidden = opt_out()
    if forbidden and settings.mode == "online":
        raise UserError(
            f"logger.wandb.mode=online contradicts {forbidden.source}, which sets W&B to {forbidden.mode}. Remove that "
            "setting (from a settings file with `wandb enabled`), or set logger.wandb.mode=auto to apply it."
        )


def _opt_out_of(mode: str, source: str) -> OptOut | None:
    """Returns the opt-out for a W&B mode; imports W&B's client only if the mode is not an opt-out."""
    if mode == "disabled":
        return OptOut("disabled", source)
    if mode in ("offline", "dryrun"):
        return OptOut("offline", source)
    import wandb

    known = get_args(wandb.Settings.model_fields["mode"].annotation)
    if mode not in known:
        raise UserError(f"{source} is not a valid W&B mode. Valid modes: {', '.join(known)}.")
    return None


def _modes_in_files() -> list[tuple[Path, str]]:
    """Returns the settings files that set a mode: those of the directory if there are any, otherwise the user's.

    W&B's public settings do not report which file sets a value, and skip files with an invalid setting. The files are
    therefore read one by one with W&B's internal reader (checked in wandb 0.31.0).
    """
    import wandb
    from wandb.sdk.lib.settings_file import SettingsFiles

    def modes(*paths: str | Path) -> list[tuple[Path, str]]:
        files = {Path(path): SettingsFiles(global_settings=None, local_settings=Path(path)).all() for path in paths}
        return [(path, values["mode"]) for path, values in files.items() if "mode" in values]

    folders = (Path.cwd(), os.environ.get("WANDB_DIR") or Path.cwd())
    user = Path(os.environ.get("WANDB_CONFIG_DIR") or "~/.config/wandb").expanduser() / "settings"
    return modes(*(wandb.Settings(root_dir=folder).settings_workspace for folder in folders)) or modes(user)
