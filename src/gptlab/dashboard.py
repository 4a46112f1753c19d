"""Creates a W&B workspace: python -m gptlab.dashboard entity=<entity> project=<project> [key=value ...]."""

from pathlib import Path

from omegaconf import DictConfig

from gptlab.config.base import FrozenConfig, known_keys, validate
from gptlab.config.command import command
from gptlab.config.resolve import resolve_to_dict
from gptlab.config.search_path import configuration_folder
from gptlab.dashboards.spaces import write_wandb_sweeps
from gptlab.dashboards.workspace import WORKSPACE_MARK, build_workspace, save_workspace, workspace_json
from gptlab.errors import UserError, failure_reason
from gptlab.exit_codes import DONE
from gptlab.files import check_output, write_file
from gptlab.terminal import print_message


class DashboardConfig(FrozenConfig):
    """Configuration of ``python -m gptlab.dashboard``; see conf/dashboard.yaml."""

    entity: str | None
    project: str | None
    name: str
    dry_run: bool
    out: str
    overwrite: bool
    wandb_sweeps: str | None


@command("dashboard", keys=set(known_keys(DashboardConfig)))
def main(values: DictConfig) -> int:
    """Builds and saves the workspace or, with ``wandb_sweeps``, writes the sweep files."""
    config = validate(DashboardConfig, resolve_to_dict(values))
    if config.wandb_sweeps is not None:
        conf = configuration_folder()
        folder = Path(config.wandb_sweeps).expanduser()
        logger = conf / "logger" / "wandb.yaml"
        for path in write_wandb_sweeps(conf / "sweeps", logger, folder, overwrite=config.overwrite):
            print_message(f"Written: {path}")
        return DONE
    if not config.entity or not config.project:
        raise UserError(
            "A workspace belongs to a W&B project. Set entity=<user or team> project=<project>, as in the URL of the "
            "project, wandb.ai/<entity>/<project>."
        )
    out = Path(config.out).expanduser()
    if config.dry_run:
        check_output(out, "out", WORKSPACE_MARK, overwrite=config.overwrite)
    workspace = build_workspace(config.entity, config.project, config.name)
    if not config.dry_run:
        print_message(f"Saved: {save_workspace(workspace)}")
        return DONE
    try:
        write_file(out, workspace_json(workspace))
    except OSError as error:
        raise UserError(f"out={config.out} cannot be written: {failure_reason(error)}.") from error
    print_message(f"Written: {out}")
    return DONE


if __name__ == "__main__":
    main()
