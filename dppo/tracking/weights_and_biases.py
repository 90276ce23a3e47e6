"""Weights & Biases. The only module that imports wandb."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dppo.config import require
from dppo.tracking import RunInfo, Status, Tracker
from dppo.types import Json

_log = logging.getLogger("dppo.tracking")
# Final scalars and their intervals are never plotted against steps.
_FINAL = "final"


@dataclass(frozen=True)
class WeightsAndBiases:
    """Mirror a run to W&B; ``mode: offline`` writes beside the run's files and needs no account.

    ``mode: online`` without a login or a network says so in one line and goes on offline.
    ``init_timeout_seconds`` bounds the wait for the server.
    """

    project: str
    entity: str | None
    group: str | None
    mode: Literal["offline", "online"]
    init_timeout_seconds: float

    def __post_init__(self) -> None:
        require(self.project != "", "project", "''", "must be a name")
        require(self.init_timeout_seconds > 0, "init_timeout_seconds", self.init_timeout_seconds, "must be > 0 seconds")

    def start(self, run: RunInfo) -> Tracker:
        # W&B's reports about itself go over the network offline as well, and a server that never answers holds up
        # the end of a run.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        import wandb  # noqa: TID251 - this is the one place

        # Everything W&B writes stays in the run directory.
        for variable, folder in (
            ("WANDB_CACHE_DIR", "cache"),
            ("WANDB_CONFIG_DIR", "config"),
            ("WANDB_DATA_DIR", "data"),
        ):
            os.environ.setdefault(variable, str(run.directory / "wandb" / folder))
        arguments: dict[str, Any] = {
            "project": self.project,
            "entity": self.entity,
            "group": self.group or run.group,
            "name": run.name,
            "tags": list(run.tags),
            "dir": str(run.directory),
            "config": {**run.config, "hp": _scalars(run.config)},
            "job_type": "experiment",
            "reinit": "create_new",
        }

        # The process's own settings, not only the run's: without them W&B asks for a key in a terminal.
        wandb.setup(wandb.Settings(silent=True))

        def init(mode: Literal["offline", "online"]) -> Any:
            settings = wandb.Settings(
                silent=True, console="off", init_timeout=self.init_timeout_seconds, disable_git=True, save_code=False
            )
            return wandb.init(mode=mode, settings=settings, **arguments)

        try:
            opened = init(self.mode)
        except (wandb.errors.UsageError, wandb.errors.CommError, wandb.errors.AuthenticationError) as error:
            if self.mode == "offline":
                raise
            reason = (str(error).strip().splitlines() or ["no answer"])[0]
            _log.warning("warning: tracking.mode=online: W&B can't be used (%s); this run is tracked offline", reason)
            opened = init("offline")
        opened.define_metric("train/global_step")
        opened.define_metric("train/*", step_metric="train/global_step")
        opened.define_metric("eval/*", step_metric="train/global_step")
        return _Run(opened, wandb.Table)


def _scalars(config: Mapping[str, Json], prefix: str = "") -> dict[str, Json]:
    """Every scalar of the config by its dotted name: what W&B can group and filter by."""
    flat: dict[str, Json] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            flat |= _scalars(value, f"{prefix}{key}.")
        elif not isinstance(value, (list, tuple)):
            flat[f"{prefix}{key}"] = value
    return flat


class _Run:
    def __init__(self, run: Any, table: Any) -> None:
        self._run, self._table = run, table

    def log(self, metrics: Mapping[str, float | int]) -> None:
        row = dict(metrics)
        if "step" in row:
            row["train/global_step"] = row.pop("step")
        self._run.log(row)

    def table(self, name: str, columns: Sequence[str], rows: Sequence[Sequence[Json]]) -> None:
        self._run.log({name: self._table(columns=list(columns), data=[list(row) for row in rows])})

    def finish(self, status: Status, final: Mapping[str, float | int]) -> None:
        for name, value in final.items():
            self._run.summary[f"{_FINAL}/{name}"] = value
        self._run.summary["status"] = status
        # A diverged, pruned or interrupted run has ended as it should; only a failed one is shown as crashed.
        self._run.finish(exit_code=1 if status == "failed" else 0)
