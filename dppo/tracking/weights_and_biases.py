"""Weights & Biases. Only here, in ``uploads`` and in ``workspace`` is wandb imported."""

from __future__ import annotations

import itertools
import json
import logging
import math
import os
import re
import shutil
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dppo.artifacts.files import write_atomic
from dppo.artifacts.locks import hold, try_hold
from dppo.config import require
from dppo.dotted import leaves
from dppo.tracking import STEP, RunInfo, StageInfo, Status, StudyInfo, Table, Tracker
from dppo.tracking.guard import guarded, start

if TYPE_CHECKING:
    from dppo.types import Json

_log = logging.getLogger("dppo.tracking")
Mode = Literal["offline", "online"]
# Final scalars and their intervals are never plotted against steps.
_FINAL = "final"
# In a run's wandb folder: where the sessions of the shared stages lie that it links to.
STAGES = "stages.json"
# What W&B takes: longer ones are refused, offline when the run is uploaded.
_LONGEST_NAME, _LONGEST_TAG = 128, 64
# After a failed attempt the later runs of this process do not wait for the server again for so long.
_PATIENCE = 600.0
# Offline there is nothing to wait for but the disk.
_CLOSING = 60.0
# A diverged or pruned run has ended as it should; 255 is W&B's own code for Ctrl-C.
_EXIT_CODES: Mapping[str, int] = {"failed": 1, "interrupted": 255}
_refused: list[tuple[float, str]] = []


@dataclass(frozen=True)
class WeightsAndBiases:
    """Mirror a run to W&B; ``mode: offline`` writes beside the run's files and needs no account.

    ``mode: online`` without a login or a network says so in one line and goes on offline.
    ``init_timeout_seconds`` bounds the wait for the server at the start, ``finish_timeout_seconds`` the upload at the
    end.
    """

    project: str
    entity: str | None
    group: str | None
    mode: Mode
    init_timeout_seconds: float
    finish_timeout_seconds: float

    def __post_init__(self) -> None:
        for key, name in (("project", self.project), ("entity", self.entity)):
            # W&B takes no other names, and these name a directory of the cache too.
            plain = name is None or re.fullmatch(r"(?!\.)[^/\\#?%:\x00-\x1f]{1,128}", name) is not None
            rule = (
                "must be a name of at most 128 characters that does not begin with a dot and has none of / \\ # ? % :"
            )
            require(plain, key, name or "''", rule)
        for key in ("init_timeout_seconds", "finish_timeout_seconds"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be > 0 seconds")

    def start(self, run: RunInfo) -> Tracker:
        return start("tracking=wandb", run, self._start)

    def _start(self, run: RunInfo) -> Tracker:
        session = self._open(
            run.directory,
            id=run.id,
            name=run.name,
            group=self.group or run.group,
            job_type=run.job_type,
            tags=run.tags,
            config={**run.config, "hp": _scalars(run.config)},
        )
        session.by_step()
        return _Run(self, session)

    def study(self, study: StudyInfo) -> None:
        guarded("tracking=wandb", f"study {study.name} has no summary there", lambda: self._study(study))

    def _study(self, study: StudyInfo) -> None:
        # Several sweepers may end one study at the same time.
        with hold(study.directory / ".tracking.lock", f"the summary of study {study.name}"):
            self._summarise(study)

    def _summarise(self, study: StudyInfo) -> None:
        session = self._open(
            study.directory,
            id=study.id,
            name=f"study {study.name}",
            group=self.group or study.name,
            job_type="study",
            tags=study.tags,
            config={**study.config, "files": dict(study.files)},
        )
        try:
            for name, table in study.tables.items():
                session.table(name, table)
        finally:
            session.close(study.status, study.final)

    # --- sessions ----------------------------------------------------------------------------------------------------

    def _open(self, directory: Path, *, id: str, mode: Mode | None = None, **told: Any) -> _Session:
        """Open a session of the run ``id``, online if that is wanted and possible; ``mode`` decides it beforehand."""
        # W&B's reports about itself go over the network offline as well, and a server that never answers holds up
        # the end of a run.
        os.environ.setdefault("WANDB_ERROR_REPORTING", "false")
        directory = directory.resolve()
        directory.mkdir(parents=True, exist_ok=True)
        # Everything W&B writes stays in the run directory.
        for variable, folder in (
            ("WANDB_CACHE_DIR", "cache"),
            ("WANDB_CONFIG_DIR", "config"),
            ("WANDB_DATA_DIR", "data"),
        ):
            os.environ.setdefault(variable, str(directory / "wandb" / folder))
        with ExitStack() as stack:
            if not stack.enter_context(try_hold(lock_of(directory / "wandb", id))):
                raise RuntimeError(f"another process writes the run {id} in {directory}")
            session = self._begin(directory, id, mode, told)
            session.held = stack.pop_all()
        return session

    def _begin(self, directory: Path, id: str, mode: Mode | None, told: dict[str, Any]) -> _Session:
        import wandb  # noqa: TID251 - this is the one place

        before = set((directory / "wandb").glob(f"*run-*-{id}"))
        told["name"] = told["name"][:_LONGEST_NAME]
        told["tags"] = [tag[:_LONGEST_TAG] for tag in told["tags"]]

        def init(mode: Mode) -> Any:
            # The process's own settings, not only the run's: without them W&B asks for a key in a terminal.
            wandb.setup(wandb.Settings(silent=True))
            settings = wandb.Settings(
                silent=True,
                console="off",
                init_timeout=self.init_timeout_seconds,
                finish_timeout=self.finish_timeout_seconds,
                finish_timeout_raises=True,
                disable_git=True,
                save_code=False,
            )
            return wandb.init(
                mode=mode,
                settings=settings,
                project=self.project,
                entity=self.entity,
                dir=str(directory),
                id=id,
                resume="allow" if mode == "online" else None,
                reinit="create_new",
                **told,
            )

        wanted: Mode = mode or self.mode
        if mode is None and wanted == "online" and _refused and time.monotonic() - _refused[-1][0] < _PATIENCE:
            self._say_offline(_refused[-1][1])
            wanted = "offline"
        try:
            opened = init(wanted)
        except (wandb.errors.Error, TimeoutError) as error:
            if wanted == "offline" or mode == "online":
                raise
            reason = (str(error).strip().splitlines() or ["no answer"])[0]
            _refused.append((time.monotonic(), reason))
            self._say_offline(reason)
            # W&B's service keeps the id of the failed attempt for itself, and its folder holds nothing.
            wandb.teardown()
            for leftover in set((directory / "wandb").glob(f"run-*-{id}")) - before:
                shutil.rmtree(leftover, ignore_errors=True)
            wanted = "offline"
            opened = init("offline")
        except Exception:
            _give_up(wandb)
            raise
        seconds = self.finish_timeout_seconds if wanted == "online" else _CLOSING
        older = [path for path in before if path.name.startswith("offline-")]
        return _Session(opened, wandb, wanted, directory, older, seconds)

    def _say_offline(self, reason: str) -> None:
        _log.warning("warning: tracking.mode=online: W&B can't be used (%s); this run is tracked offline", reason)

    # --- shared stages -----------------------------------------------------------------------------------------------

    def log_stage(self, stage: StageInfo, mode: Mode) -> Path:
        """Log a shared stage unless that was done for this project; returns the directory of its session.

        Of several processes one does it, and the others do not wait. Whoever dies here leaves no mark, so that the
        next one does it again.
        """
        place = stage.home / "wandb" / "-".join(filter(None, (self.entity, self.project))) / stage.id
        with try_hold(place.with_suffix(".lock")) as mine:
            if mine and not _is_logged(place, mode):
                self._log_stage(stage, place, mode)
        return place

    def _log_stage(self, stage: StageInfo, place: Path, mode: Mode) -> None:
        session = self._open(
            place,
            mode=mode,
            id=stage.id,
            name=f"{stage.title} {stage.fingerprint[:8]}",
            group="shared stages",
            job_type=stage.stage,
            tags=[stage.title],
            config=stage.config,
        )
        status: Status = "failed"
        try:
            session.by_step()
            for row in stage.metrics:
                session.row(row)
            status = "complete"
        finally:
            session.close(status, stage.final)
        write_atomic(place / "logged.json", json.dumps({"id": stage.id, "mode": mode, "url": session.url}).encode())


def plottable(name: str) -> str:
    """A final scalar under the only kind of name that W&B promises to sort, filter and plot by."""
    return re.sub(r"\W", "_", name)


def lock_of(place: Path, id: str) -> Path:
    """What the process that writes a session of the run ``id`` holds; ``place`` is the wandb folder it lies in."""
    return place / f".{id}.lock"


def _is_logged(place: Path, mode: Mode) -> bool:
    """Whether a stage was logged for this project; online also: uploaded."""
    try:
        known = json.loads((place / "logged.json").read_text("utf-8"))["mode"]
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return mode == "offline" or known == "online" or any(place.glob("wandb/offline-run-*/*.wandb.synced"))


def _url(place: Path) -> str | None:
    try:
        found = json.loads((place / "logged.json").read_text("utf-8"))["url"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return str(found) if found else None


def _scalars(config: Mapping[str, Json]) -> dict[str, Json]:
    """Every scalar of the config by its dotted name: what W&B can group and filter by."""
    return {name: value for name, value in leaves(config).items() if not isinstance(value, (list, tuple, Mapping))}


@dataclass
class _Session:
    """One session of a W&B run. Rows of one step are sent together, once the next step has come."""

    run: Any
    wandb: Any
    mode: Mode
    directory: Path
    older: Sequence[Path]
    closing_seconds: float
    pending: dict[str, float | int] = field(default_factory=dict)
    sent: float = -math.inf  # the last step that the server has from an earlier session
    held: ExitStack = field(default_factory=ExitStack)  # the lock that says that this session is being written

    def by_step(self) -> None:
        """Plot everything but the final scalars against optimiser steps; go on behind what an earlier session sent."""
        self.run.define_metric(STEP)
        for group in ("train/*", "eval/*", "interim/*"):
            self.run.define_metric(group, step_metric=STEP)
        if self.run.resumed:
            self.sent = float(self.run.summary.get(STEP, -math.inf))

    @property
    def url(self) -> str | None:
        return str(self.run.url) if self.mode == "online" and self.run.url else None

    def row(self, metrics: Mapping[str, float | int]) -> None:
        row = {STEP if name == "step" else name: value for name, value in metrics.items()}
        if any(self.pending.get(name, value) != value for name, value in row.items()):
            self.flush()
        self.pending |= row

    def flush(self) -> None:
        row, self.pending = self.pending, {}
        if row and not row.get(STEP, math.inf) <= self.sent:
            self.run.log(row)

    def table(self, name: str, table: Table) -> None:
        self.flush()
        rows = [list(row) for row in table.rows]
        logged = self.wandb.Table(columns=list(table.columns), data=rows, allow_mixed_types=True)
        # Other than rows, tables make W&B ask the server, and wait for what it says.
        bounded(lambda: self.run.log({name: logged}), self.closing_seconds)

    def histograms(self, edges: Sequence[float], counts: Mapping[str, Sequence[int]]) -> None:
        self.flush()
        self.run.log(
            {
                f"histogram/{name}": self.wandb.Histogram(np_histogram=(list(values), list(edges)))
                for name, values in counts.items()
            }
        )

    def close(self, status: Status, final: Mapping[str, float | int]) -> None:
        """Write the final scalars and finish; raises TimeoutError if that takes longer than it may."""

        def finish() -> None:
            self.flush()
            for name, value in final.items():
                self.run.summary[f"{_FINAL}/{name}"] = value
                self.run.summary[plottable(name)] = value
            self.run.summary["status"] = status
            if status not in ("complete", "failed"):
                self.run.tags = (*(self.run.tags or ()), status)
            self.run.finish(exit_code=_EXIT_CODES.get(status, 0))

        # W&B bounds the upload itself; a service that is gone would be waited for without an end.
        with self.held:
            try:
                bounded(finish, self.closing_seconds + 10)
            except Exception:
                _give_up(self.wandb)
                raise
        if status in ("complete", "diverged", "pruned"):
            # This session holds the run from its first row: an earlier one of the same run has nothing more.
            for path in self.older:
                if not any(path.glob("*.wandb.synced")):
                    shutil.rmtree(path, ignore_errors=True)


def _give_up(wandb: Any) -> None:
    """Leave a service that fails, so that later runs get a new one, and the end of the process does not wait for it."""
    with suppress(Exception):
        bounded(wandb.teardown, _CLOSING)


def bounded(call: Callable[[], None], seconds: float) -> None:
    """Make a call in a thread that is not waited for longer; raises what it raised, or TimeoutError."""
    raised: list[BaseException] = []

    def run() -> None:
        try:
            call()
        except BaseException as error:
            raised.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        raise TimeoutError(f"no answer within {seconds:.0f} seconds")
    if raised:
        raise raised[0]


class _Run:
    """An experiment's run."""

    def __init__(self, settings: WeightsAndBiases, session: _Session) -> None:
        self._settings, self._session = settings, session
        self._stages: dict[str, StageInfo] = {}
        self._places: dict[str, Path] = {}

    def log(self, metrics: Mapping[str, float | int]) -> None:
        self._session.row(metrics)

    def stage(self, stage: StageInfo) -> None:
        names = itertools.chain([stage.title], (f"{stage.title}_{number}" for number in itertools.count(2)))
        # A later phase may have a y_gen of its own.
        title = next(name for name in names if self._stages.get(name, stage).id == stage.id)
        if title in self._stages:
            return
        self._stages[title] = stage
        session = self._session
        session.run.config.update(
            {"stages": {name: one.id for name, one in self._stages.items()}}, allow_val_change=True
        )

        def log() -> None:
            self._places[title] = self._settings.log_stage(stage, session.mode).resolve()

        if not guarded("tracking=wandb", f"{title} is not logged by this run", log):
            return
        if session.mode == "online":
            links = [f"[{name}]({url})" for name, place in self._places.items() if (url := _url(place))]
            session.run.notes = " ".join(["shared stages:", *links]) if links else None
        else:
            places = {name: str(place) for name, place in self._places.items()}
            write_atomic(session.directory / "wandb" / STAGES, json.dumps(places, indent=2).encode() + b"\n")

    def table(self, name: str, table: Table) -> None:
        self._session.table(name, table)

    def histograms(self, edges: Sequence[float], counts: Mapping[str, Sequence[int]]) -> None:
        self._session.histograms(edges, counts)

    def finish(self, status: Status, final: Mapping[str, float | int]) -> None:
        self._session.close(status, final)
