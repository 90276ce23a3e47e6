"""What a search leaves: tables, the best trial or the Pareto front, how far to trust them, and their files."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from dppo.artifacts.files import disk_errors, write_atomic
from dppo.command_line import aligned
from dppo.errors import UserError
from dppo.evaluation.comparison import Configuration, Line, compare_runs, shown_interval, shown_p
from dppo.evaluation.runs import find_runs
from dppo.evaluation.win_rates import Interval
from dppo.results import command_line
from dppo.search import trust
from dppo.search.measured import measured
from dppo.search.overview import BaselineLine, Overview, TrialLine
from dppo.search.study import ABANDONED, COMMAND, ERROR, INDEX, INTERVALS, OWNER, SEEDS, WHY, Study, folder
from dppo.search.winners import best, feasible, name_of, shown_winners, state

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# PED-ANOVA compares the best tenth with the rest: fewer trials say nothing.
_ENOUGH = 20
_METRICS = {"reward.policy": "reward", "reward.delta": "reward_gain", "held_out.accuracy": "accuracy"}


# --- the study as plain values ---------------------------------------------------------------------------------------


def overview(study: Study, objectives: Sequence[str]) -> Overview:
    """The study as the tables and plots see it."""
    return Overview(
        name=study.settings.study_name,
        parameters=study.space.parameters,
        objectives=tuple(objectives),
        directions=study.settings.direction,
        trials=tuple(_trial_line(trial) for trial in study.trials()),
        baselines=tuple(_baselines(study, objectives)),
        winners=tuple(trial.number for trial in best(study)),
    )


def _trial_line(trial: FrozenTrial) -> TrialLine:
    assert trial.datetime_start is not None
    owner = trial.user_attrs[OWNER]
    values = trial.values if state(trial) in ("complete", "diverged") else None
    bounds = trial.user_attrs.get(INTERVALS) or [[value, math.nan, math.nan] for value in values or ()]
    return TrialLine(
        number=trial.number,
        index=int(trial.user_attrs[INDEX]),
        values=dict(trial.params),
        state=state(trial),
        objectives=tuple(Interval(*own) for own in bounds) if values is not None else None,
        interim=dict(trial.intermediate_values),
        seeds=tuple(int(seed) for seed in trial.user_attrs.get(SEEDS, {})),
        begun=trial.datetime_start,
        ended=trial.datetime_complete,
        worker=f"{owner['host']} {owner['pid']}",
        command=str(trial.user_attrs[COMMAND]),
        note=str(trial.user_attrs.get(ERROR, trial.user_attrs.get(WHY, ""))),
        feasible=feasible(trial),
    )


def _baselines(study: Study, objectives: Sequence[str]) -> list[BaselineLine]:
    lines = []
    names = {folder(text): text for text in study.settings.baselines}
    for name, runs in study.side_runs_of("baselines").items():
        done = {seed: run for seed, run in runs.items() if run["state"] == "complete"}
        places = [study.directory / "baselines" / name / f"seed={seed}" for seed in done]
        found = None
        if done:
            found = tuple(
                measured(places, path, [run["values"][at] for run in done.values()])
                for at, path in enumerate(objectives)
            )
        notes = [str(run.get("reason", run["state"])) for run in runs.values() if run["state"] != "complete"]
        first = next(iter(runs.values()))
        lines.append(
            BaselineLine(names.get(name, name), found, tuple(done), command_line(first["words"]), "; ".join(notes))
        )
    return lines


@dataclass(frozen=True)
class Report:
    """What a study has come to: the lines to be printed, and the numbers behind them.

    ``importances`` are shares by parameter, for every objective that has any; ``results`` are the comparison on fresh
    seeds, of ``metric``, the first one its baseline.
    """

    lines: list[str]
    overview: Overview
    importances: Mapping[str, Mapping[str, float]]
    metric: str
    results: Sequence[Line]


# --- what is printed and written -------------------------------------------------------------------------------------


def write(study: Study, objectives: Sequence[str]) -> Report:
    """Write the files of a study and return what is to be printed.

    ``trials.csv``; ``best.yaml``, or ``pareto.csv`` for several objectives; ``results.csv`` once there are results;
    ``summary.txt``, most of what is printed; ``plots/``.
    """
    found = overview(study, objectives)
    trials, winners = study.trials(), best(study)
    lines = ["", *aligned(_table(found))]
    lines += [f"trial {one.number} {one.state}: {one.note}" for one in found.trials if one.note]
    lines += [f"baseline {one.name}: {one.note}" for one in found.baselines if one.note]
    numbers = {trial.user_attrs[INDEX]: trial.number for trial in trials}
    for trial in study.study.get_trials(deepcopy=False):
        if ABANDONED in trial.user_attrs and trial.user_attrs[INDEX] in numbers:
            lines.append(f"trial {trial.number} was abandoned and run again as {numbers[trial.user_attrs[INDEX]]}")
    _csv(study.directory / "trials.csv", found, found.trials, found.baselines)
    importances = _importances(study, found) if winners else {}
    if winners:
        lines += _winners(study, found, winners)
        lines += _told_importances(study, found, importances)
    else:
        lines.append(
            "no trial was completed" if not any(one.objectives for one in found.trials) else "no trial may win"
        )
    lines += trust.foretold(found)
    lines += trust.noise(study, found)
    metric, results, told = _results(study, objectives)
    lines += told
    _write(study.directory / "summary.txt", "\n".join(lines[1:]) + "\n")
    lines += [*_plots(study, found), f"files {study.directory}"]
    return Report(lines, found, importances, metric, results)


def _table(found: Overview) -> list[list[str]]:
    rows = [["trial", *(one.name for one in found.parameters), *found.objectives, "state"]]
    for one in found.baselines:
        values = [_shown(value) for value in one.objectives] if one.objectives else [""] * len(found.objectives)
        rows.append([one.name, *("" for _ in found.parameters), *values, "baseline"])
    for trial in found.trials:
        values = [_shown(value) for value in trial.objectives] if trial.objectives else [""] * len(found.objectives)
        ended = trial.state if trial.feasible or trial.state != "complete" else "violates a constraint"
        if trial.state == "pruned" and trial.interim:
            ended = f"pruned at {max(trial.interim)} % ({trial.interim[max(trial.interim)]:.3f})"
        rows.append([str(trial.number), *_words(found, trial), *values, ended])
    return rows


def _words(found: Overview, trial: TrialLine) -> list[str]:
    return [
        one.word(trial.values[one.name]).partition("=")[2] if one.name in trial.values else ""
        for one in found.parameters
    ]


def _shown(one: Interval) -> str:
    bounds = "" if math.isnan(one.low) else f" [{one.low:.4g}, {one.high:.4g}]"
    return f"{one.value:.6g}{bounds}"


def _csv(path: Path, found: Overview, trials: Sequence[TrialLine], baselines: Sequence[BaselineLine]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    columns = [column for name in found.objectives for column in (name, f"{name} low", f"{name} high")]
    names = [one.name for one in found.parameters]
    table.writerow(["trial", *names, *columns, "state", "feasible", "interim", "seconds", "seeds", "command"])
    none = [""] * len(columns)
    for base in baselines:
        values = [_plain(part) for one in base.objectives for part in _parts(one)] if base.objectives else none
        seeds = " ".join(map(str, base.seeds))
        table.writerow([base.name, *("" for _ in names), *values, "baseline", "", "", "", seeds, base.command])
    for one in trials:
        values = [_plain(part) for each in one.objectives for part in _parts(each)] if one.objectives else none
        interim = " ".join(f"{percent}%:{value:.6g}" for percent, value in sorted(one.interim.items()))
        seconds = f"{(one.ended - one.begun).total_seconds():.1f}" if one.ended is not None else ""
        seeds = " ".join(map(str, one.seeds))
        row = [str(one.number), *_words(found, one), *values, one.state, str(one.feasible).lower()]
        table.writerow([*row, interim, seconds, seeds, one.command])
    _write(path, text.getvalue())


def _parts(one: Interval) -> tuple[float, float, float]:
    return one.value, one.low, one.high


def _plain(value: float) -> str:
    return "" if math.isnan(value) else f"{value:.6g}"


def _write(path: Path, text: str) -> None:
    with disk_errors(path):
        write_atomic(path, text.encode())


def _winners(study: Study, found: Overview, winners: Sequence[FrozenTrial]) -> list[str]:
    lines: list[str] = []
    several = len(found.objectives) > 1
    shown = {one.number: one for one in found.trials}
    if several:
        _csv(study.directory / "pareto.csv", found, [shown[trial.number] for trial in winners], ())
        lines.append(f"Pareto front: {len(winners)} of {len(found.trials)} trials")
    else:
        first = max(winners, key=lambda trial: trial.values[0] * (1 if found.directions[0] == "maximize" else -1))
        _best_yaml(study, first)
    for trial in winners:
        objectives = shown[trial.number].objectives or ()
        values = ", ".join(f"{path} {_shown(one)}" for path, one in zip(found.objectives, objectives, strict=True))
        title = f"  {name_of(study, trial)}" if several else name_of(study, trial)
        lines += [f"{title}: {values}", f"  {trial.user_attrs[COMMAND]}"]
        lines += _boundaries(study, trial) if not several else []
    return lines


def _best_yaml(study: Study, winner: FrozenTrial) -> None:
    place = study.directory / str(winner.number)
    config = next(path for path in (place / "config.yaml", *sorted(place.glob("seed=*/config.yaml"))) if path.exists())
    text = f"# trial {winner.number}: {winner.user_attrs[COMMAND]}\n{config.read_text('utf-8')}"
    _write(study.directory / "best.yaml", text)


def _boundaries(study: Study, winner: FrozenTrial) -> list[str]:
    lines = []
    for one in study.space.parameters:
        if one.name in winner.params and (end := one.end_near(winner.params[one.name])):
            value = one.word(winner.params[one.name])
            lines.append(f"  {value} lies at the {end} end of {one.describe()}: the best may lie beyond")
    return lines


def _importances(study: Study, found: Overview) -> dict[str, dict[str, float]]:
    """Shares of the parameters in being among the best tenth, by objective; none where there are too few trials."""
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    if len(study.space.parameters) < 2 or _n_complete(study) < _ENOUGH:
        return {}
    shares: dict[str, dict[str, float]] = {}
    for at, path in enumerate(found.objectives):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                shares[path] = get_param_importances(
                    study.study,
                    evaluator=PedAnovaImportanceEvaluator(),
                    target=lambda trial, at=at: trial.values[at],  # type: ignore[misc]
                )
            except (ValueError, RuntimeError):  # too few trials with the same parameters
                continue
    return shares


def _n_complete(study: Study) -> int:
    return sum(state(trial) == "complete" for trial in study.trials())


def _told_importances(study: Study, found: Overview, importances: Mapping[str, Mapping[str, float]]) -> list[str]:
    lines = []
    for path, shares in importances.items():
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        of = f" of {path}" if len(found.objectives) > 1 else ""
        n_trials = _n_complete(study)
        lines.append(f"importance for being among the best tenth{of} (PED-ANOVA, {n_trials} trials): {told}")
    return lines


def _results(study: Study, objectives: Sequence[str]) -> tuple[str, list[Line], list[str]]:
    """The best and the baselines on fresh seeds and test prompts: the metric, their comparison, and what is printed."""
    metric = next((name for path, name in _METRICS.items() if objectives[0].startswith(path)), "win_rate")
    names = {folder(text): text for text in study.settings.baselines}
    shown = {**names, **{folder(name): name for name in (name_of(study, trial) for trial in shown_winners(study))}}
    # A study that went on may have results of a trial that was the best before.
    groups = {name: runs for name, runs in study.side_runs_of("results").items() if name in shown}
    found: list[Configuration] = []
    notes = []
    for name, runs in groups.items():
        title = shown[name]
        done = [seed for seed, run in runs.items() if run["state"] in ("complete", "diverged")]
        notes += [f"result {title}: {run['reason']}" for run in runs.values() if run["state"] == "failed"]
        if done:
            places = [study.directory / "results" / name / f"seed={seed}" for seed in done]
            found.append(Configuration({run.seed: run for run in find_runs(places)}, title))
    if not found:
        return metric, [], notes
    order = [one for one in found if one.label in names.values()] + [
        one for one in found if one.label not in names.values()
    ]
    try:
        lines = compare_runs(order, metric=metric, baseline=order[0].label, n_bootstrap=10_000, seed=0)
    except UserError as error:
        return metric, [], [*notes, f"no result: {error}"]
    rows = [["configuration", "seeds", metric, f"difference to {lines[0].label}", "p"]]
    for line in lines:
        seeds = f"{len(line.seeds)}" + (f", {len(line.diverged)} diverged" if line.diverged else "")
        other = "" if line.difference is None else shown_interval(line.difference, sign="+")
        rows.append([line.label, seeds, shown_interval(line.value), other, shown_p(line.p)])
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    _write(study.directory / "results.csv", text.getvalue())
    told = [
        "",
        f"result: fresh seeds, {lines[0].n} test prompts, none of them used to choose "
        "(paired differences, simultaneous 95 % intervals, Holm's p)",
        *aligned(rows),
        *notes,
    ]
    return metric, lines, told


def _plots(study: Study, found: Overview) -> list[str]:
    from dppo.search.plots import draw

    drawn = draw(found, study.directory)
    names = sorted({path.stem for path in drawn})
    return [f"plots {study.directory / 'plots'}: {', '.join(names)}"] if names else []
