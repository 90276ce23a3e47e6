"""What a search leaves: tables, the best trial or the Pareto front, how far to trust them, and their files."""

from __future__ import annotations

import csv
import io
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dppo.artifacts.files import disk_errors, write_atomic
from dppo.command_line import aligned
from dppo.errors import UserError
from dppo.evaluation.comparison import Configuration, compare_runs, find_runs
from dppo.evaluation.win_rates import Interval
from dppo.results import command_line
from dppo.search.measured import by_prompt, measured
from dppo.search.overview import BaselineLine, Overview, TrialLine
from dppo.search.samplers import Stratified
from dppo.search.study import ABANDONED, COMMAND, ERROR, INDEX, INTERVALS, OWNER, SEEDS, STATUS, WHY, Study, folder

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# PED-ANOVA compares the best tenth with the rest: fewer trials say nothing.
_ENOUGH = 20
# Of a Pareto front so many are scored on test prompts, spread over the first objective.
_MOST_RESULTS = 5
# The gain that a search should be able to see, and the factor of its variance for 80 % power at 5 %, two-sided.
_GAIN, _POWER = 0.02, (1.959964 + 0.841621) ** 2
_METRICS = {"reward.policy": "reward", "reward.delta": "reward_gain", "held_out.accuracy": "accuracy"}


# --- the study as plain values ---------------------------------------------------------------------------------------


def state(trial: FrozenTrial) -> str:
    """How a trial ended, in one word."""
    if STATUS in trial.user_attrs:
        return str(trial.user_attrs[STATUS])
    return {"FAIL": "failed", "RUNNING": "running"}.get(trial.state.name, trial.state.name.lower())


def feasible(trial: FrozenTrial) -> bool:
    """Whether a trial violates no constraint."""
    return all(amount <= 0 for amount in trial.constraints.values())


def best(study: Study) -> list[FrozenTrial]:
    """The best trials that violate no constraint and did not diverge.

    For one objective the first of equals, or, where choices are compared, that of each; for several the Pareto front.
    """
    done = [
        trial for trial in study.trials() if state(trial) == "complete" and trial.values is not None and feasible(trial)
    ]
    if isinstance(study.sampler, Stratified):
        groups: dict[str, list[FrozenTrial]] = {}
        for trial in done:
            groups.setdefault(str(study.sampler.stratum(trial)), []).append(trial)
        return [winner for group in groups.values() for winner in _front(study, group)]
    return _front(study, done)


def _front(study: Study, done: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    signs = [1.0 if direction == "maximize" else -1.0 for direction in study.settings.direction]
    scored = [(trial, [sign * value for sign, value in zip(signs, trial.values, strict=True)]) for trial in done]
    front = [
        trial
        for trial, own in scored
        if not any(other != own and all(a >= b for a, b in zip(other, own, strict=True)) for _, other in scored)
    ]
    return front if len(signs) > 1 else front[:1]


def shown_winners(study: Study) -> list[FrozenTrial]:
    """The best trials that are scored on test prompts: all, or some of a long Pareto front."""
    winners = best(study)
    if isinstance(study.sampler, Stratified) or len(winners) <= _MOST_RESULTS:
        return winners
    winners.sort(key=lambda trial: trial.values[0])
    places = np.linspace(0, len(winners) - 1, _MOST_RESULTS).round().astype(int)
    return [winners[place] for place in places]


def name_of(study: Study, trial: FrozenTrial) -> str:
    """What a winning trial is called beside the baselines."""
    if isinstance(study.sampler, Stratified):
        own = {one.name: one for one in study.space.parameters}
        chosen = (name for name in study.sampler.names if name in trial.params)
        return " ".join(["tuned", *(own[name].word(trial.params[name]) for name in chosen)])
    return "best" if len(study.settings.direction) == 1 else f"trial {trial.number}"


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
        objectives=tuple(Interval(*_three(value, own)) for value, own in zip(values, bounds, strict=True))
        if values is not None
        else None,
        interim=dict(trial.intermediate_values),
        seeds=tuple(int(seed) for seed in trial.user_attrs.get(SEEDS, {})),
        begun=trial.datetime_start,
        ended=trial.datetime_complete,
        worker=f"{owner['host']} {owner['pid']}",
        command=str(trial.user_attrs[COMMAND]),
        note=str(trial.user_attrs.get(ERROR, trial.user_attrs.get(WHY, ""))),
        feasible=feasible(trial),
    )


def _three(value: float, bounds: Sequence[float | None]) -> tuple[float, float, float]:
    """Mean, low and high; a diverged trial has the value alone."""
    found = [math.nan if bound is None else float(bound) for bound in bounds]
    return (found[0], found[1], found[2]) if len(found) == 3 else (value, math.nan, math.nan)


def _grouped(study: Study, part: str) -> dict[str, dict[int, dict[str, Any]]]:
    """The runs below ``part`` by configuration and seed."""
    found: dict[str, dict[int, dict[str, Any]]] = {}
    for key, run in study.side_runs().items():
        kind, name, seed = key.split("/")
        if kind == part:
            found.setdefault(name, {})[int(seed.removeprefix("seed="))] = run
    return found


def _baselines(study: Study, objectives: Sequence[str]) -> list[BaselineLine]:
    lines = []
    names = {folder(text): text for text in study.settings.baselines}
    for name, runs in _grouped(study, "baselines").items():
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


# --- what is printed and written -------------------------------------------------------------------------------------


def write(study: Study, objectives: Sequence[str]) -> list[str]:
    """Write the files of a study and return what is to be printed.

    ``trials.csv``; ``best.yaml``, or ``pareto.csv`` for several objectives; ``results.csv`` once there are results;
    ``plots/``.
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
    if winners:
        lines += _winners(study, found, winners)
    else:
        lines.append(
            "no trial was completed" if not any(one.objectives for one in found.trials) else "no trial may win"
        )
    lines += _foretold(found)
    lines += _noise(study, found)
    lines += _results(study, objectives)
    return [*lines, *_plots(study, found), f"files {study.directory}"]


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
        compared = isinstance(study.sampler, Stratified)
        title = "  trial" if several else f"best {name_of(study, trial)}: trial" if compared else "best: trial"
        lines += [f"{title} {trial.number}, {values}", f"  {trial.user_attrs[COMMAND]}"]
        lines += _boundaries(study, trial) if not several else []
    return lines + _importances(study, found)


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


def _importances(study: Study, found: Overview) -> list[str]:
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances

    complete = [trial for trial in study.trials() if state(trial) == "complete"]
    if len(study.space.parameters) < 2 or len(complete) < _ENOUGH:
        return []
    lines = []
    for at, path in enumerate(found.objectives):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                shares = get_param_importances(
                    study.study,
                    evaluator=PedAnovaImportanceEvaluator(),
                    target=lambda trial, at=at: trial.values[at],  # type: ignore[misc]
                )
            except (ValueError, RuntimeError):  # too few trials with the same parameters
                continue
        told = ", ".join(f"{name} {share:.0%}" for name, share in shares.items())
        of = f" of {path}" if len(found.objectives) > 1 else ""
        lines.append(f"importance for being among the best tenth{of} (PED-ANOVA, {len(complete)} trials): {told}")
    return lines


# --- how far to trust it ---------------------------------------------------------------------------------------------


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Spearman's rho of two rankings, ties shared, with Fisher's 95 % interval (NaN bounds below 4 pairs)."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    if min(float(own.std()) for own in ranks) == 0:
        return Interval(math.nan, math.nan, math.nan)
    rho = float(np.corrcoef(*ranks)[0, 1])
    if len(first) < 4 or abs(rho) >= 1:
        return Interval(rho, math.nan, math.nan)
    half = 1.96 * 1.03 / math.sqrt(len(first) - 3)  # the variance of a rank correlation is some 6 % larger
    return Interval(rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half))


def _ranks(values: Any) -> Any:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]


def _foretold(found: Overview) -> list[str]:
    """How well interim values rank the trials that were completed."""
    done = [one for one in found.trials if one.state == "complete" and one.objectives and one.interim]
    if len(done) < 3:
        return []
    parts = []
    for percent in sorted({percent for one in done for percent in one.interim}):
        both = [one for one in done if percent in one.interim]
        if len(both) < 3:
            continue
        rho = rank_correlation(
            [one.interim[percent] for one in both], [one.objectives[0].value for one in both if one.objectives]
        )
        if not math.isnan(rho.value):
            bounds = "" if math.isnan(rho.low) else f" [{rho.low:.2f}, {rho.high:.2f}]"
            parts.append(f"{rho.value:.2f}{bounds} at {percent} %")
    pruned = sum(one.state == "pruned" for one in found.trials)
    without = f"; the {pruned} pruned ones are not in it" if pruned else ""
    if not parts:
        return []
    return [f"interim and final ranking agree (Spearman, {len(done)} complete trials{without}): {', '.join(parts)}"]


def _noise(study: Study, found: Overview) -> list[str]:
    """How much seeds alone move the objective, and what it takes to see a small gain."""
    if found.objectives[0] not in ("objective", "win_rate.value"):
        return []
    by_seed = [list(trial.user_attrs.get(SEEDS, {}).values()) for trial in study.trials() if state(trial) == "complete"]
    groups = [[values[0] for values in seeds] for seeds in by_seed]
    for part in ("baselines", "results"):
        for runs in _grouped(study, part).values():
            groups.append([run["values"][0] for run in runs.values() if run["state"] == "complete"])
    groups = [values for values in groups if len(values) > 1]
    lines = []
    known = [(one.objectives[0].value, one) for one in found.baselines if one.objectives]
    base = max(known, key=lambda pair: pair[0])[1] if known else None
    winner = next((one for one in found.trials if one.number in found.winners), None)
    lead = ""
    if base is not None and base.objectives and winner is not None and winner.objectives:
        gain = winner.objectives[0].value - base.objectives[0].value
        lead = f"; the best trial leads {base.name} by {gain:+.3f}, chosen among {len(found.trials)}"
    if not groups:
        if found.trials:
            lines.append(f"noise between seeds: unknown, hydra.sweeper.replicates=3 or test_seeds=3 shows it{lead}")
        return lines
    freedom = sum(len(values) - 1 for values in groups)
    variance = sum(float(np.var(values, ddof=1)) * (len(values) - 1) for values in groups) / freedom
    lines.append(
        f"noise between seeds: standard deviation {math.sqrt(variance):.4f} ({freedom} degrees of freedom){lead}"
    )
    if base is not None and winner is not None:
        tau = _difference_variance(study, base, winner)
        if tau is not None and variance > 0:
            prompts, seeds = 2 * _POWER * tau / _GAIN**2, 2 * _POWER * 2 * variance / _GAIN**2
            lines.append(
                f"to see a gain of {_GAIN:g} over {base.name} in 8 of 10 studies takes about {math.ceil(prompts):,} "
                f"prompts and {math.ceil(seeds)} seeds of each"
            )
    return lines


def _difference_variance(study: Study, base: BaselineLine, winner: TrialLine) -> float | None:
    """The variance over prompts of the difference between the best trial and a baseline."""
    place = study.directory / str(winner.number)
    own = (
        [place]
        if (place / "samples.jsonl").exists()
        else sorted(path.parent for path in place.glob("seed=*/samples.jsonl"))
    )
    other = [study.directory / "baselines" / folder(base.name) / f"seed={seed}" for seed in base.seeds]
    if not own or not all((path / "samples.jsonl").exists() for path in other):
        return None
    first, second = by_prompt(own), by_prompt(other)
    both = [first[key] - second[key] for key in first if key in second]
    return float(np.var(both, ddof=1)) if len(both) > 1 else None


def _results(study: Study, objectives: Sequence[str]) -> list[str]:
    """The best and the baselines on fresh seeds and test prompts."""
    groups = _grouped(study, "results")
    names = {folder(text): text for text in study.settings.baselines}
    found: list[Configuration] = []
    notes = []
    for name, runs in groups.items():
        title = names.get(name, name.replace(",", " "))
        done = [seed for seed, run in runs.items() if run["state"] in ("complete", "diverged")]
        notes += [f"result {title}: {run['reason']}" for run in runs.values() if run["state"] == "failed"]
        if done:
            places = [study.directory / "results" / name / f"seed={seed}" for seed in done]
            found.append(Configuration({run.seed: run for run in find_runs(places)}, title))
    if not found:
        return notes
    metric = next((name for path, name in _METRICS.items() if objectives[0].startswith(path)), "win_rate")
    order = [one for one in found if one.label in names.values()] + [
        one for one in found if one.label not in names.values()
    ]
    try:
        lines = compare_runs(order, metric=metric, baseline=order[0].label, n_bootstrap=10_000, seed=0)
    except UserError as error:
        return [*notes, f"no result: {error}"]
    rows = [["configuration", "seeds", metric, f"difference to {lines[0].label}", "p"]]
    for line in lines:
        seeds = f"{len(line.seeds)}" + (f", {len(line.diverged)} diverged" if line.diverged else "")
        other = (
            ""
            if line.difference is None
            else f"{line.difference.value:+.3f} [{line.difference.low:+.3f}, {line.difference.high:+.3f}]"
        )
        p = "" if line.p is None else f"{line.p:.3f}" if line.p >= 0.001 else "<0.001"
        rows.append(
            [line.label, seeds, f"{line.value.value:.3f} [{line.value.low:.3f}, {line.value.high:.3f}]", other, p]
        )
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    _write(study.directory / "results.csv", text.getvalue())
    return [
        "",
        f"result: fresh seeds, {lines[0].n} test prompts, none of them used to choose "
        "(paired differences, simultaneous 95 % intervals, Holm's p)",
        *aligned(rows),
        *notes,
    ]


def _plots(study: Study, found: Overview) -> list[str]:
    from dppo.search.plots import draw

    drawn = draw(found, study.directory)
    names = sorted({path.stem for path in drawn})
    return [f"plots {study.directory / 'plots'}: {', '.join(names)}"] if names else []
