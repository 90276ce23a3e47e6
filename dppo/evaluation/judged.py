"""Judged pairs and answers with scores from rows of any file, checked: what an evaluation of foreign files starts from.

Rows come with their place (``file:line``), which every error names. Judged pairs are in AlpacaEval's columns, answers
with scores in those of our own samples.jsonl, or in a file for each of two models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from dppo.errors import UserError

Array = npt.NDArray[np.float64]
Placed = tuple[str, Mapping[str, object]]  # a row behind its place

DIFFICULTY = "instruction_difficulty"
PAIR_COLUMNS = ("prompt_id", "generator_1", "generator_2", "annotator", "len_1", "len_2", "output_1", "output_2")
PROMPT_COLUMNS = ("prompt_id", "prompt")
BOTH_REWARDS = ("policy_reward", "reference_reward")
BOTH_ANSWERS = ("policy_answer", "reference_answer")
WEIGHT_NAME = ""  # AlpacaEval leaves the column of model names without one
_EMPTY = ' (an empty answer is "" in JSON; in CSV it is none)'
MODEL_WEIGHT = "not_gamed_baseline.astype(float)"


@dataclass(frozen=True, eq=False)
class JudgedPairs:
    """What a judge preferred on P prompts; of two, "the model" is AlpacaEval's output_2, the reference output_1.

    ``outcomes`` (P,) in [0, 1]: the preference for the model, 1/2 a tie. ``lengths`` (2, P) characters of the model's
    and the reference's answers. ``average_length``: the model's over all rows, judged or not. ``n_dropped`` rows had
    no preference. What the file lacks is None.
    """

    outcomes: Array
    n_dropped: int
    lengths: Array | None
    average_length: float | None
    difficulty: Array | None
    answers: tuple[tuple[str, ...], tuple[str, ...]] | None
    model: str | None
    reference: str | None


@dataclass(frozen=True, eq=False)
class ScoredAnswers:
    """Rewards of two models on the same P prompts, in the same order, and their answers where they are known.

    ``n_unmatched``: prompts that only the first, or only the second of two files has.
    """

    policy_rewards: tuple[float, ...]
    reference_rewards: tuple[float, ...]
    answers: tuple[tuple[str, ...], tuple[str, ...]] | None
    n_unmatched: tuple[int, int] = (0, 0)


def judged_pairs(rows: Iterable[Placed], *, with_difficulty: bool = False) -> JudgedPairs:
    """Pairs from rows in AlpacaEval's columns, at least one.

    ``preference`` is 1 where output_1 is better, 2 where output_2 is, anything between for soft preferences; 0 means a
    tie, as in AlpacaEval, and null (or NaN) no judgement: such rows are dropped and counted. Lengths are ``len_1`` and
    ``len_2`` in characters, or those of ``output_1`` and ``output_2``.

    Raises UserError for a value that is none of this, a prompt_id that comes twice, rows of several models or judges,
    and if no row has a preference.
    """
    placed = list(rows)
    _check_unique(placed, "prompt_id", required=False)
    names = {column: _only(placed, column) for column in ("generator_1", "generator_2", "annotator")}
    kept = [
        (place, row, preference)
        for place, row in placed
        if (preference := _preference(place, row.get("preference"))) is not None
    ]
    if not kept:
        raise UserError(f"{_file(placed)}: no row of {len(placed)} has a preference; fill some in, from 1 to 2")
    judged = [(place, row) for place, row, _ in kept]
    measured = not all(_empty(row.get(column)) for _, row in judged for column in ("len_2", "output_2"))
    texts = all(isinstance(row.get(column), str) for _, row in judged for column in ("output_1", "output_2"))
    own = [_length(place, row, 2) for place, row in judged] if measured else []
    other = [_length(place, row, 1) for place, row in judged] if measured else []
    unjudged = [
        _length(place, row, 2)
        for place, row in placed
        if measured and _empty(row.get("preference")) and not (_empty(row.get("len_2")) and _empty(row.get("output_2")))
    ]
    return JudgedPairs(
        outcomes=np.array([preference - 1 for *_, preference in kept]),
        n_dropped=len(placed) - len(kept),
        lengths=np.array([own, other]) if measured else None,
        average_length=float(np.mean(own + unjudged)) if measured else None,
        difficulty=np.array([_number(place, DIFFICULTY, row.get(DIFFICULTY)) for place, row in judged])
        if with_difficulty
        else None,
        answers=(_texts(judged, "output_2"), _texts(judged, "output_1")) if texts else None,
        model=names["generator_2"],
        reference=names["generator_1"],
    )


def published_weights(rows: Iterable[Placed], model: str) -> tuple[float, float]:
    """(w_difficulty, w_model) of a model from rows of AlpacaEval's glm_weights.csv.

    Raises UserError if the model is not there once, or its weights are not numbers.
    """
    found = [(place, row) for place, row in rows if row.get(WEIGHT_NAME) is not None]
    own = [(place, row) for place, row in found if row[WEIGHT_NAME] == model]
    if len(own) != 1:
        known = ", ".join(str(row[WEIGHT_NAME]) for _, row in found[:5]) + (", ..." if len(found) > 5 else "")
        raise UserError(
            f"--model {model}: the weights need one row of this model and have {len(own)}; "
            f"their first column names {known}"
        )
    place, row = own[0]
    return _number(place, DIFFICULTY, row.get(DIFFICULTY)), _number(place, MODEL_WEIGHT, row.get(MODEL_WEIGHT))


def scored_answers(rows: Iterable[Placed]) -> ScoredAnswers:
    """Both models from one file, in the columns of samples.jsonl: BOTH_REWARDS and, if it has them, BOTH_ANSWERS.

    Raises UserError for rewards that are not finite numbers, answers that are not text, and a prompt that comes twice.
    """
    placed = list(rows)
    _check_unique(placed, _prompt_column(placed))
    own, other = (tuple(_number(place, name, row.get(name)) for place, row in placed) for name in BOTH_REWARDS)
    answered = any(row.get(name) is not None for _, row in placed for name in BOTH_ANSWERS)
    answers = (_texts(placed, BOTH_ANSWERS[0]), _texts(placed, BOTH_ANSWERS[1])) if answered else None
    return ScoredAnswers(own, other, answers)


def joined_answers(policy: Iterable[Placed], reference: Iterable[Placed]) -> ScoredAnswers:
    """Two models from a file each, with columns ``reward`` and perhaps ``answer``, joined by prompt_id, else by prompt.

    The order is that of the first file. Raises UserError as ``scored_answers`` does, and if no prompt is in both.
    """
    first, second = list(policy), list(reference)
    column = "prompt_id" if {_prompt_column(first), _prompt_column(second)} == {"prompt_id"} else "prompt"
    own, other = _check_unique(first, column), _check_unique(second, column)
    common = [key for key in own if key in other]
    if not common:
        raise UserError(
            f"{_file(first)} and {_file(second)}: none of their {len(own)} and {len(other)} prompts is in both, "
            f"by {column}; score the answers of both models to the same prompts"
        )
    pairs = [first[own[key]] for key in common], [second[other[key]] for key in common]
    rewards = [tuple(_number(place, "reward", row.get("reward")) for place, row in rows) for rows in pairs]
    answered = all(any(row.get("answer") is not None for _, row in rows) for rows in pairs)
    answers = (_texts(pairs[0], "answer"), _texts(pairs[1], "answer")) if answered else None
    unmatched = len(own) - len(common), len(other) - len(common)
    return ScoredAnswers(rewards[0], rewards[1], answers, unmatched)


def _preference(place: str, value: object) -> float | None:
    if _empty(value):
        return None
    found = _number(place, "preference", value)
    if found == 0:
        return 1.5
    if not 1 <= found <= 2:
        raise UserError(
            f"{place}: preference is {found:g}; it must be from 1 (output_1 is better) to 2 (output_2), "
            "0 for a tie, or empty"
        )
    return found


def _empty(value: object) -> bool:
    """Whether there is no value; NaN is how tables of numbers write that."""
    return value is None or (isinstance(value, float) and math.isnan(value))


def _number(place: str, column: str, value: object) -> float:
    if _empty(value):
        raise UserError(f"{place}: has no {column}; fill it in, or leave the row out")
    try:
        if isinstance(value, (int, float, str)) and not isinstance(value, bool) and math.isfinite(float(value)):
            return float(value)
    except (ValueError, OverflowError):
        pass
    raise UserError(f"{place}: {column} is {_shown(value)}, not a finite number; mend it, or leave the row out")


def _length(place: str, row: Mapping[str, object], which: int) -> float:
    """Characters of the answer 1 or 2 of a judged pair."""
    column, text = f"len_{which}", row.get(f"output_{which}")
    if _empty(row.get(column)) and isinstance(text, str):
        return float(len(text))
    if _empty(row.get(column)):
        raise UserError(f"{place}: has neither {column} nor output_{which}, and other rows do; fill one in{_EMPTY}")
    found = _number(place, column, row[column])
    if found < 0 or found != int(found):
        raise UserError(f"{place}: {column} is {found:g}; it must be a number of characters, 0 or more")
    return found


def _texts(rows: Iterable[Placed], column: str) -> tuple[str, ...]:
    texts = []
    for place, row in rows:
        text = row.get(column)
        if not isinstance(text, str):
            what = "has no" if text is None else "has, in place of text, a number or list as"
            raise UserError(f"{place}: {what} {column}; fill it in{_EMPTY}")
        texts.append(text)
    return tuple(texts)


def _only(rows: Sequence[Placed], column: str) -> str | None:
    """The one value of a column that names a model or a judge; None where the file doesn't."""
    names = list(dict.fromkeys(str(row[column]) for _, row in rows if row.get(column) is not None))
    if len(names) > 1:
        raise UserError(
            f"{_file(rows)}: column {column} names {len(names)}: {', '.join(map(_shown, names[:3]))}"
            f"{', ...' if len(names) > 3 else ''}; keep the rows of one"
        )
    return names[0] if names else None


def _prompt_column(rows: Sequence[Placed]) -> str:
    return next((name for name in PROMPT_COLUMNS if any(row.get(name) is not None for _, row in rows)), "prompt")


def _check_unique(rows: Sequence[Placed], column: str, *, required: bool = True) -> dict[str, int]:
    """Where each prompt is in ``rows``."""
    found: dict[str, int] = {}
    for number, (place, row) in enumerate(rows):
        value = row.get(column)
        if value is None and not required:
            continue
        if isinstance(value, bool) or not isinstance(value, (int, str)):
            known = " or ".join(PROMPT_COLUMNS) if column == "prompt" else column
            what = "has no" if value is None else f"{column} is neither text nor a whole number; needed:"
            raise UserError(f"{place}: {what} {known}, by which answers are joined; fill it in")
        key = str(value)
        if key in found:
            raise UserError(
                f"{place}: {column} {_shown(key)} comes twice, first at {rows[found[key]][0]}; keep one row a prompt"
            )
        found[key] = number
    return found


def _file(rows: Sequence[Placed]) -> str:
    """The file of these rows, from the place of the first."""
    place = rows[0][0]
    return place.rpartition(", row ")[0] or place.rpartition(":")[0]


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."
