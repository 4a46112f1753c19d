"""Starting W&B's client for a run: online if that is allowed and possible, else in the run directory only."""

import contextlib
import json
import logging
import os
import secrets
import shutil
from pathlib import Path
from typing import Any, Literal

from gptlab.config.schema import RunConfig, WandbConfig
from gptlab.errors import UserError
from gptlab.tracking.environment import ENVIRONMENT
from gptlab.tracking.run_directory import without_origin
from gptlab.tracking.run_store.sweeps import Sweep, load_sweep
from gptlab.tracking.wandb.files import sync_command, wandb_records
from gptlab.tracking.wandb.opt_outs import opt_out

log = logging.getLogger(__name__)

ID = "wandb_id"  # the file that keeps a run's id


def init_run(config: RunConfig, settings: WandbConfig, directory: Path) -> Any:
    """Starts W&B's client, online if that is allowed and possible; returns its run.

    Raises:
        UserError: logger.wandb.mode=online, and W&B does not answer or there is no login.
    """
    import wandb

    before = wandb_records(directory)
    if settings.mode == "offline":
        return _init(config, settings, directory, "offline")
    if forbidden := opt_out():
        run = _init(config, settings, directory, "offline")
        log.info(
            "W&B is offline because of %s. The record is kept in the run directory; to send it: %s",
            *(forbidden.source, sync_command(directory)),
        )
        return run
    try:
        return _init(config, settings, directory, "online")
    except Exception as error:
        reason = " ".join(str(error).split())
    wandb.teardown()
    for path in set(wandb_records(directory)) - set(before):  # nothing is in it
        shutil.rmtree(path.parent)
    if settings.mode == "online":
        raise UserError(
            f"logger=wandb cannot start: {reason}\nLog in with `wandb login`, or keep the record in the run directory: "
            "logger.wandb.mode=offline, or auto for where W&B cannot be reached."
        )
    run = _init(config, settings, directory, "offline")
    log.warning(
        "W&B cannot be used (%s). The record is kept in the run directory; to send it: %s",
        *(reason, sync_command(directory)),
    )
    return run


def run_config(config: RunConfig, directory: Path, client: Any) -> dict[str, Any]:
    """Returns the configuration shown by W&B: the run's own and, as "environment", the code and the machine.

    No variable of the environment is in it, and no command line: they may hold secrets. The settings whose names begin
    with ``x_`` are not documented; the variables that set them are (read in wandb 0.31.0).

    Args:
        config: Of the run.
        directory: The run's.
        client: Settings of W&B's client: what they forbid of the code and the machine is left out.
    """
    values = json.loads((directory / ENVIRONMENT).read_text(encoding="utf-8"))
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
    return {**without_origin(config), "environment": environment}


def _init(config: RunConfig, settings: WandbConfig, directory: Path, mode: Literal["online", "offline"]) -> Any:
    os.environ.pop("WANDB_SERVICE", None)  # that of a parent process, which would keep hold of a run that was given up
    os.environ.setdefault("WANDB_DATA_DIR", str(directory / "wandb"))  # tables wait there, not in the user's home
    import wandb

    sweep = _sweep(directory)
    client = start_client()
    return wandb.init(
        project=settings.project,
        entity=settings.entity,
        group=settings.group or (sweep.wandb_group if sweep else None),
        job_type=settings.job_type or ("sweep" if sweep or _agent() else "train"),
        tags=settings.tags,
        name=f"{config.name}/{directory.name}",
        id=_id(directory),
        resume="allow",
        dir=directory,
        mode=mode,
        config=run_config(config, directory, client),
        settings=timeout_settings(settings),
    )


def start_client() -> Any:
    """Starts W&B's client before wandb.init, which would prompt for a login; returns its settings."""
    os.environ.setdefault("WANDB_ERROR_REPORTING", "false")  # W&B's reports on itself would hold up the end of a run
    os.environ.setdefault("WANDB_SILENT", "true")  # it prints the settings files that it reads
    import wandb

    return wandb.setup(wandb.Settings(silent=True)).settings


def timeout_settings(settings: WandbConfig) -> Any:
    """Returns W&B settings with the timeouts, which also silence its output."""
    import wandb

    return wandb.Settings(
        silent=True,
        init_timeout=settings.init_timeout,
        finish_timeout=settings.finish_timeout,
        finish_timeout_raises=True,
    )


def _sweep(directory: Path) -> Sweep | None:
    """Returns the sweep that a run is a trial of."""
    with contextlib.suppress(UserError):  # damaged: no reason not to train
        return load_sweep(directory.parent)
    return None


def _agent() -> bool:
    """Whether `wandb agent` has started this run, as one of a sweep of W&B's own."""
    return "WANDB_SWEEP_ID" in os.environ


def _id(directory: Path) -> str:
    """Returns the run's W&B id: its recorded one, that of W&B's agent, or a new one."""
    file = directory / ID
    if not file.exists():
        given = os.environ.get("WANDB_RUN_ID") if _agent() else None
        file.write_text(given or secrets.token_hex(4))
    return file.read_text()
