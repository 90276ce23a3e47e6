"""Answers of the row before, for KTO's z as in TRL."""

from __future__ import annotations

from collections.abc import Sequence

from dppo.data.shapes import with_answers_of_the_row_before
from dppo.types import EncodedExample
from tests.tiny_models import example


def mismatched(examples: Sequence[EncodedExample]) -> dict[str, list[Sequence[int]]]:
    return {
        one.example_id: [answer.token_ids for answer in one.responses if answer.role == "mismatched"]
        for one in examples
    }


def test_the_rows_of_pairs_are_all_chosen_then_all_rejected_answers() -> None:
    pairs = [
        example(name, [number], ("chosen", [10 + number]), ("rejected", [20 + number]))
        for number, name in enumerate("abc")
    ]
    found = mismatched(with_answers_of_the_row_before(pairs, [pairs], None))
    assert found == {"a": [(22,), (12,)], "b": [(10,), (20,)], "c": [(11,), (21,)]}


def test_the_answer_of_the_row_before_is_cut_at_the_limit() -> None:
    pair = [example("a", [1, 2], ("desirable", [11])), example("b", [3], ("undesirable", [12, 13, 14, 15]))]
    found = mismatched(with_answers_of_the_row_before(pair, [pair], 4))
    assert found == {"a": [(12, 13)], "b": [(11,)]}
