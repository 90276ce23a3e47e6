"""What a report knows: runs in groups that can be compared, the best first, and what was left out and why."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dppo.config import key_of
from dppo.data.ids import content_hash
from dppo.dotted import leaves
from dppo.errors import UserError
from dppo.evaluation.comparison import METRICS, PAIR_METRICS, Configuration, Line, compare_runs, configurations
from dppo.evaluation.runs import Broken, Run
from dppo.evaluation.win_rates import Array, Interval, crossed_mean
from dppo.results import command_line

SFT = "SFT"
# What a metric is called where there is no room for its definition.
NAMES = {name: text.partition(",")[0] for name, text in METRICS.items()}
_PHASE = "main"


@dataclass(frozen=True)
class Measured:
    """What one run measured prompt by prompt, in the order of the group's prompts."""

    policy: Array  # (P,) rewards
    reference: Array  # (P,)


@dataclass(eq=False)
class Entry:
    """One configuration of a group, over its seeds.

    ``method`` names the losses of its phases, ``place`` is that among the entries (its colour). ``line`` holds its
    value, and the difference to the group's baseline.
    """

    configuration: Configuration
    line: Line
    method: str
    settings: Mapping[str, Any]
    place: int = 0
    measured: dict[int, Measured] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return self.line.label

    @property
    def value(self) -> Interval:
        return self.line.value

    @property
    def runs(self) -> dict[int, Run]:
        """The runs that did not diverge, by seed."""
        return {seed: run for seed, run in sorted(self.configuration.runs.items()) if not run.diverged}

    @property
    def run(self) -> Run:
        """Its first seed's."""
        return next(run for _, run in sorted(self.configuration.runs.items()))

    @cached_property
    def flat(self) -> dict[str, Any]:
        """Its settings by their dotted names."""
        return leaves(self.settings)

    @property
    def is_sft(self) -> bool:
        """Whether nothing was trained on preferences: the SFT model against itself."""
        return self.method == SFT

    @property
    def rewards(self) -> Array:
        """(S, P) of the policy."""
        return np.array([one.policy for one in self.measured.values()])

    def told(self) -> str:
        """Its value in words, with what it rests on."""
        seeds = f"{len(self.line.seeds)} seed{'s' if len(self.line.seeds) > 1 else ''}"
        return f"{self.label}: {shown(self.value)}, {seeds} x {self.line.n:,}"

    def mean_reward(self) -> Interval:
        """The mean reward of the policy over seeds and prompts."""
        return crossed_mean(self.rewards, n_bootstrap=2000, seed=0)

    def number(self, path: str) -> Interval | None:
        """A number of ``result.json``: over several seeds their mean and range; None where a run has no such number."""
        found = [run.number(path) for run in self.runs.values()]
        values = [value for value in found if value is not None]
        if not values or len(values) < len(found):
            return None
        if len(values) == 1:
            return Interval(values[0], np.nan, np.nan)
        return Interval(float(np.mean(values)), min(values), max(values))


@dataclass(eq=False)
class Group:
    """Configurations that answered the same prompts, decoded alike and scored by one reward, the best first."""

    title: str
    split: str
    prompts: tuple[str, ...]
    metric: str
    entries: tuple[Entry, ...]
    baseline: Entry

    @property
    def name(self) -> str:
        """What the metric is called."""
        return NAMES[self.metric]

    @property
    def best(self) -> Entry:
        return self.entries[0]

    @cached_property
    def varying(self) -> tuple[str, ...]:
        """The dotted keys of the settings in which the entries differ."""
        flat = [entry.flat for entry in self.entries]
        keys = dict.fromkeys(key for one in flat for key in one)
        missing = object()
        return tuple(key for key in keys if len({repr(one.get(key, missing)) for one in flat}) > 1)


@dataclass(frozen=True)
class LeftOut:
    """A directory that is no part of any comparison."""

    path: Path
    why: str
    status: str = "broken"


@dataclass(eq=False)
class Evidence:
    """Everything that was found; the first group is what the report is about."""

    groups: tuple[Group, ...]
    left_out: tuple[LeftOut, ...]
    studies: tuple[Path, ...]
    root: Path

    @property
    def entries(self) -> Iterator[Entry]:
        return (entry for group in self.groups for entry in group.entries)


def gather(
    runs: Sequence[Run],
    broken: Sequence[Broken],
    root: Path,
    *,
    metric: str,
    baseline: str | None,
    n_bootstrap: int,
) -> Evidence:
    """Groups of the runs that finished; the others are left out, and said to be.

    Raises UserError if no configuration is called ``baseline``, or none was measured by ``metric``.
    """
    left = [LeftOut(one.path, one.why) for one in broken]
    left += [LeftOut(run.path, run.ending, run.status) for run in runs if not run.finished]
    by_prompts: dict[str, list[Run]] = {}
    homes: dict[str, str] = {}
    for run in runs:
        if run.status == "complete":
            key = content_hash([*run.scored_by, run.decoding, *sorted(run.rewards)])
            homes[_measured_by(run)] = key
            by_prompts.setdefault(key, []).append(run)
    for run in runs:
        if run.diverged:
            # It answered nothing; it belongs to those that were to answer the same.
            if (home := homes.get(_measured_by(run))) is None:
                left.append(LeftOut(run.path, "diverged, and no other run was measured in the same way", "diverged"))
            else:
                by_prompts[home].append(run)
    groups = []
    refused = None
    for found in by_prompts.values():
        told = [run for run in found if metric == "win_rate" or not run.diverged]
        left += [LeftOut(run.path, f"diverged: it has no {metric}", "diverged") for run in found if run not in told]
        try:
            groups.append(_group(told, metric, baseline, n_bootstrap))
        except UserError as error:
            refused = error
            left += [LeftOut(run.path, str(error), run.status) for run in told]
    if refused is not None and not groups:
        raise refused
    if baseline is not None and not any(_is_called(group.baseline.label, baseline) for group in groups):
        labels = "; ".join(entry.label for group in groups for entry in group.entries)
        raise UserError(f"--baseline {baseline}: is none of: {labels}")

    def size(group: Group) -> tuple[int, int]:
        return len(group.entries), sum(len(entry.configuration.runs) for entry in group.entries)

    groups.sort(key=lambda group: (group.split != "test", *(-number for number in size(group))))
    # Results are what a report is about, but not one lonely run beside a whole grid.
    groups.sort(key=lambda group: len(group.entries) < 2)
    return Evidence(tuple(groups), tuple(left), _studies(run.path for run in runs), root)


def _group(
    runs: Sequence[Run],
    metric: str,
    baseline: str | None,
    n_bootstrap: int,
) -> Group:
    found = configurations(runs)
    again = Counter(one.label for one in found)
    for place, one in enumerate(found):
        if again[one.label] > 1:
            one.label = f"{one.label} #{place + 1}"
    settings = {one.label: next(iter(one.runs.values())).settings for one in found}
    base = _baseline(found, settings, baseline)
    lines = compare_runs(found, metric=metric, baseline=base.label, n_bootstrap=n_bootstrap, seed=0)
    by_label = {one.label: one for one in found}
    lines.sort(key=lambda line: -line.value.value)
    whole = next(run for run in runs if not run.diverged)
    prompts = tuple(whole.rewards)
    entries = []
    for place, line in enumerate(lines):
        one = by_label[line.label]
        measured = {}
        for seed, run in sorted(one.runs.items()):
            if not run.diverged:
                pairs = np.array([run.rewards[prompt] for prompt in prompts], dtype=np.float64)
                measured[seed] = Measured(pairs[:, 0], pairs[:, 1])
        entries.append(Entry(one, line, method(settings[line.label]), settings[line.label], place, measured))
    split = str(whole.result.get("split", "test"))
    reward = _class(whole.settings.get("reward"))
    decoded = "" if whole.decoding == "greedy" else f", answers {whole.decoding}"
    title = f"{len(prompts):,} {split} prompts{decoded}, scored by {reward}"
    if metric in PAIR_METRICS:
        title = f"{lines[0].n:,} held-out {split} pairs"
    base_entry = next(entry for entry in entries if entry.label == base.label)
    return Group(title, split, prompts, metric, tuple(entries), base_entry)


def _baseline(
    found: Sequence[Configuration], settings: Mapping[str, Mapping[str, Any]], wanted: str | None
) -> Configuration:
    """What the user names; else DPO, else SFT, else the oldest."""
    if wanted is not None:
        for one in found:
            if _is_called(one.label, wanted):
                return one
    for name in ("DPO", SFT):
        for one in found:
            if method(settings[one.label]) == name:
                return one
    return found[0]


def _is_called(label: str, wanted: str) -> bool:
    return wanted in (label, *label.split())


def _measured_by(run: Run) -> str:
    return json.dumps([run.settings.get(key) for key in ("dataset", "evaluation", "reward")], sort_keys=True)


def _studies(paths: Iterator[Path]) -> tuple[Path, ...]:
    """The directories of searches that hold these runs."""
    above = (parent for path in paths for parent in path.parents[:3])
    return tuple(dict.fromkeys(parent for parent in above if (parent / "trials.csv").is_file()))


# --- words -----------------------------------------------------------------------------------------------------------


def shown(one: Interval, digits: int = 3, sign: str = "") -> str:
    """A value and its interval, in words."""
    bounds = "" if np.isnan(one.low) else f" [{one.low:{sign}.{digits}f}, {one.high:{sign}.{digits}f}]"
    return f"{one.value:{sign}.{digits}f}{bounds}"


def answers_of_policy(entry: Entry) -> str:
    """The answers that an entry's KL was measured on, in words."""
    greedy = entry.run.decoding == "greedy"
    return "on greedy answers of the policy" if greedy else f"on answers of the policy, {entry.run.decoding}"


def sentence(text: str) -> str:
    """``text`` with a capital letter at its beginning."""
    return text[:1].upper() + text[1:]


def method(settings: Mapping[str, Any]) -> str:
    """The losses of a run's phases, such as ``DPO``, ``UnLL quadratic`` or ``UnLL quadratic → DPO``; else ``SFT``."""
    return " → ".join(name for _, name, _ in phases(settings)) or SFT


def phases(settings: Mapping[str, Any]) -> list[tuple[str, str, Mapping[str, Any]]]:
    """(name, loss, settings) of every preference phase."""
    found: Mapping[str, Any] = settings.get("phases") or {}
    if not found and settings.get("loss"):
        found = {_PHASE: settings}
    return [(name, _loss(phase.get("loss") or {}), phase) for name, phase in found.items()]


def _loss(settings: Mapping[str, Any]) -> str:
    base = settings.get("base")
    if base and settings.get("alpha") == 0:
        return _loss(base)  # without a penalty it is its base loss
    penalty = f" {_class(settings.get('penalty')).lower()}" if settings.get("penalty") else ""
    below = f" on {_loss(base)}" if base and _class(base) != "DPO" else ""
    return f"{_class(settings)}{penalty}{below}"


def _class(settings: Any) -> str:
    return (
        str(settings["_target_"]).rpartition(".")[2]
        if isinstance(settings, Mapping) and "_target_" in settings
        else "?"
    )


def words_without(words: Sequence[str], *keys: str) -> list[str]:
    """A command's words without those that give one of ``keys`` a value."""
    return [word for word in words if key_of(word) not in keys]


def preset(words: Sequence[str]) -> str | None:
    """The search whose preset these words ask for."""
    return next((word.partition("=")[2] for word in words if key_of(word) == "sweep"), None)


def again(entry: Entry, *changed: str) -> str:
    """The command line that makes the runs of an entry anew, with other words for the keys of ``changed``."""
    words = [*words_without(entry.run.words, *map(key_of, changed)), *changed]
    seeds = [str(seed) for seed in sorted(entry.configuration.runs)]
    if len(seeds) == 1:
        return command_line(words)
    if preset(words):  # with -m it would search
        return f"for seed in {' '.join(seeds)}; do {command_line(words_without(words, 'seed'))} seed=$seed; done"
    return command_line([*words_without(words, "seed"), f"seed={','.join(seeds)}", "-m"])
