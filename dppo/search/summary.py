"""A study for those who look at it from outside: a record in its directory, and plain tables for trackers."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from dppo.artifacts.files import disk_errors, write_atomic
from dppo.data.ids import content_hash
from dppo.evaluation.comparison import Line
from dppo.evaluation.win_rates import Interval
from dppo.search.overview import Overview, TrialLine
from dppo.search.report import Report
from dppo.search.study import Study
from dppo.tracking import StudyInfo, Table
from dppo.types import Json

RECORD = "study.json"
_WHERE = ("project", "entity", "group")


def write_record(study: Study, objectives: Sequence[str], tracking: Mapping[str, Any]) -> None:
    """Write ``study.json``: the name, what is searched (``log``: in its logarithm), and where trials are tracked."""
    record = {
        "name": study.settings.study_name,
        "parameters": [
            {"name": one.name, "kind": one.kind, "log": one.log, "range": one.describe()}
            for one in study.space.parameters
        ],
        "objectives": list(objectives),
        "directions": list(study.settings.direction),
        # Not all of it: a tracker of the user's own may be given a secret.
        "tracking": {key: tracking[key] for key in _WHERE if key in tracking},
    }
    path = study.directory / RECORD
    with disk_errors(path):
        write_atomic(path, json.dumps(record, indent=2).encode() + b"\n")


def study_info(study: Study, report: Report) -> StudyInfo:
    """The study with its tables: trials, baselines, the best or the Pareto front, importances, results."""
    found, settings = report.overview, study.settings
    winners = [one for one in found.trials if one.number in found.winners]
    several = len(found.objectives) > 1
    tables = {"trials": _trials(found, found.trials)}
    if winners:
        tables["pareto_front" if several else "best_trials"] = _trials(found, winners)
    if found.baselines:
        tables["baselines"] = _baselines(found)
    if report.importances:
        rows = [(path, name, share) for path, own in report.importances.items() for name, share in own.items()]
        tables["importances"] = Table(("objective", "parameter", "importance"), tuple(rows))
    if report.results:
        tables["results"] = _results(report.metric, report.results)
    final: dict[str, float | int] = {"n_trials": len(found.trials)}
    final |= {f"n_{state}": count for state, count in Counter(one.state for one in found.trials).items()}
    if len(winners) == 1 and winners[0].objectives is not None:
        final["best.trial"] = winners[0].number
        for path, one in zip(found.objectives, winners[0].objectives, strict=True):
            bounds = zip(("", ".ci_low", ".ci_high"), (one.value, one.low, one.high), strict=True)
            final |= {f"best.{path}{end}": value for end, value in bounds if math.isfinite(value)}
    for line in report.results:
        final[f"result.{line.label}.{report.metric}"] = line.value.value
    yaml = study.directory / "best.yaml"
    return StudyInfo(
        id=f"study-{content_hash([str(study.directory.resolve()), settings.study_name])[:16]}",
        name=settings.study_name,
        directory=study.directory,
        tags=("study",),
        config={
            "space": study.space.description(),
            "objectives": list(found.objectives),
            "direction": list(found.directions),
            "n_trials": study.total,
            "replicates": settings.replicates,
            "test_seeds": settings.test_seeds,
            "constraints": list(settings.constraints),
            "sampler": _plain(settings.sampler),
            "pruner": _plain(settings.pruner),
            "fixed": list(study.fixed),
            "best": [{"trial": one.number, **one.values, "command": one.command} for one in winners],
        },
        tables=tables,
        files={yaml.name: yaml.read_text("utf-8")} if winners and not several and yaml.exists() else {},
        final=final,
        status="complete" if study.is_done() else "interrupted",
    )


def _trials(found: Overview, trials: Sequence[TrialLine]) -> Table:
    names = [one.name for one in found.parameters]
    rows = []
    for one in trials:
        seconds = (one.ended - one.begun).total_seconds() if one.ended is not None else None
        interim = one.interim[max(one.interim)] if one.interim else None
        rows.append(
            (
                one.number,
                *(one.values.get(name) for name in names),
                *_values(found, one.objectives),
                one.state,
                one.feasible,
                interim,
                seconds,
                " ".join(map(str, one.seeds)),
                one.note,
                one.command,
            )
        )
    columns = ("trial", *names, *_columns(found), "state", "feasible", "last interim", "seconds", "seeds", "note")
    return Table((*columns, "command"), tuple(rows))


def _baselines(found: Overview) -> Table:
    rows = [
        (one.name, *_values(found, one.objectives), " ".join(map(str, one.seeds)), one.note, one.command)
        for one in found.baselines
    ]
    return Table(("baseline", *_columns(found), "seeds", "note", "command"), tuple(rows))


def _columns(found: Overview) -> list[str]:
    return [f"{path}{end}" for path in found.objectives for end in ("", " low", " high")]


def _values(found: Overview, objectives: Sequence[Interval] | None) -> Sequence[Json]:
    if objectives is None:
        return [None] * 3 * len(found.objectives)
    return [_finite(value) for one in objectives for value in (one.value, one.low, one.high)]


def _results(metric: str, lines: Sequence[Line]) -> Table:
    columns = ("configuration", "seeds", "n", metric, "low", "high", "difference", "difference low", "difference high")
    rows = []
    for line in lines:
        bounds = line.difference
        difference = (None, None, None) if bounds is None else (bounds.value, bounds.low, bounds.high)
        value = (line.value.value, line.value.low, line.value.high)
        rows.append((line.label, len(line.seeds), line.n, *map(_finite, value), *difference, line.p))
    return Table((*columns, "p"), tuple(rows))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _plain(value: Any) -> Json:
    """Settings as Hydra gives them, in JSON types."""
    plain: Json = json.loads(json.dumps(value, default=str))
    return plain
