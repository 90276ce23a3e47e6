"""What a search leaves: a table, the best trial or the Pareto front, and the files of both."""

from __future__ import annotations

import csv
import io
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dppo.artifacts.files import disk_errors, write_atomic
from dppo.command_line import aligned
from dppo.search.study import ABANDONED, COMMAND, ERROR, INDEX, STATUS, Study

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# PED-ANOVA compares the best tenth with the rest: fewer trials say nothing.
_ENOUGH = 20


def state(trial: FrozenTrial) -> str:
    """How a trial ended, in one word."""
    if STATUS in trial.user_attrs:
        return str(trial.user_attrs[STATUS])
    return {"FAIL": "failed", "RUNNING": "running"}.get(trial.state.name, trial.state.name.lower())


def best(study: Study) -> list[FrozenTrial]:
    """The best trials: the first of equals for one objective, the Pareto front for several; diverged ones never."""
    done = [trial for trial in study.trials() if state(trial) == "complete" and trial.values is not None]
    signs = [1.0 if direction == "maximize" else -1.0 for direction in study.settings.direction]
    scored = [(trial, [sign * value for sign, value in zip(signs, trial.values, strict=True)]) for trial in done]
    front = [
        trial
        for trial, own in scored
        if not any(other != own and all(a >= b for a, b in zip(other, own, strict=True)) for _, other in scored)
    ]
    return front if len(signs) > 1 else front[:1]


def write(study: Study, objectives: Sequence[str]) -> list[str]:
    """Write ``trials.csv`` and ``best.yaml``, with several objectives ``pareto.csv``; returns what is to be printed."""
    trials = study.trials()
    winners = best(study)
    header = ["trial", *study.space.names(), *objectives, "state"]
    rows = {trial.number: _row(study, trial, len(objectives)) for trial in trials}
    lines = ["", *aligned([header, *rows.values()])]
    for trial in trials:
        if ERROR in trial.user_attrs:
            lines.append(f"trial {trial.number} failed: {trial.user_attrs[ERROR]}")
    numbers = {trial.user_attrs[INDEX]: trial.number for trial in trials}
    for trial in study.study.get_trials(deepcopy=False):
        if ABANDONED in trial.user_attrs and trial.user_attrs[INDEX] in numbers:
            lines.append(f"trial {trial.number} was abandoned and run again as {numbers[trial.user_attrs[INDEX]]}")
    _csv(study.directory / "trials.csv", [*header, "command"], trials, rows)
    if not winners:
        return [*lines, "no trial was completed", f"files {study.directory}"]
    if len(objectives) > 1:
        _csv(study.directory / "pareto.csv", [*header, "command"], winners, rows)
        lines.append(f"Pareto front: {len(winners)} of {len(trials)} trials")
        lines += [
            f"  trial {trial.number}: {_values(objectives, trial)}\n    {trial.user_attrs[COMMAND]}"
            for trial in winners
        ]
    else:
        (winner,) = winners
        _best_yaml(study, winner)
        lines += [f"best: trial {winner.number}, {_values(objectives, winner)}", f"  {winner.user_attrs[COMMAND]}"]
        lines += _boundaries(study, winner)
        lines += _importances(study)
    return [*lines, f"files {study.directory}"]


def _row(study: Study, trial: FrozenTrial, n_objectives: int) -> list[str]:
    searched = [
        one.word(trial.params[one.name]).partition("=")[2] if one.name in trial.params else ""
        for one in study.space.parameters
    ]
    values = [f"{value:.6g}" for value in trial.values] if trial.values is not None else [""] * n_objectives
    return [str(trial.number), *searched, *values, state(trial)]


def _values(objectives: Sequence[str], trial: FrozenTrial) -> str:
    return ", ".join(f"{path} {value:.6g}" for path, value in zip(objectives, trial.values, strict=True))


def _csv(path: Path, header: Sequence[str], trials: Sequence[FrozenTrial], rows: dict[int, list[str]]) -> None:
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    table.writerow(header)
    table.writerows([*rows[trial.number], trial.user_attrs[COMMAND]] for trial in trials)
    with disk_errors(path):
        write_atomic(path, text.getvalue().encode())


def _best_yaml(study: Study, winner: FrozenTrial) -> None:
    config = study.directory / str(winner.number) / "config.yaml"
    path = study.directory / "best.yaml"
    with disk_errors(path):
        text = f"# trial {winner.number}: {winner.user_attrs[COMMAND]}\n{config.read_text('utf-8')}"
        write_atomic(path, text.encode())


def _boundaries(study: Study, winner: FrozenTrial) -> list[str]:
    lines = []
    for one in study.space.parameters:
        if one.name in winner.params and (end := one.end_near(winner.params[one.name])):
            value = one.word(winner.params[one.name])
            lines.append(f"  {value} lies at the {end} end of {one.describe()}: the best may lie beyond")
    return lines


def _importances(study: Study) -> list[str]:
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    complete = [trial for trial in study.trials() if state(trial) == "complete"]
    if len(study.space.parameters) < 2 or len(complete) < _ENOUGH:
        return []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = get_param_importances(study.study, evaluator=PedAnovaImportanceEvaluator())
    shares = ", ".join(f"{name} {share:.0%}" for name, share in found.items())
    return [f"importance of being among the best tenth (PED-ANOVA, {len(complete)} trials): {shares}"]
