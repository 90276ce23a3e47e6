"""Likelihood of chosen answers behind the first token in which chosen and rejected differ.

Where pairs differ in few tokens, DPO lowers it and DPO-Positive keeps it (Pal 2024, "Smaug", arXiv 2402.13228).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from dppo.batches import shared_prefix
from dppo.evaluation.win_rates import crossed_mean
from dppo.types import EncodedExample, Json, ResponseLogps

LONGEST = 16  # distances that are told apart


@dataclass(frozen=True, slots=True)
class PairRow:
    """One held-out pair under one model and the reference: log-probs in nats, sums over an answer's tokens.

    ``by_distance`` holds the token log-probs of the chosen answer from the first edit on, at most ``LONGEST`` + 1 of
    them, ``after_edit`` the mean of all behind the edited token; None where there is none.
    """

    example_id: str
    edit: int  # place of the first token that differs
    chosen: float
    rejected: float
    reference_chosen: float
    reference_rejected: float
    after_edit: float | None
    reference_after_edit: float | None
    by_distance: tuple[float, ...]
    reference_by_distance: tuple[float, ...]

    def to_json(self) -> dict[str, Json]:
        return {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(self).items()}


def pair_rows(examples: Sequence[EncodedExample], policy: ResponseLogps, reference: ResponseLogps) -> list[PairRow]:
    """A row for each of the pairs, whose log-probs are given in the same order."""
    tokens = {
        (who, role): list(logps.select(role).tokens.double().cpu().split(logps.select(role).lengths.tolist()))
        for who, logps in (("policy", policy), ("reference", reference))
        for role in ("chosen", "rejected")
    }
    rows = []
    for place, example in enumerate(examples):
        chosen, rejected = example.response("chosen"), example.response("rejected")
        assert chosen is not None and rejected is not None
        edit = shared_prefix(chosen.token_ids, rejected.token_ids)
        behind = {who: tokens[who, "chosen"][place][edit:].tolist() for who in ("policy", "reference")}
        means = {who: sum(found[1:]) / (len(found) - 1) if len(found) > 1 else None for who, found in behind.items()}
        rows.append(
            PairRow(
                example_id=example.example_id,
                edit=edit,
                chosen=float(tokens["policy", "chosen"][place].sum()),
                rejected=float(tokens["policy", "rejected"][place].sum()),
                reference_chosen=float(tokens["reference", "chosen"][place].sum()),
                reference_rejected=float(tokens["reference", "rejected"][place].sum()),
                after_edit=means["policy"],
                reference_after_edit=means["reference"],
                by_distance=tuple(behind["policy"][: LONGEST + 1]),
                reference_by_distance=tuple(behind["reference"][: LONGEST + 1]),
            )
        )
    return rows


def after_edit(rows: Sequence[Mapping[str, Json]], *, n_bootstrap: int, seed: int) -> dict[str, Json]:
    """Mean token log-prob behind the first edit over the pairs of ``pairs.jsonl`` that have such tokens.

    ``policy``, ``reference`` and ``delta`` with 95 % intervals (bootstrap over pairs), ``n_pairs``, and
    ``by_distance``: for each distance from the edited token (0 is the token itself) both means and their number.
    Empty without such a pair.
    """
    found = [row for row in rows if row["after_edit"] is not None]
    if not found:
        return {}
    own, other = (
        np.array([row[name] for row in found], dtype=float) for name in ("after_edit", "reference_after_edit")
    )
    values: dict[str, Json] = {"n_pairs": len(found)}
    for name, column in (("policy", own), ("reference", other), ("delta", own - other)):
        interval = crossed_mean(column[None], n_bootstrap=n_bootstrap, seed=seed)
        values[name] = {"value": interval.value, "ci_low": interval.low, "ci_high": interval.high}
    columns = {"policy": _by_distance(rows, "by_distance"), "reference": _by_distance(rows, "reference_by_distance")}
    values["by_distance"] = [
        {
            "distance": distance,
            "n_pairs": len(columns["policy"][distance]),
            **{who: math.fsum(parts[distance]) / len(parts[distance]) for who, parts in columns.items()},
        }
        for distance in sorted(columns["policy"])
    ]
    return values


def _by_distance(rows: Sequence[Mapping[str, Json]], name: str) -> dict[int, list[float]]:
    found: dict[int, list[float]] = {}
    for row in rows:
        values = row[name]
        assert isinstance(values, list)
        for distance, value in enumerate(values):
            found.setdefault(distance, []).append(float(value))
    return found
