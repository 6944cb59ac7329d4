"""The views of needle.reporting.views in W&B: a workspace, where one looks around, and a report, which one passes on.

wandb-workspaces builds both without a network; saving asks for the project's id and is one UpsertView2 and one
UpsertView. What was saved is remembered, so that saving again replaces it and makes no second one.
"""

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from needle import artifacts
from needle.errors import ConfigError, DataError, UserError
from needle.reporting.views import BUDGETS, Panel, View
from needle.scores import TrainingRun

if TYPE_CHECKING:
    from wandb_workspaces.reports.v2 import Report
    from wandb_workspaces.workspaces import Workspace

ARM = "arm"  # the key of the configuration that runs are grouped by
RUNS_SHOWN = 100  # in a panel; W&B draws ten where nothing is said
GRID_COLUMNS = 24  # of a report
PANELS_A_LINE = {"lines": 5, "points": 3, "columns": 3}
# The package's filters are text that it parses again; names with quotes or signs would not survive it.
SAFE_NAME = re.compile(r"[\w.,+ -]+")


@dataclass(frozen=True)
class Place:
    """Where an experiment's runs lie in W&B. Views find them by their group."""

    entity: str
    project: str
    experiment: str
    group: str

    @property
    def filters(self) -> Any:
        from wandb_workspaces import expr

        return expr.And(expr.Metric("Group") == self.group)


def place_of(runs: Sequence[TrainingRun], *, exp: str, project: str | None, entity: str | None) -> Place:
    """Where the runs say that they are. `project` and `entity` outweigh them.

    Raises:
        ConfigError: there is no key.
        DataError: no run is in W&B, or they are in several projects or groups.
    """
    if not os.environ.get("WANDB_API_KEY"):
        raise ConfigError(
            "mode=online: the environment has no WANDB_API_KEY; export it, or make the local page: mode=offline"
        )
    tracked = [(run, run.record.get("facts", {}).get("wandb") or {}) for run in runs]
    tracked = [(run, where) for run, where in tracked if where]
    if not tracked:
        raise DataError(
            f"exp={exp}: none of its {len(runs)} runs was tracked in W&B; run them with logger=wandb, or make the "
            "local page: mode=offline"
        )
    projects = sorted({str(where["project"]) for _, where in tracked if where.get("project")})
    if project is None and len(projects) != 1:
        raise DataError(f"exp={exp}: its runs are in the W&B projects {', '.join(projects)}; choose one: project=NAME")
    entities = sorted({str(where["entity"]) for _, where in tracked if where.get("entity")})
    groups = sorted({str(_group(run, exp)) for run, _ in tracked})
    if len(groups) != 1 or not SAFE_NAME.fullmatch(groups[0]):
        raise DataError(
            f"exp={exp}: its runs are in the W&B groups {', '.join(groups)}; a workspace finds its runs by one group, "
            "named with letters, digits, _ - . , +. needle.sweep gives it; runs of your own get it by logger.group=NAME"
        )
    return Place(entity or (entities[0] if entities else default_entity()), project or projects[0], exp, groups[0])


def _group(run: TrainingRun, exp: str) -> str | None:
    """As needle.tracking sorts runs: the logger's group, or the experiment's name where there is one."""
    given = (run.config.get("logger") or {}).get("group")
    belongs = run.config.get("arm") is not None or (run.config.get("sweep") or {}).get("question") is not None
    return given or (exp if belongs else None)


def default_entity() -> str:
    import wandb

    with _spoken():
        return str(wandb.Api().default_entity)


def workspace_of(views: Sequence[View], place: Place) -> "Workspace":
    """The model, not saved: a section a view, runs grouped by arm and ordered by the headline metric."""
    import wandb_workspaces.workspaces as ws
    from wandb_workspaces import expr

    headline, columns = _leaderboard(views)
    sections = [
        ws.Section(
            name=view.title,
            panels=[made for panel in view.panels for made in panels_of(panel)],
            is_open=True,
            layout_settings=ws.SectionLayoutSettings(columns=_a_line(view), rows=2),
        )
        for view in views
    ]
    return ws.Workspace(
        entity=place.entity,
        project=place.project,
        name=title_of(place),
        sections=sections,
        auto_generate_panels=False,
        settings=ws.WorkspaceSettings(x_axis="tokens", max_runs=RUNS_SHOWN),
        runset_settings=ws.RunsetSettings(
            filters=place.filters,
            groupby=[expr.Config(ARM)],
            order=[expr.Ordering(expr.Summary(headline), ascending=False)],
            pinned_columns=["run:displayName", f"config:{ARM}.value", *(f"summary:{key}" for key in columns)],
        ),
    )


def report_of(views: Sequence[View], place: Place, *, question: str, is_local: bool) -> "Report":
    """The model, not saved: the question, then a heading, words and a grid a view.

    Args:
        is_local: leaves the entity and project out of the run sets, which would be looked up on the server; the report
            then speaks of its own project.
    """
    import wandb_workspaces.reports.v2 as wr

    headline, columns = _leaderboard(views)
    where = {} if is_local else {"entity": place.entity, "project": place.project}
    blocks: list[Any] = [wr.P(question)] if question else []
    for view in views:
        runset = wr.Runset(
            **where,
            name=place.experiment,
            filters=place.filters,
            groupby=[f"config.{ARM}"],
            order=[wr.OrderBy(wr.SummaryMetric(headline), ascending=False)],
            visible_columns=["run:displayName", f"config:{ARM}.value", *(f"summary:{key}" for key in columns)],
        )
        panels = [made for panel in view.panels for made in panels_of(panel)]
        width, height = GRID_COLUMNS // _a_line(view), 6
        for index, panel in enumerate(panels):
            line, column = divmod(index, _a_line(view))
            panel.layout = wr.Layout(x=column * width, y=line * height, w=width, h=height)
        blocks += [wr.H2(view.title), wr.P(view.told), wr.PanelGrid(runsets=[runset], panels=panels)]
    return wr.Report(
        entity=place.entity,
        project=place.project,
        title=title_of(place)[:128],
        description=question[:500],
        blocks=blocks,
        width="fluid",
    )


def title_of(place: Place) -> str:
    return f"Needle: {place.experiment}"


def _leaderboard(views: Sequence[View]) -> tuple[str, tuple[str, ...]]:
    """The headline's key, and those of every column."""
    (view,) = [view for view in views if view.name == "leaderboard"]
    return view.panels[0].y[0], view.panels[-1].y


def _a_line(view: View) -> int:
    return min(PANELS_A_LINE[panel.kind] for panel in view.panels)


def panels_of(panel: Panel) -> list[Any]:
    """W&B's panels of one of ours; `columns` are one for each key. Settings are means over their runs."""
    import wandb_workspaces.reports.v2 as wr

    grouped = {"groupby": wr.Config(ARM), "groupby_aggfunc": "mean", "max_runs_to_show": RUNS_SHOWN}
    if panel.kind == "lines":
        told = {"title": panel.title, "title_x": BUDGETS[panel.x], "title_y": panel.unit, "log_y": panel.log or None}
        return [wr.LinePlot(x=panel.x, y=list(panel.y), groupby_rangefunc="minmax", **told, **grouped)]
    if panel.kind == "points":
        x, y = wr.SummaryMetric(panel.x), wr.SummaryMetric(panel.y[0])
        return [wr.ScatterPlot(title=panel.title, x=x, y=y, log_x=True)]
    return [
        wr.BarPlot(title=key, metrics=[wr.SummaryMetric(key)], groupby_rangefunc="stderr", **grouped) for key in panel.y
    ]


def save(views: Sequence[View], place: Place, *, question: str, remembered: Path) -> Mapping[str, str]:
    """Saves both; returns what -> address.

    Args:
        remembered: a JSON file with the ids of what was saved before, which is replaced.

    Raises:
        UserError: the server refuses, or cannot be reached.
    """
    os.environ.setdefault("WANDB_SILENT", "true")  # the addresses are this stage's to print
    key = f"{place.entity}/{place.project}"
    known: dict[str, dict[str, str]] = json.loads(remembered.read_text("utf-8")) if remembered.is_file() else {}
    ids = known.setdefault(key, {})
    with _spoken(remembered):
        workspace = workspace_of(views, place)
        report = report_of(views, place, question=question, is_local=False)
        workspace._internal_name, workspace._internal_id = ids.get("workspace_name", ""), ids.get("workspace_id", "")
        report.id = ids.get("report_id", "")
        workspace.save()
        ids |= {"workspace_name": workspace._internal_name, "workspace_id": workspace._internal_id}
        artifacts.write_json_atomic(remembered, known)
        report.save()
        ids["report_id"] = report.id
        artifacts.write_json_atomic(remembered, known)
    return {"workspace": workspace.url, "report": report.url}


@contextmanager
def _spoken(remembered: Path | None = None) -> Iterator[None]:
    """Turns what W&B's client raises into a message with the way out."""
    import wandb

    try:
        yield
    except (wandb.errors.Error, OSError, ValueError) as error:  # OSError: whatever a connection may raise
        told = f"W&B does not take the dashboard: {error}; look at WANDB_BASE_URL and WANDB_API_KEY"
        if remembered is not None and remembered.is_file():
            told += f"; if the views were deleted there, delete {remembered} too"
        raise UserError(f"{told}. The local page needs none of them: mode=offline") from error
