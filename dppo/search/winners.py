"""How trials ended, and which of them are the best."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from dppo.search.samplers import Stratified
from dppo.search.study import STATUS, Study

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

# Of a Pareto front so many are scored on test prompts, spread over the first objective.
_MOST_RESULTS = 5


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
    """What a winning trial is called beside the baselines; another winner has another name."""
    told = f"trial {trial.number}"
    if isinstance(study.sampler, Stratified):
        own = {one.name: one for one in study.space.parameters}
        chosen = (own[name].word(trial.params[name]) for name in study.sampler.names if name in trial.params)
        return " ".join(["best", *chosen, told])
    return f"best {told}" if len(study.settings.direction) == 1 else told
