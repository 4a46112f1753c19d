"""Starts W&B's client for a run: online if allowed and possible, otherwise offline in the run directory."""

import contextlib
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Literal

from gptlab.config.schema import RunConfig, WandbConfig
from gptlab.errors import UserError, without_passwords
from gptlab.files import read_regular, write_file
from gptlab.parsing import parse_json
from gptlab.tracking.environment import ENVIRONMENT
from gptlab.tracking.run_directory import without_origin
from gptlab.tracking.run_store.sweeps import Sweep, load_sweep
from gptlab.tracking.wandb.files import sync_command, wandb_records
from gptlab.tracking.wandb.opt_outs import opt_out

log = logging.getLogger(__name__)

ID = "wandb_id"  # file with the W&B ID of a run


def init_run(config: RunConfig, settings: WandbConfig, directory: Path) -> Any:
    """Starts W&B's client, online if allowed and possible; returns W&B's run.

    Raises:
        UserError: logger.wandb.mode=online, but W&B does not respond or there is no login.
    """
    import wandb

    before = wandb_records(directory)
    if settings.mode == "offline":
        return _init(config, settings, directory, "offline")
    if forbidden := opt_out():
        run = _init(config, settings, directory, "offline")
        log.info(
            "W&B is offline because of %s. The record is kept in the run directory. To upload it: %s",
            *(forbidden.source, sync_command(directory)),
        )
        return run
    try:
        return _init(config, settings, directory, "online")
    except Exception as error:
        reason = " ".join(str(error).split())
    wandb.teardown()
    for path in set(wandb_records(directory)) - set(before):  # empty records of the failed attempt
        shutil.rmtree(path.parent)
    if settings.mode == "online":
        raise UserError(
            f"logger=wandb cannot start: {reason}\nLog in with `wandb login`, or keep the record in the run directory: "
            "always with logger.wandb.mode=offline, or only if W&B cannot be used with logger.wandb.mode=auto."
        )
    run = _init(config, settings, directory, "offline")
    log.warning(
        "W&B cannot be used (%s). The record is kept in the run directory. To upload it: %s",
        *(reason, sync_command(directory)),
    )
    return run


def run_config(config: RunConfig, directory: Path, client: Any) -> dict[str, Any]:
    """Returns the configuration for W&B: that of the run and, as "environment", code version and machine.

    It excludes environment variables, the command line and passwords in URLs. Settings whose names begin with ``x_``
    are undocumented, but the environment variables that set them are documented (checked in wandb 0.31.0).

    Args:
        config: Configuration of the run.
        directory: Run directory.
        client: Settings of W&B's client; code and machine data that they disable are omitted.
    """
    values = parse_json(read_regular(directory / ENVIRONMENT))
    git, machine, packages = values["git"], values["machine"], values["packages"]
    environment: dict[str, Any] = {}
    if not (client.disable_git or client.x_disable_machine_info):
        environment |= {"git_commit": git["commit"], "git_uncommitted": len(git["uncommitted"])}  # files
    if not (client.x_disable_meta or client.x_disable_machine_info):
        environment |= {key: machine[key] for key in ("system", "processor", "cores", "gpus")}
        environment |= {"host": client.host, "memory_gb": round(machine["memory_bytes"] / 1e9, 1)}
    environment |= {
        "slurm_job": values["slurm_job"],
        "python": values["python"].split()[0],
        **{name: packages.get(name) for name in ("torch", "lightning", "gptlab")},
    }
    return {**without_passwords(without_origin(config)), "environment": environment}


def _init(config: RunConfig, settings: WandbConfig, directory: Path, mode: Literal["online", "offline"]) -> Any:
    os.environ.pop("WANDB_SERVICE", None)  # a parent process's service would keep an abandoned run alive
    os.environ.setdefault("WANDB_DATA_DIR", str(directory / "wandb"))  # stages tables there, not in the home directory
    import wandb

    sweep = _sweep(directory)
    client = start_client()
    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        group=settings.group or (sweep.wandb_group if sweep else None),
        job_type=settings.job_type or ("sweep" if sweep or _agent() else "train"),
        tags=settings.tags,
        name=settings.name or f"{config.name}/{directory.name}",
        notes=settings.notes,
        id=_id(directory),
        resume="allow",
        dir=directory,
        mode=mode,
        config=run_config(config, directory, client),
        settings=client_settings(settings),
    )


def start_client() -> Any:
    """Starts W&B's client before wandb.init, which would otherwise prompt for a login; returns its settings."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's own error reports would delay the end of a run
    os.environ.setdefault("WANDB_SILENT", "true")  # it prints the settings files that it reads
    import wandb

    return wandb.setup(wandb.Settings(silent=True)).settings


def client_settings(settings: WandbConfig) -> Any:
    """Returns W&B settings with the configured timeouts, and without W&B's messages and its record of the process.

    That record has the command line, paths and the URL of the git remote, all of which may contain secrets.
    ``run_config`` has the rest of it.
    """
    import wandb

    return wandb.Settings(
        silent=True,
        x_disable_meta=True,
        disable_git=True,
        init_timeout=settings.init_timeout,
        finish_timeout=settings.finish_timeout,
        finish_timeout_raises=True,
    )


def _sweep(directory: Path) -> Sweep | None:
    """Returns the sweep to which a run belongs, or None."""
    with contextlib.suppress(UserError):  # damaged, which does not prevent training
        return load_sweep(directory.parent)
    return None


def _agent() -> bool:
    """Whether `wandb agent` has started this run as part of a W&B sweep."""
    return "WANDB_SWEEP_ID" in os.environ


def _id(directory: Path) -> str:
    """Returns the W&B ID of the run: the recorded one, that of W&B's agent, or a new one."""
    file = directory / ID
    if not file.exists():
        given = os.environ.get("WANDB_RUN_ID") if _agent() else None
        write_file(file, given or secrets.token_hex(4))
    return read_regular(file)
