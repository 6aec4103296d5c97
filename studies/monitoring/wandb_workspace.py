"""The W&B dashboard of a study, as code: a saved workspace.

A sweep that is online creates it when it begins. A sweep that is offline writes dashboard.json;
`batchcam-study dashboard` creates the workspace after the runs are synced.
"""

from pathlib import Path
from typing import Any

import wandb
import wandb_workspaces.reports.v2 as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces import expr

from batchcam.errors import ConfigError, first_line
from studies import paths
from studies.monitoring.wandb_runs import Mode, server_problem
from studies.settings import StudySettings, load_settings
from studies.space import SEARCHED, SearchSpace

OBJECTIVES = ("val_accuracy", "cam_ssim")
CURVES = ("val_accuracy", "cam_ssim", "cam_ssim_sample", "loss")
MEDIA = "cams"

_REMEDY = "Set WANDB_API_KEY, or create the dashboard later with `batchcam-study dashboard`."


def workspace(study: str, project: str, entity: str, space: SearchSpace) -> ws.Workspace:
    """Return the workspace of a study: a filter for its runs, and the panels."""
    return ws.Workspace(
        entity=entity,
        project=project,
        name=f"Study {study}",
        sections=[
            ws.Section(name="Accuracy and explanation", is_open=True, panels=_trade_off()),
            ws.Section(name="What decides it", is_open=True, panels=_parameters(space)),
            ws.Section(name="Learning curves", is_open=True, panels=_curves()),
            ws.Section(name="Class CAMs", is_open=True, panels=[_media()]),
            ws.Section(name="Throughput", is_open=False, panels=_throughput()),
        ],
        runset_settings=ws.RunsetSettings(
            filters=expr.And(ws.Metric("Group") == study),
            order=[ws.Ordering(ws.Summary("val_accuracy"), ascending=False)],
            pinned_columns=[
                "run:displayName",
                "summary:val_accuracy",
                "summary:cam_ssim",
                "summary:epoch",
            ],
        ),
        settings=ws.WorkspaceSettings(x_axis="epoch", max_runs=100),
    )


def _trade_off() -> list[wr.ScatterPlot]:
    # The best SSIM so far, going from small errors to large ones, is the Pareto front.
    return [
        wr.ScatterPlot(
            title="Error and SSIM of class CAMs; the line is the Pareto front",
            x=wr.SummaryMetric("val_error"),
            y=wr.SummaryMetric("cam_ssim"),
            running_ymax=True,
            layout=wr.Layout(w=12, h=10),
        ),
        wr.ScatterPlot(
            title="SSIM beside its ceiling for the CAM grid",
            x=wr.SummaryMetric("cam_ssim_ceiling"),
            y=wr.SummaryMetric("cam_ssim"),
            layout=wr.Layout(x=12, w=12, h=10),
        ),
    ]


def _parameters(
    space: SearchSpace,
) -> list[wr.ParallelCoordinatesPlot | wr.ParameterImportancePlot]:
    searched = [entry for entry in SEARCHED if entry[0] not in space.left_out]
    columns = [
        wr.ParallelCoordinatesPlotColumn(wr.Config(name), display_name=name, log=log or None)
        for name, log in searched
    ]
    columns += [
        wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(name), display_name=name)
        for name in OBJECTIVES
    ]
    return [
        wr.ParallelCoordinatesPlot(
            title="What was tried", columns=columns, layout=wr.Layout(w=24, h=10)
        ),
        *(
            wr.ParameterImportancePlot(
                with_respect_to=name, layout=wr.Layout(x=12 * place, y=10, w=12, h=8)
            )
            for place, name in enumerate(OBJECTIVES)
        ),
    ]


def _curves() -> list[wr.LinePlot]:
    # By epoch, so that curves end at the rungs where trials were stopped.
    return [
        wr.LinePlot(
            title=name,
            x="epoch",
            y=[name],
            title_x="epoch",
            max_runs_to_show=100,
            layout=wr.Layout(x=12 * (place % 2), y=8 * (place // 2), w=12, h=8),
        )
        for place, name in enumerate(CURVES)
    ]


def _media() -> wr.MediaBrowser:
    return wr.MediaBrowser(
        title="Prototypes above, class CAMs below",
        media_keys=[MEDIA],
        num_columns=2,
        layout=wr.Layout(w=24, h=12),
    )


def _throughput() -> list[Any]:
    return [
        wr.BarPlot(
            title="Images per second by backbone, median",
            metrics=["images_per_second"],
            groupby=wr.Config("backbone"),
            groupby_aggfunc="median",
            layout=wr.Layout(w=12, h=8),
        ),
        wr.ScatterPlot(
            title="Images per second and accuracy",
            x=wr.SummaryMetric("images_per_second"),
            y=wr.SummaryMetric("val_accuracy"),
            layout=wr.Layout(x=12, w=12, h=8),
        ),
    ]


def write(made: ws.Workspace, folder: Path) -> Path:
    """Write the model of a workspace beside its study."""
    path = folder / paths.DASHBOARD
    path.write_text(made._to_model().model_dump_json(by_alias=True, indent=1, exclude_none=True))
    return path


def publish(study: str, project: str, space: SearchSpace) -> str:
    """Create the workspace on W&B's server, and return its address.

    Raises:
        ConfigError: the server cannot be reached, or does not accept the workspace.
    """
    problem = server_problem()  # W&B would try for 20 s.
    if problem:
        raise ConfigError(f"{problem}. {_REMEDY}")
    try:
        entity = wandb.Api().default_entity
        return str(workspace(study, project, str(entity), space).save().url)
    except Exception as error:  # W&B raises various errors, those of its transport among them.
        raise ConfigError(
            f"W&B did not accept the dashboard of {study!r}: {first_line(error)}. {_REMEDY}"
        ) from error


def begin(settings: StudySettings, mode: Mode) -> str | None:
    """Create the dashboard of a study that begins; return a message for the user, or None.

    An error becomes a warning: it never stops a study.
    """
    name, project = str(settings.study), settings.wandb_project
    if mode == "disabled":
        return None
    if mode == "online":
        try:
            return f"W&B dashboard: {publish(name, project, settings.space)}"
        except ConfigError as error:
            return f"warning: {error}"
    write(workspace(name, project, "", settings.space), settings.folder)
    return None


def create(folder: Path, *, offline: bool) -> str:
    """Publish or write the workspace of a study that has begun; return its address or path.

    Args:
        folder: of the study.
        offline: write dashboard.json there, without any connection.

    Raises:
        ConfigError: the folder holds no study, or W&B does not accept the workspace.
    """
    path = folder / paths.SETTINGS
    if not path.is_file():
        raise ConfigError(
            f"{folder} holds no study: it contains no {paths.SETTINGS}; name a study's folder."
        )
    study = load_settings(path)
    name, project = str(study.study), study.wandb_project
    if offline:
        return str(write(workspace(name, project, "", study.space), folder))
    return publish(name, project, study.space)
