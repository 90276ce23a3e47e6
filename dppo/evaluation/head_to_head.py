"""Two runs head to head: what differs in their configurations, every metric with paired differences, their answers."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from dppo.evaluation.comparison import (
    SettingDifference,
    differences_of_settings,
    values_of_pairs,
    values_of_prompts,
)
from dppo.evaluation.ranking import Entrant, rank
from dppo.evaluation.runs import Run, sample_rows
from dppo.evaluation.win_rates import Array, Interval, crossed_mean, crossed_rate, holm, paired_difference, wilson

Values = Mapping[str, float]


@dataclass(frozen=True)
class Measured:
    """A number of one run; ``n`` prompts, pairs, answers or tokens. None: not known from what a run leaves."""

    value: float
    low: float | None
    high: float | None
    n: int | None


@dataclass(frozen=True)
class MetricLine:
    """One metric of both runs. The difference is first minus second, paired over ``n_common`` prompts or pairs.

    Its interval is simultaneous over all tests of the page, ``p`` is two-sided and Holm's; None: nothing was paired.
    """

    name: str
    first: Measured | None
    second: Measured | None
    difference: Interval | None = None
    n_common: int = 0
    p: float | None = None


@dataclass(frozen=True)
class Duel:
    """The first run's answers against the second's on ``n`` common prompts: the higher reward wins, ties count 1/2."""

    rate: Interval
    n: int
    wins: int
    ties: int
    losses: int
    p: float  # against 1/2, Holm's


@dataclass(frozen=True)
class Sample:
    """Both answers to one prompt and the SFT model's, with rewards; texts as the models wrote them."""

    prompt_id: str
    prompt: str
    first: str
    second: str
    reference: str
    first_reward: float
    second_reward: float
    reference_reward: float

    @property
    def gain(self) -> float:
        return self.first_reward - self.second_reward


@dataclass(frozen=True)
class HeadToHead:
    """Two runs compared. ``notes`` say in a line each what could not be compared, and why.

    ``samples``: prompts on which the first gains most over the second, the reverse, and one where rewards are equal.
    """

    settings: tuple[SettingDifference, ...]
    metrics: tuple[MetricLine, ...]
    duel: Duel | None
    samples: tuple[Sample, ...]
    n_tests: int
    notes: tuple[str, ...]


def head_to_head(first: Run, second: Run, *, n_samples: int, n_bootstrap: int, seed: int) -> HeadToHead:
    """Compare two runs, as far as both came. Raises UserError if answers can't be read."""
    notes = []
    both = bool(first.rewards and second.rewards)
    common = [key for key in first.rewards if key in second.rewards]
    same_reward = first.settings.get("reward") == second.settings.get("reward")
    same_sft = all(first.rewards[key][1] == second.rewards[key][1] for key in common)
    if both and not common:
        notes.append(
            f"different prompts: A answered {len(first.rewards)}, B {len(second.rewards)}, none in common (other "
            "dataset, split or limits): nothing on prompts is paired"
        )
    elif both and not len(common) == len(first.rewards) == len(second.rewards):
        notes.append(
            f"different prompts: A answered {len(first.rewards)}, B {len(second.rewards)}; differences are over the "
            f"{len(common)} in common"
        )
    if both and not same_reward:
        notes.append("different rewards (reward=): numbers that depend on them are not paired, and no answer wins")
    if both and first.decoding != second.decoding:
        notes.append(
            f"different decoding (evaluation.sampling): A {first.decoding}, B {second.decoding}; differences may come "
            "from it"
        )
    if both and same_reward and common and not same_sft:
        notes.append("different SFT answers: each run's win rate and gain are against its own SFT model")
    texts = [sample_rows(run) if run.rewards else {} for run in (first, second)]
    lengths = [{key: float(len(row["policy_answer"])) for key, row in rows.items()} for rows in texts]

    plan = _on_prompts(first, second, paired=same_reward, gain_too=not same_sft)
    plan.append(_Metric("answer characters", (lengths[0], lengths[1]), crossed_mean, True))
    plan += [
        _Metric(name, (values_of_pairs(first, key), values_of_pairs(second, key)), interval, True)
        for name, key, interval in (
            ("held-out accuracy", "accuracy", crossed_rate),
            ("log p behind edit", "after_edit", crossed_mean),
        )
    ]
    duelling = same_reward and bool(common)
    n_tests = sum(one.paired and one.has_common for one in plan) + duelling
    lines = [one.line(n_bootstrap=n_bootstrap, seed=seed, comparisons=n_tests) for one in plan]
    duel = _duel(first, second, common, n_bootstrap=n_bootstrap, seed=seed) if duelling else None

    p_values = [line.p for line in lines if line.p is not None] + ([duel.p] if duel else [])
    adjusted = iter(holm(p_values))
    lines = [line if line.p is None else replace(line, p=next(adjusted)) for line in lines]
    if duel:
        duel = replace(duel, p=next(adjusted))
    by_name = {line.name: line for line in [*lines, *_from_results(first, second)]}
    return HeadToHead(
        settings=tuple(differences_of_settings(first.settings, second.settings)),
        metrics=tuple(line for name in _ORDER if (line := by_name[name]).first or line.second),
        duel=duel,
        samples=tuple(_samples(first, second, common, texts, n_samples)) if duelling else (),
        n_tests=n_tests,
        notes=tuple(notes),
    )


_ORDER = (
    "win rate against SFT",
    "strict win rate",
    "reward",
    "reward gain over SFT",
    "negative rewards",
    "answer tokens",
    "answer characters",
    "ended by itself",
    "KL, nats a token",
    "KL, nats an answer",
    "held-out accuracy",
    "log p behind edit",
    "seconds",
)


def _share(values: Array, *, n_bootstrap: int, seed: int) -> Interval:
    """The mean of (1, P) values that are 0 or 1, with Wilson's interval."""
    return Interval(float(values.mean()), *wilson(float(values.sum()), values.shape[1]))


@dataclass(frozen=True)
class _Metric:
    """Values of both runs by prompt or pair, and what gives a run's own interval from (1, P) of them."""

    name: str
    values: tuple[Values, Values]
    interval: Callable[..., Interval]
    paired: bool

    @property
    def has_common(self) -> bool:
        return not self.values[0].keys().isdisjoint(self.values[1])

    def line(self, *, n_bootstrap: int, seed: int, comparisons: int) -> MetricLine:
        """The metric's line, its p value not yet adjusted."""

        def measured(values: Values) -> Measured | None:
            if not values:
                return None
            found = self.interval(np.array([list(values.values())]), n_bootstrap=n_bootstrap, seed=seed)
            return Measured(found.value, found.low, found.high, len(values))

        sides = measured(self.values[0]), measured(self.values[1])
        if not (self.paired and self.has_common):
            return MetricLine(self.name, *sides)
        common = [key for key in self.values[0] if key in self.values[1]]
        own, other = (np.array([[values[key] for key in common]]) for values in self.values)
        difference, p = paired_difference(own, other, n_bootstrap=n_bootstrap, seed=seed, comparisons=comparisons)
        return MetricLine(self.name, *sides, difference, len(common), p)


def _on_prompts(first: Run, second: Run, *, paired: bool, gain_too: bool) -> list[_Metric]:
    """The metrics that come from rewards; with the same SFT rewards the gain differs as the reward does: one test."""

    def values(metric: str, share: Callable[[float], bool] | None = None) -> tuple[Values, Values]:
        found = [values_of_prompts(run.rewards, metric) if run.rewards else {} for run in (first, second)]
        if share is not None:
            found = [{key: float(share(value)) for key, value in one.items()} for one in found]
        return found[0], found[1]

    return [
        _Metric("win rate against SFT", values("win_rate"), crossed_rate, paired),
        _Metric("strict win rate", values("win_rate", lambda outcome: outcome == 1), _share, paired),
        _Metric("reward", values("reward"), crossed_mean, paired),
        _Metric("reward gain over SFT", values("reward_gain"), crossed_mean, paired and gain_too),
        _Metric("negative rewards", values("reward", lambda reward: reward < 0), _share, paired),
    ]


def _from_results(first: Run, second: Run) -> list[MetricLine]:
    """What only result.json has: means without the values behind them; the share of ended answers by Wilson."""

    def measured(run: Run, name: str, count: str | None) -> Measured | None:
        value = run.number(name)
        n = None if count is None else run.number(count)
        if value is None:
            return None
        low, high = wilson(round(value * n), int(n)) if n and name.endswith("_rate") else (None, None)
        return Measured(value, low, high, None if n is None else int(n))

    return [
        MetricLine(title, measured(first, name, count), measured(second, name, count))
        for title, name, count in (
            ("answer tokens", "length.policy.tokens", "n_prompts"),
            ("ended by itself", "length.policy.end_of_turn_rate", "n_prompts"),
            ("KL, nats a token", "kl.nats_per_token", "kl.n_tokens"),
            ("KL, nats an answer", "kl.nats_per_answer", "kl.n_answers"),
            ("seconds", "timings.total_seconds", None),
        )
    ]


def _duel(first: Run, second: Run, common: Sequence[str], *, n_bootstrap: int, seed: int) -> Duel:
    sides = [
        Entrant(name, None, np.array([[run.rewards[key][0] for key in common]]))
        for name, run in zip("AB", (first, second), strict=True)
    ]
    found = rank(sides, n_bootstrap=n_bootstrap, seed=seed)
    return Duel(
        rate=Interval(float(found.rate[0, 1]), float(found.low[0, 1]), float(found.high[0, 1])),
        n=len(common),
        wins=int(found.wins[0, 1]),
        ties=int(found.ties[0, 1]),
        losses=int(found.wins[1, 0]),
        p=float(found.p[0, 1]),
    )


def _samples(
    first: Run, second: Run, common: Sequence[str], texts: Sequence[Mapping[str, Mapping[str, str]]], n: int
) -> list[Sample]:
    """The n prompts of the largest gain, the n of the largest loss, and one of equal rewards for different answers."""
    found = [
        Sample(
            prompt_id=key,
            prompt=texts[0][key]["prompt"],
            first=texts[0][key]["policy_answer"],
            second=texts[1][key]["policy_answer"],
            reference=texts[0][key]["reference_answer"],
            first_reward=first.rewards[key][0],
            second_reward=second.rewards[key][0],
            reference_reward=first.rewards[key][1],
        )
        for key in sorted(common)
    ]
    gained = sorted((one for one in found if one.gain > 0), key=lambda one: -one.gain)
    lost = sorted((one for one in found if one.gain < 0), key=lambda one: one.gain)
    equal = sorted((one for one in found if one.gain == 0), key=lambda one: one.first == one.second)
    return [*gained[:n], *lost[:n], *equal[: min(n, 1)]]
