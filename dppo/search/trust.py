"""How far a search can be trusted: whether interim values foretold the final ones, and what seeds alone move."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from dppo.evaluation.win_rates import Interval
from dppo.search.measured import by_prompt
from dppo.search.overview import BaselineLine, Overview, TrialLine
from dppo.search.study import SEEDS, Study, folder
from dppo.search.winners import state

# The gain that a search should be able to see, and the factor of its variance for 80 % power at 5 %, two-sided.
_GAIN, _POWER = 0.02, (1.959964 + 0.841621) ** 2


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> Interval:
    """Spearman's rho of two rankings, ties shared, with Fisher's 95 % interval (NaN bounds below 4 pairs)."""
    ranks = [_ranks(np.asarray(values, dtype=np.float64)) for values in (first, second)]
    if min(float(own.std()) for own in ranks) == 0:
        return Interval(math.nan, math.nan, math.nan)
    rho = float(np.corrcoef(*ranks)[0, 1])
    if len(first) < 4 or abs(rho) > 1 - 1e-9:
        return Interval(rho, math.nan, math.nan)
    half = 1.96 * 1.03 / math.sqrt(len(first) - 3)  # the variance of a rank correlation is some 6 % larger
    return Interval(rho, math.tanh(math.atanh(rho) - half), math.tanh(math.atanh(rho) + half))


def _ranks(values: Any) -> Any:
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(counts)
    return (ends - (counts - 1) / 2)[place]


def foretold(found: Overview) -> list[str]:
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


def noise(study: Study, found: Overview) -> list[str]:
    """How much seeds alone move the objective, and what it takes to see a small gain."""
    if found.objectives[0] not in ("objective", "win_rate.value"):
        return []
    by_seed = [list(trial.user_attrs.get(SEEDS, {}).values()) for trial in study.trials() if state(trial) == "complete"]
    groups = [[values[0] for values in seeds] for seeds in by_seed]
    for part in ("baselines", "results"):
        for runs in study.side_runs_of(part).values():
            groups.append([run["values"][0] for run in runs.values() if run["state"] == "complete"])
    groups = [values for values in groups if len(values) > 1]
    lines = []
    known = [(one.objectives[0].value, one) for one in found.baselines if one.objectives]
    base = max(known, key=lambda pair: pair[0])[1] if known else None
    winner = next((one for one in found.trials if one.number in found.winners), None)
    lead = ""
    if base is not None and base.objectives and winner is not None and winner.objectives:
        gain = winner.objectives[0].value - base.objectives[0].value
        told = f"leads {base.name} by {gain:.3f}" if gain >= 0 else f"is {-gain:.3f} behind {base.name}"
        lead = f"; the best trial {told}, chosen among {len(found.trials)}"
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
    own = list(study.places(winner.number, winner.seeds).values())
    other = [study.directory / "baselines" / folder(base.name) / f"seed={seed}" for seed in base.seeds]
    if not own or not all((place / "samples.jsonl").exists() for place in (*own, *other)):
        return None
    first, second = by_prompt(own), by_prompt(other)
    both = [first[key] - second[key] for key in first if key in second]
    return float(np.var(both, ddof=1)) if len(both) > 1 else None
