"""Defines the W&B workspace of a project. Imports no torch."""

import json
from typing import TYPE_CHECKING

from gptlab.errors import UserError, install_extra
from gptlab.tracking.wandb.init import start_client
from gptlab.tracking.wandb.opt_outs import opt_out

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2.interface import LinePlot
    from wandb_workspaces.workspaces import Section, Workspace

BEST = "val/loss.min"  # key in W&B's summary of a run
# Config keys that sweeps vary, for the columns of the parallel coordinates plot
VARIED = ("optimizer.lr", "train.global_batch_size", "model.n_layer", "model.n_embd", "train.max_steps", "seed")


def build_workspace(entity: str, project: str, name: str) -> "Workspace":
    """Builds the workspace with sections for training health, throughput, sweep comparison and samples.

    Args:
        entity: W&B user or team.
        project: W&B project.
        name: Name of the workspace.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr
    except ImportError:
        raise UserError(f"gptlab.dashboard needs the wandb-workspaces package: {install_extra('dashboard')}") from None
    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=[_health(), _throughput(), _comparison(), _samples()],
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=50),
        runset_settings=ws.RunsetSettings(
            order=[expr.Ordering(expr.Summary(BEST), ascending=True)],
            pinned_columns=[f"summary:{BEST}", "summary:tokens", "summary:tokens_per_second"],
        ),
    )


WORKSPACE_MARK = '{\n "entity": '  # beginning of the JSON of a workspace


def workspace_json(workspace: "Workspace") -> str:
    """Returns a workspace as the JSON that is sent to W&B.

    In wandb-workspaces 0.4.13, the only public method that creates it is ``Workspace.save``, which also sends it.
    """
    view = workspace._to_model()  # noqa: SLF001
    spec = json.loads(view.spec.model_dump_json(by_alias=True, exclude_none=True))
    values = {"entity": view.entity, "project": view.project, "name": view.display_name, "spec": spec}
    return json.dumps(values, indent=1) + "\n"


def save_workspace(workspace: "Workspace") -> str:
    """Sends a workspace to W&B; returns its URL.

    Raises:
        UserError: There is no login, W&B rejects the workspace, or W&B's own settings forbid a connection.
    """
    if forbidden := opt_out():
        raise UserError(
            f"The workspace cannot be saved: W&B is {forbidden.mode} because of {forbidden.source}. Remove that "
            "setting, or write the workspace to a file with dry_run=true."
        )
    start_client()
    try:
        workspace.save()
        return str(workspace.url)
    except Exception as error:
        reason = " ".join(str(error).split())
        raise UserError(
            f"The workspace cannot be saved: {reason}\nLog in with `wandb login`, and check that you have "
            f"write access to the project {workspace.entity}/{workspace.project}. Without W&B, dry_run=true writes the "
            "workspace to a file."
        ) from None


def _line(title: str, *metrics: str, **options: object) -> "LinePlot":
    """Returns a line plot of metrics over tokens seen."""
    from wandb_workspaces.reports.v2.interface import LinePlot

    return LinePlot(title=title, x="tokens", y=list(metrics), **options)  # type: ignore[arg-type]


def _health() -> "Section":
    from wandb_workspaces.workspaces import Section

    return Section(
        name="Training health",
        is_open=True,
        panels=[
            _line("Val loss, nats per token", "val/loss"),
            _line("Train loss, nats per token", "train/loss", smoothing_type="exponential", smoothing_factor=0.6),
            _line("Val bits per byte", "val/bits_per_byte"),
            _line("Gradient norm, before clipping", "grad_norm", log_y=True),
            _line("Weight norm", "weight_norm"),
            _line("Learning rates", metric_regex="^lr(/.*)?$"),
            _line("Skipped steps, loss spikes", "bad_steps", "loss_spikes"),
        ],
    )


def _throughput() -> "Section":
    from wandb_workspaces.workspaces import Section

    return Section(
        name="Throughput",
        is_open=True,
        panels=[
            _line("Tokens per second", "tokens_per_second"),
            _line("Model FLOPs utilization", "mfu"),
            _line("Fraction of time waiting for data", "data_wait"),
            _line("Peak memory, GB", "peak_memory_gb"),
        ],
    )


def _comparison() -> "Section":
    from wandb_workspaces.reports.v2.interface import (
        Config,
        ParallelCoordinatesPlot,
        ParallelCoordinatesPlotColumn,
        ParameterImportancePlot,
        RunComparer,
        ScatterPlot,
        SummaryMetric,
    )
    from wandb_workspaces.workspaces import Section

    columns = [ParallelCoordinatesPlotColumn(metric=Config(name), display_name=name) for name in VARIED]
    best = ParallelCoordinatesPlotColumn(metric=SummaryMetric(BEST), display_name="best val loss", inverted=True)
    return Section(
        name="Sweep comparison",
        is_open=True,
        panels=[
            _line(
                "Val loss by sweep: mean and standard error",
                "val/loss",
                groupby="Group",
                groupby_aggfunc="mean",
                groupby_rangefunc="stderr",
            ),
            ScatterPlot(
                title="Best val loss by learning rate",
                x=Config("optimizer.lr"),
                y=SummaryMetric(BEST),
                log_x=True,
            ),
            ParallelCoordinatesPlot(title="Hyperparameters and best val loss", columns=[*columns, best]),
            ParameterImportancePlot(with_respect_to=BEST),
            RunComparer(diff_only="split"),
        ],
    )


def _samples() -> "Section":
    from wandb_workspaces.reports.v2.interface import Layout, WeavePanelSummaryTable
    from wandb_workspaces.workspaces import Section

    table = WeavePanelSummaryTable(table_name="samples", layout=Layout(w=24, h=16))
    return Section(name="Samples", is_open=True, panels=[table])
