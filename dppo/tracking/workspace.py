"""The workspace that compares the runs of a study, as code."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from dppo.errors import UserError, first_line
from dppo.tracking import STEP
from dppo.tracking.weights_and_biases import bounded, plottable

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Workspace

_SAVING = 120.0  # seconds
_WIN_RATE = "win_rate.value"
_KL, _TOKENS, _REWARD = "kl.nats_per_token", "length.policy.tokens", "reward.policy.value"
# How long a policy's answers are and how far it is from SFT: what a win rate may have been bought with.
_COSTS = (("answer length, tokens", _TOKENS), ("KL to SFT, nats a token", _KL))
_CURVES = ("eval/loss", "eval/accuracy", "interim/win_rate", "train/loss", "train/rewards/margins", "train/grad_norm")


@dataclass(frozen=True)
class Searched:
    """A parameter: its name, the key of the config that holds its values, and whether its axis is logarithmic."""

    name: str
    key: str
    log: bool


@dataclass(frozen=True)
class Compared:
    """What a workspace shows: the runs of one W&B group. ``baseline`` is the id of the run that is SFT's, if known."""

    study: str
    group: str
    entity: str | None
    project: str
    searched: Sequence[Searched]
    objectives: Sequence[str]
    baseline: str | None


def build(compared: Compared) -> Workspace:
    """The workspace, made without a network or a login. Raises UserError if its package is missing."""
    wr, ws = _package()
    from wandb_workspaces import expr

    objectives = list(dict.fromkeys([*compared.objectives, _WIN_RATE]))
    numbers = list(dict.fromkeys([*objectives, _REWARD, _KL, _TOKENS]))
    columns = [
        wr.ParallelCoordinatesPlotColumn(wr.Config(one.key), display_name=one.name, log=one.log or None)
        for one in compared.searched
    ]
    columns += [wr.ParallelCoordinatesPlotColumn(wr.SummaryMetric(plottable(path)), path) for path in objectives]
    search: list[Any] = [
        wr.ParallelCoordinatesPlot(columns=columns, title="Parameters and objectives", layout=wr.Layout(w=24, h=10))
    ]
    search += [
        wr.ParameterImportancePlot(with_respect_to=plottable(path), layout=wr.Layout(y=10, w=12, h=8))
        for path in objectives
    ]
    costs = [
        wr.ScatterPlot(
            title=f"Win rate against {title}",
            x=wr.SummaryMetric(plottable(path)),
            y=wr.SummaryMetric(plottable(_WIN_RATE)),
        )
        for title, path in _COSTS
    ]
    bars = [
        wr.BarPlot(
            title=path,
            metrics=[plottable(path)],
            groupby=wr.Config("configuration"),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
        )
        for path in numbers
    ]
    curves = [
        wr.LinePlot(
            title=name,
            x=STEP,
            y=[name],
            groupby=wr.Config("configuration"),
            groupby_aggfunc="mean",
            groupby_rangefunc="minmax",
        )
        for name in _CURVES
    ]
    made: Workspace = ws.Workspace(
        entity=compared.entity or "",
        project=compared.project,
        name=f"dppo: {compared.study}",
        sections=[
            ws.Section(name="Search", panels=search, is_open=True),
            ws.Section(name="What the win rate costs", panels=costs, is_open=True),
            ws.Section(name="Configurations, band over seeds", panels=bars, is_open=True),
            ws.Section(name="Curves, band over seeds", panels=curves, is_open=True),
        ],
        settings=ws.WorkspaceSettings(x_axis=STEP, max_runs=100),
        runset_settings=ws.RunsetSettings(
            filters=expr.And(
                expr.Metric("Group") == compared.group,
                expr.Metric("JobType").isin(["experiment", "trial", "baseline", "result"]),
            ),
            groupby=[expr.Config("method"), expr.Config("configuration")],
            order=[expr.Ordering(expr.Summary(plottable(objectives[0])), ascending=False)],
            pinned_columns=[
                *(f"summary:{plottable(path)}" for path in numbers),
                *(f"config:{one.key}" for one in compared.searched),
                "summary:status",
                "config:seed",
            ],
            baseline_run=compared.baseline,
        ),
    )
    return made


def specification(workspace: Workspace) -> dict[str, Any]:
    """What is stored at W&B, as JSON."""
    found: dict[str, Any] = json.loads(workspace._to_model().spec.model_dump_json(by_alias=True, exclude_none=True))
    return found


def save(workspace: Any) -> str:
    """Store the workspace at W&B and return its address. Raises UserError, which says why, if that fails."""
    import wandb  # noqa: TID251 - this is the one place

    try:
        workspace.entity = workspace.entity or str(wandb.Api(timeout=20).default_entity)
        bounded(workspace.save, _SAVING)
    except Exception as error:  # whatever the client and its transport raise
        reason = first_line(error)
        raise UserError(
            f"the workspace was not saved in {workspace.entity}/{workspace.project} ({reason}): the project must "
            "exist, so upload the study first: python -m dppo.sync"
        ) from None
    return str(workspace.url)


def _package() -> tuple[Any, Any]:
    try:
        import wandb_workspaces.reports.v2 as wr
        import wandb_workspaces.workspaces as ws
    except ImportError:
        raise UserError(
            "the workspace needs a package that is not installed: pip install -c constraints.txt '.[dashboard]', or "
            "pip install wandb-workspaces"
        ) from None
    return wr, ws
