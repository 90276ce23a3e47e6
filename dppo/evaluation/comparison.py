"""Finished runs side by side: seeds of one configuration together, paired differences to a baseline, intervals.

Everything is read from run directories, so runs of different days and machines can be compared, if they answered the
same prompts.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dppo.errors import UserError
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
_NOT_COMPARED = ("seed", "cache", "device", "tracking", "objectives")
METRICS = {
    "win_rate": "win rate against SFT, ties 1/2",
    "reward": "mean reward",
    "reward_gain": "mean reward above SFT's",
    "chosen_log_ratio": "log-ratio of held-out chosen answers, nats",
    "accuracy": "share of held-out pairs ranked right by log-prob",
    "after_edit": "token log-prob of held-out chosen answers behind the first edit, nats",
}


@dataclass(frozen=True)
class Run:
    """One run directory."""

    path: Path
    seed: int
    settings: Mapping[str, Any]
    words: tuple[str, ...]  # overrides as typed
    result: Mapping[str, Any]

    @property
    def diverged(self) -> bool:
        return bool(self.result["status"] == "diverged")


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


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """All finished runs in these directories and below. Raises UserError if there are none."""
    found = []
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: is not a directory; give run directories, or folders that hold some")
        found += [run for result in sorted(path.rglob("result.json")) if (run := _read(result)) is not None]
    if not found:
        raise UserError(f"{' '.join(map(str, paths))}: no finished run (result.json) in there")
    return list({run.path.resolve(): run for run in found}.values())


def _read(path: Path) -> Run | None:
    import yaml

    directory = path.parent
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
        settings = yaml.safe_load((directory / "config.yaml").read_text(encoding="utf-8"))
        words = shlex.split((directory / "command.txt").read_text(encoding="utf-8"))[3:]
        if result["status"] not in ("complete", "diverged"):
            return None
        return Run(directory, int(settings["seed"]), settings, tuple(words), result)
    except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError) as error:
        raise UserError(f"{directory}: is not a run that can be read ({type(error).__name__}: {error})") from None


def configurations(runs: Sequence[Run]) -> list[Configuration]:
    """Runs by configuration, each labelled by the words that not all of them share; the newest run of a seed counts."""
    groups: dict[str, Configuration] = {}
    for run in sorted(runs, key=lambda run: (run.path / "result.json").stat().st_mtime):
        compared = {key: value for key, value in run.settings.items() if key not in _NOT_COMPARED}
        key = json.dumps(compared, sort_keys=True)
        groups.setdefault(key, Configuration({})).runs[run.seed] = run
    found = list(groups.values())
    words = [_telling_words(next(iter(group.runs.values()))) for group in found]
    shared = set.intersection(*map(set, words)) if len(found) > 1 else set()
    for group, own in zip(found, words, strict=True):
        group.label = " ".join(word for word in own if word not in shared) or "defaults"
    return found


def _telling_words(run: Run) -> list[str]:
    def key(word: str) -> str:
        return word.lstrip("+").partition("=")[0].split(".")[0]

    return [word for word in run.words if key(word) not in (*_NOT_COMPARED, "hydra")]


def compare_runs(
    found: Sequence[Configuration], *, metric: str, baseline: str | None, n_bootstrap: int, seed: int
) -> list[Line]:
    """One line a configuration, the baseline first, then by value.

    ``baseline`` is a part of a label (None: the first configuration). Diverged runs lose every prompt, and count in
    no other metric. Raises UserError if runs answered different prompts, or no label matches ``baseline``.
    """
    base = _baseline(found, baseline)
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


def shown_interval(one: Interval, sign: str = "", digits: int = 3) -> str:
    """Such as ``0.814 [0.774, 0.857]``."""
    value, low, high = (f"{part:{sign}.{digits}f}" for part in (one.value, one.low, one.high))
    return f"{value} [{low}, {high}]"


def shown_p(p: float | None) -> str:
    """A p value with three digits; nothing for none."""
    return "" if p is None else f"{p:.3f}" if p >= 0.001 else "<0.001"


def sft_value(found: Sequence[Configuration], metric: str) -> float | None:
    """The SFT model's own mean of a metric that it has one of, from the first run that was measured."""
    files = {"reward": ("samples.jsonl", "reference_reward"), "after_edit": ("pairs.jsonl", "reference_after_edit")}
    runs = [run for one in found for run in one.runs.values() if not run.diverged]
    if metric not in files or not runs:
        return None
    name, column = files[metric]
    return float(np.mean([row[column] for row in _lines(runs[0].path / name) if row[column] is not None]))


def _baseline(found: Sequence[Configuration], wanted: str | None) -> Configuration:
    if wanted is None:
        return found[0]
    exact = [one for one in found if wanted in (one.label, *one.label.split())]
    matching = exact or [one for one in found if wanted in one.label]
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
        values = _pair_values(run, metric) if metric in PAIR_METRICS else prompt_values(run.path, metric)
        if values:
            table[seed] = values
    return table


def prompt_values(path: Path, metric: str) -> dict[str, float]:
    """The values of a run directory by prompt: of win_rate (win 1, tie 1/2, loss 0), reward or reward_gain."""
    rows = _lines(path / "samples.jsonl")
    own = np.array([row["policy_reward"] for row in rows], dtype=float)
    other = np.array([row["reference_reward"] for row in rows], dtype=float)
    values: Array = (
        outcomes(own.tolist(), other.tolist())
        if metric == "win_rate"
        else own - other
        if metric == "reward_gain"
        else own
    )
    return {row["prompt_id"]: float(value) for row, value in zip(rows, values, strict=True)}


# Those of METRICS that are measured on held-out pairs, from a row of pairs.jsonl; the others are on prompts.
PAIR_METRICS: dict[str, Callable[[Mapping[str, Any]], float | None]] = {
    "chosen_log_ratio": lambda row: float(row["chosen"] - row["reference_chosen"]),
    "accuracy": lambda row: float(np.sign(row["chosen"] - row["rejected"]) + 1) / 2,
    "after_edit": lambda row: None if row["after_edit"] is None else float(row["after_edit"]),
}


def _pair_values(run: Run, metric: str) -> dict[str, float]:
    found = {row["example_id"]: PAIR_METRICS[metric](row) for row in _lines(run.path / "pairs.jsonl")}
    return {key: value for key, value in found.items() if value is not None}


def _lines(path: Path) -> list[dict[str, Any]]:
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); run it again") from None


def _means(one: Configuration) -> dict[str, float]:
    """What a table shows beside the metric, averaged over the seeds that did not diverge."""
    results = [run.result for run in one.runs.values() if not run.diverged]
    if not results:
        return {}
    return {
        "reward": float(np.mean([found["reward"]["policy"]["value"] for found in results])),
        "kl_nats_per_answer": float(np.mean([found["kl"]["nats_per_answer"] for found in results])),
        "tokens": float(np.mean([found["length"]["policy"]["tokens"] for found in results])),
    }
