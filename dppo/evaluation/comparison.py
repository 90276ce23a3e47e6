"""Finished runs side by side: seeds of one configuration together, paired differences to a baseline, intervals.

Everything is read from run directories, so runs of different days and machines can be compared, if they answered the
same prompts.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dppo.dotted import leaves
from dppo.errors import UserError
from dppo.evaluation.ranking import Entrant, Ranking, rank
from dppo.evaluation.runs import Run, rewards_in
from dppo.evaluation.win_rates import (
    Array,
    Interval,
    crossed_mean,
    crossed_rate,
    holm,
    outcomes,
    paired_difference,
    t_interval,
)

# Settings that tell runs of one configuration apart, or have no influence on results.
_NOT_COMPARED = ("seed", "cache", "device", "tracking", "objectives", "report", "dry_run", "rates")
# Root values stand once more where they are used: a default that was typed makes no other configuration.
_ROOTS = ("alpha", "beta", "zeta", "penalty")
_PRESETS = ("experiment", "sweep")
_DECODINGS = "the answers of these runs were decoded differently (evaluation.sampling)"
_INTERIM = "interim"  # of evaluation: what is measured on the way changes no result
# Beside them: what never changes a number, and root values that are shown where they are used (loss.alpha).
_NOT_SHOWN = (*_NOT_COMPARED[1:], *_ROOTS, "hydra", "allowed_targets")
METRICS = {
    "win_rate": "win rate against SFT, ties 1/2",
    "reward": "mean reward",
    "reward_gain": "mean reward above SFT's",
    "chosen_log_ratio": "log-ratio of held-out chosen answers, nats",
    "accuracy": "share of held-out pairs ranked right by log-prob",
    "after_edit": "token log-prob of held-out chosen answers behind the first edit, nats",
}


@dataclass(eq=False)
class Configuration:
    """The runs that differ in their seed only, by seed; ``label`` is what tells it from the others."""

    runs: dict[int, Run]
    label: str = ""


@dataclass(frozen=True)
class Line:
    """A configuration in the comparison; the difference is to the baseline over the seeds that both have."""

    label: str
    seeds: tuple[int, ...]
    diverged: tuple[int, ...]
    n: int  # prompts or pairs
    value: Interval
    over_seeds: Interval
    difference: Interval | None
    n_common: int
    p: float | None  # Holm's
    means: Mapping[str, float] = field(default_factory=dict)


def configurations(runs: Sequence[Run]) -> list[Configuration]:
    """Runs by configuration, each labelled by the words that not all of them share; the newest run of a seed counts."""
    groups: dict[str, Configuration] = {}
    for run in sorted(runs, key=lambda run: (run.path / "result.json").stat().st_mtime):
        compared = {key: value for key, value in run.settings.items() if key not in (*_NOT_COMPARED, *_ROOTS)}
        if isinstance(measured := compared.get("evaluation"), Mapping):
            compared["evaluation"] = {name: value for name, value in measured.items() if name != _INTERIM}
        key = json.dumps(compared, sort_keys=True)
        groups.setdefault(key, Configuration({})).runs[run.seed] = run
    found = list(groups.values())
    words = [_telling_words(next(iter(group.runs.values()))) for group in found]
    shared = set.intersection(*map(set, words)) if len(found) > 1 else set()
    telling = [[word for word in own if word not in shared] for own in words]
    # The name of a preset is long, and says nothing where the other words tell the configurations apart.
    short = [[word for word in own if word.lstrip("+").partition("=")[0] not in _PRESETS] for own in telling]
    for group, own, less in zip(found, telling, short, strict=True):
        group.label = " ".join(less if less and short.count(less) == 1 else own) or "defaults"
    return found


def rewards_of(one: Configuration) -> dict[int, Mapping[str, tuple[float, float]]]:
    """(policy, reference) rewards by seed and prompt_id; no prompts for a diverged run, which has no answers."""
    return {seed: run.rewards for seed, run in sorted(one.runs.items())}


@dataclass(frozen=True)
class SettingDifference:
    """A setting that two runs don't share, by its dotted name; values as text, None where a run has no such setting."""

    key: str
    first: str | None
    second: str | None


def differences_of_settings(first: Mapping[str, Any], second: Mapping[str, Any]) -> list[SettingDifference]:
    """What differs between two resolved configurations, without settings that have no influence on results.

    A class is named without its module, under the name of its group: ``loss: DPO``.
    """
    own, other = (_shown_settings(settings) for settings in (first, second))
    return [
        SettingDifference(key, own.get(key), other.get(key))
        for key in dict.fromkeys([*own, *other])
        if own.get(key) != other.get(key)
    ]


def _shown_settings(settings: Mapping[str, Any]) -> dict[str, str]:
    used = {key: value for key, value in settings.items() if key not in _NOT_SHOWN}
    shown = {}
    for key, value in leaves(used).items():
        if key.endswith("._target_"):
            shown[key.removesuffix("._target_")] = str(value).rpartition(".")[2]
        else:
            shown[key] = value if isinstance(value, str) else json.dumps(value, default=str)
    return shown


@dataclass(frozen=True, eq=False)
class Standings:
    """Many configurations ranked; ``ranking`` is in the order of ``labels``.

    ``sft`` tells whether the first of them is the SFT model (with rating 0); else the baseline has rating 0, because
    the runs were compared with different SFT models. ``n_prompts`` of at most ``most_prompts`` that a run has are
    common to all. ``diverged`` are the seeds of each that lost every prompt.
    """

    labels: tuple[str, ...]
    diverged: tuple[tuple[int, ...], ...]
    ranking: Ranking
    sft: bool
    n_prompts: int
    most_prompts: int


def standings(
    found: Sequence[Configuration], *, baseline: str | None = None, n_bootstrap: int = 10_000, seed: int = 0
) -> Standings:
    """Win matrix and ratings of these configurations and the SFT model, on the prompts that all runs answered.

    ``baseline`` is a part of a label (None: the first configuration). Diverged runs lose every prompt. Raises UserError
    if there is nothing to rank: no common prompts, different reward functions or decodings, or a single configuration.
    """
    base = _baseline(found, baseline)
    runs = [run for one in found for run in one.runs.values()]
    answered = [run.rewards for run in runs if run.rewards]
    if not answered:
        raise UserError("ranking: none of these runs has answers (all diverged)")
    kinds = {json.dumps(run.settings.get("reward"), sort_keys=True) for run in runs}
    if len(kinds) > 1 or len({json.dumps(run.scored_by, sort_keys=True) for run in runs if run.rewards}) > 1:
        raise UserError("ranking: these runs were scored by different rewards (reward=); rank those that share one")
    if _decoded_differently(runs):
        raise UserError(f"ranking: {_DECODINGS}; rank those that share one")
    common = sorted(set.intersection(*map(set, answered)))
    if not common:
        raise UserError(
            "ranking: no prompt was answered by all of these runs (other dataset, split or limits); "
            "rank those that share prompts"
        )
    references = {tuple(rewards[key][1] for key in common) for rewards in answered}
    entrants = []
    if len(references) == 1:
        entrants.append(Entrant("SFT", None, np.array(list(references), dtype=np.float64)))
    elif len(found) == 1:
        raise UserError("ranking: a single configuration, whose runs have different SFT models; give two or more")
    for one in found:
        rows = [
            [rewards[key][0] for key in common] if rewards else [-math.inf] * len(common)
            for rewards in rewards_of(one).values()
        ]
        entrants.append(Entrant(one.label, tuple(sorted(one.runs)), np.array(rows, dtype=np.float64)))
    sft = len(references) == 1
    return Standings(
        labels=tuple(one.name for one in entrants),
        diverged=(
            *([()] if sft else []),
            *(tuple(s for s, run in sorted(one.runs.items()) if run.diverged) for one in found),
        ),
        ranking=rank(entrants, n_bootstrap=n_bootstrap, seed=seed, anchor=0 if sft else found.index(base)),
        sft=sft,
        n_prompts=len(common),
        most_prompts=max(map(len, answered)),
    )


def _telling_words(run: Run) -> list[str]:
    def key(word: str) -> str:
        return word.lstrip("+").partition("=")[0].split(".")[0]

    words = [word for word in run.words if key(word) not in (*_NOT_COMPARED, "hydra")]
    # Configurations that are compared answered the same prompts: the split tells them not apart.
    beside = (f"evaluation.{_INTERIM}.", "evaluation.split=")
    return [word for word in words if not word.lstrip("+").startswith(beside)]


def compare_runs(
    found: Sequence[Configuration], *, metric: str, baseline: str | None, n_bootstrap: int, seed: int
) -> list[Line]:
    """One line a configuration, the baseline first, then by value.

    ``baseline`` is a part of a label (None: the first configuration). Diverged runs lose every prompt, and count in
    no other metric. Raises UserError if runs answered different prompts, or decoded their answers differently, or no
    label matches ``baseline``.
    """
    base = _baseline(found, baseline)
    if metric not in PAIR_METRICS and _decoded_differently([run for one in found for run in one.runs.values()]):
        raise UserError(f"metric={metric}: {_DECODINGS}; compare those that share one")
    tables = {one: _table(one, metric) for one in found}
    keys = {tuple(sorted(rows)) for table in tables.values() for rows in table.values() if rows}
    if len(keys) > 1:
        raise UserError(
            f"metric={metric}: these runs were measured on different prompts or pairs (other dataset, split or "
            "limits); compare those that share them"
        )
    if not keys:
        raise UserError(f"metric={metric}: none of these runs has it; choose one of {', '.join(METRICS)}")
    (order,) = keys
    lost = dict.fromkeys(order, 0.0)
    matrices = {
        place: {s: np.array([(rows or lost)[key] for key in order]) for s, rows in table.items()}
        for place, table in tables.items()
    }
    others = [one for one in found if one is not base and set(matrices[one]) & set(matrices[base])]
    drawn: dict[Configuration, tuple[Interval, float]] = {}
    for one in others:
        common = sorted(set(matrices[one]) & set(matrices[base]))
        first, second = (np.stack([matrices[which][s] for s in common]) for which in (one, base))
        drawn[one] = paired_difference(first, second, n_bootstrap=n_bootstrap, seed=seed, comparisons=len(others))
    adjusted = dict(zip(others, holm([drawn[one][1] for one in others]), strict=True))
    lines = []
    for one in found:
        rows = matrices[one]
        if not rows:
            raise UserError(f"metric={metric}: {one.label} has no run that can be measured (all diverged)")
        values = np.stack([rows[s] for s in sorted(rows)])
        rate = crossed_rate if metric == "win_rate" else crossed_mean
        lines.append(
            Line(
                label=one.label,
                seeds=tuple(sorted(rows)),
                diverged=tuple(s for s, run in sorted(one.runs.items()) if run.diverged),
                n=len(order),
                value=rate(values, n_bootstrap=n_bootstrap, seed=seed),
                over_seeds=t_interval([float(row.mean()) for row in values]),
                difference=drawn[one][0] if one in drawn else None,
                n_common=len(set(rows) & set(matrices[base])),
                p=adjusted.get(one),
                means=_means(one),
            )
        )
    return [
        lines[found.index(base)],
        *sorted(
            (line for line, one in zip(lines, found, strict=True) if one is not base),
            key=lambda line: -line.value.value,
        ),
    ]


def _decoded_differently(runs: Sequence[Run]) -> bool:
    return len({run.decoding for run in runs if run.rewards}) > 1


def shown_interval(one: Interval, sign: str = "", digits: int = 3) -> str:
    """Such as ``0.814 [0.774, 0.857]``."""
    value, low, high = (f"{part:{sign}.{digits}f}" for part in (one.value, one.low, one.high))
    return f"{value} [{low}, {high}]"


def shown_p(p: float | None) -> str:
    """A p value with three digits; nothing for none."""
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"


def sft_value(found: Sequence[Configuration], metric: str) -> float | None:
    """The SFT model's own mean of a metric that it has one of, from the first run that was measured."""
    run = next((run for one in found for run in one.runs.values() if run.rewards), None)
    if run is None or metric not in ("reward", "after_edit"):
        return None
    if metric == "reward":
        return float(np.mean([reference for _, reference in run.rewards.values()]))
    known = [row["reference_after_edit"] for row in run.pairs.values() if row["reference_after_edit"] is not None]
    return float(np.mean(known)) if known else None


def _baseline(found: Sequence[Configuration], wanted: str | None) -> Configuration:
    if wanted is None:
        return found[0]
    named = [one for one in found if wanted == one.label]
    told = [one for one in found if wanted in one.label.split()]
    matching = named or told or [one for one in found if wanted in one.label]
    if len(matching) != 1:
        labels = "; ".join(one.label for one in found)
        count = "no configuration" if not matching else f"{len(matching)} configurations"
        raise UserError(f"--baseline {wanted}: matches {count} of: {labels}")
    return matching[0]


def _table(one: Configuration, metric: str) -> dict[int, dict[str, float]]:
    """Values by seed and prompt or pair; an empty mapping for a diverged run that lost every prompt."""
    table: dict[int, dict[str, float]] = {}
    for seed, run in sorted(one.runs.items()):
        if run.diverged:
            if metric == "win_rate":
                table[seed] = {}
            continue
        values = values_of_pairs(run, metric) if metric in PAIR_METRICS else values_of_prompts(run.rewards, metric)
        if values:
            table[seed] = values
    return table


def prompt_values(path: Path, metric: str) -> dict[str, float]:
    """The values of a run directory by prompt: of win_rate (win 1, tie 1/2, loss 0), reward or reward_gain."""
    return values_of_prompts(rewards_in(path), metric)


def values_of_prompts(rewards: Mapping[str, tuple[float, float]], metric: str) -> dict[str, float]:
    """The same from (policy, reference) rewards by prompt."""
    own, other = np.array(list(rewards.values()), dtype=np.float64).T
    values: Array = (
        outcomes(own.tolist(), other.tolist())
        if metric == "win_rate"
        else own - other
        if metric == "reward_gain"
        else own
    )
    return dict(zip(rewards, values.tolist(), strict=True))


# Those of METRICS that are measured on held-out pairs, from a row of pairs.jsonl; the others are on prompts.
PAIR_METRICS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "chosen_log_ratio": lambda row: float(row["chosen"] - row["reference_chosen"]),
    "accuracy": lambda row: float(np.sign(row["chosen"] - row["rejected"]) + 1) / 2,
    "after_edit": lambda row: None if row["after_edit"] is None else float(row["after_edit"]),
}


def values_of_pairs(run: Run, metric: str) -> dict[str, float]:
    """The values of one of PAIR_METRICS by pair, without those that have none."""
    found = {key: PAIR_METRICS[metric](row) for key, row in run.pairs.items()}
    return {key: value for key, value in found.items() if value is not None}


def _means(one: Configuration) -> dict[str, float]:
    """What a table shows beside the metric, averaged over the seeds that did not diverge; NaN where unknown."""
    names = {
        "reward": "reward.policy.value",
        "kl_nats_per_answer": "kl.nats_per_answer",
        "tokens": "length.policy.tokens",
    }
    runs = [run for run in one.runs.values() if not run.diverged]
    if not runs:
        return {}
    numbers = {what: [run.number(name) for run in runs] for what, name in names.items()}
    return {
        what: float(np.mean([math.nan if value is None else value for value in values]))
        for what, values in numbers.items()
    }
