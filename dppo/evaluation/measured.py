"""Every number of an evaluation of judged pairs, or of answers with scores, as plain data for a table or a JSON file.

The parts that a run's result.json also has are named and computed as there: ``win_rate`` and ``reward`` (with the same
resamples they are equal), and of ``length`` the characters. The others:

``n`` prompts; ``losses``; ``soft`` whether preferences lie between win, tie and loss; ``length_controlled``
(``LengthControlled``); ``text`` {policy, reference} (``TextHealth``); ``alpaca_eval``, AlpacaEval's own leaderboard
columns on its scale 0..100. What the input doesn't have is None. Intervals are 95 %.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from dppo.evaluation.judged import JudgedPairs, ScoredAnswers
from dppo.evaluation.length_controlled import length_controlled, published_form
from dppo.evaluation.text_health import text_health
from dppo.evaluation.win_rates import Array, compared_rewards, outcomes, win_rate_of


def measure_pairs(
    pairs: JudgedPairs, *, n_bootstrap: int, seed: int, weights: tuple[float, float] | None = None
) -> dict[str, Any]:
    """The numbers of judged pairs; ``weights`` are AlpacaEval's published (w_difficulty, w_model) of this model."""
    return {
        **_measure(pairs.outcomes, pairs.lengths, pairs.answers, n_bootstrap, seed),
        "reward": None,
        "alpaca_eval": alpaca_eval(pairs, weights),
        "n_dropped": pairs.n_dropped,
    }


def measure_scores(scored: ScoredAnswers, *, n_bootstrap: int, seed: int) -> dict[str, Any]:
    """The numbers of answers with scores.

    ``n_same_answer_other_score``: prompts on which both models said the same and were scored differently.
    """
    own, other = scored.policy_rewards, scored.reference_rewards
    answers = scored.answers
    lengths = None if answers is None else np.array([[len(text) for text in texts] for texts in answers], dtype=float)
    odd = 0
    if answers is not None:
        odd = sum(a == b and x != y for a, b, x, y in zip(*answers, own, other, strict=True))
    return {
        **_measure(outcomes(own, other), lengths, answers, n_bootstrap, seed),
        "reward": compared_rewards(own, other, n_bootstrap=n_bootstrap, seed=seed),
        "alpaca_eval": None,
        "n_unmatched": {"policy": scored.n_unmatched[0], "reference": scored.n_unmatched[1]},
        "n_same_answer_other_score": odd,
    }


def alpaca_eval(pairs: JudgedPairs, weights: tuple[float, float] | None = None) -> dict[str, Any]:
    """AlpacaEval's leaderboard columns, 0..100, named as there.

    ``win_rate`` is the mean preference for the model, ``standard_error`` its std (n - 1) / sqrt(n), None for one
    prompt, ``discrete_win_rate`` counts a preference above, at and below 1/2 as 1, 1/2 and 0, ``avg_length`` is in
    whole characters over all rows. The length-controlled columns need published weights.
    """
    found, n = pairs.outcomes, len(pairs.outcomes)
    published: tuple[float, float] | None = None
    if weights is not None and pairs.difficulty is not None:
        published = published_form(pairs.difficulty, difficulty_weight=weights[0], model_weight=weights[1])
    wins, draws = int((found > 0.5).sum()), int((found == 0.5).sum())
    return {
        "win_rate": 100 * float(found.mean()),
        "standard_error": 100 * float(found.std(ddof=1)) / math.sqrt(n) if n > 1 else None,
        "discrete_win_rate": 100 * (wins + draws / 2) / n,
        "n_wins": wins,
        "n_wins_base": n - wins - draws,
        "n_draws": draws,
        "n_total": n,
        "avg_length": None if pairs.average_length is None else int(pairs.average_length),
        "length_controlled_winrate": None if published is None else published[0],
        "lc_standard_error": None if published is None or math.isnan(published[1]) else published[1],
    }


def _measure(
    found: Array, lengths: Array | None, answers: Sequence[Sequence[str]] | None, n_bootstrap: int, seed: int
) -> dict[str, Any]:
    rate = win_rate_of(found, n_bootstrap=n_bootstrap, seed=seed)
    who = ("policy", "reference")
    return {
        "n": rate.n,
        "win_rate": asdict(rate),
        "losses": rate.n - rate.wins - rate.ties,
        "soft": not bool(np.isin(found, (0, 0.5, 1)).all()),
        "length_controlled": None
        if lengths is None
        else asdict(length_controlled(found, lengths[0] - lengths[1], seed=seed)),
        "length": None
        if lengths is None
        else {name: {"characters": float(row.mean())} for name, row in zip(who, lengths, strict=True)},
        "text": None
        if answers is None
        else {name: asdict(text_health(texts)) for name, texts in zip(who, answers, strict=True)},
        "bootstrap": {"n": n_bootstrap, "seed": seed},
    }
