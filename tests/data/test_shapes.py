"""What losses of labelled answers make of examples: one row a prompt, and answers to other prompts."""

from __future__ import annotations

import dataclasses
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dppo.data.shapes import one_row_per_prompt, with_answers_of_the_row_before, with_answers_to_other_prompts
from dppo.errors import UserError
from dppo.types import EncodedExample
from tests.tiny_models import example


def labelled(prompts: list[int]) -> list[EncodedExample]:
    """One row each; equal numbers are equal prompts. The answer's token is the row's place."""
    rows = []
    for place, prompt in enumerate(prompts):
        row = example(f"row-{place}", [prompt + 3], ("desirable", [place + 3]))
        rows.append(dataclasses.replace(row, prompt_id=f"prompt {prompt}"))
    return rows


def received(examples: tuple[EncodedExample, ...]) -> list[list[int]]:
    """The tokens of the answers to other prompts that each example has been given."""
    return [
        [token for one in item.responses if one.role == "mismatched" for token in one.token_ids] for item in examples
    ]


@given(st.lists(st.integers(0, 5), min_size=2, max_size=24).filter(lambda prompts: len(set(prompts)) > 1))
def test_every_row_gets_one_answer_to_another_prompt(prompts: list[int]) -> None:
    examples = labelled(prompts)
    found = with_answers_to_other_prompts(examples, None, seed=0)
    assert [item.example_id for item in found] == [item.example_id for item in examples]
    given_away = [answers for (answers,) in received(found)]
    assert all(prompts[answer - 3] != prompts[place] for place, answer in enumerate(given_away))
    if 2 * max(Counter(prompts).values()) <= len(prompts):
        assert sorted(given_away) == list(range(3, len(prompts) + 3))  # a permutation: each answer once
    turned = with_answers_to_other_prompts(examples[::-1], None, seed=0)
    assert received(turned)[::-1] == received(found)  # drawn by content, not by place


def test_another_seed_draws_other_answers_and_pairs_get_two() -> None:
    pairs = [example(f"p{n}", [n + 3], ("chosen", [n + 3, 9]), ("rejected", [n + 3, 8])) for n in range(8)]
    first, second = (with_answers_to_other_prompts(pairs, None, seed=seed) for seed in (0, 1))
    assert received(first) != received(second)
    for one in first:
        assert [response.role for response in one.responses] == ["chosen", "rejected", "mismatched", "mismatched"]


def test_given_answers_are_cut_to_fit_and_keep_the_id_of_what_is_left() -> None:
    examples = [example("a", [3] * 6, ("chosen", [4, 5])), example("b", [7], ("chosen", [8] * 9))]
    first, second = with_answers_to_other_prompts(examples, 10, seed=0)
    assert first.responses[-1].token_ids == (8, 8, 8, 8)
    assert first.responses[-1].response_id != examples[1].responses[0].response_id
    assert second.responses[-1].token_ids == (4, 5)
    assert second.responses[-1].response_id == examples[0].responses[0].response_id


def test_answers_to_one_prompt_only_are_refused_with_the_way_out() -> None:
    with pytest.raises(UserError, match=r"loss\.z0=zero"):
        with_answers_to_other_prompts(labelled([1, 1, 1]), None, seed=0)


def test_the_row_before_is_that_of_the_same_batch_and_the_first_takes_the_last() -> None:
    rows = labelled([0, 1, 2, 3, 4])
    found = with_answers_of_the_row_before(rows, [[rows[4], rows[0]], [rows[2], rows[1], rows[3]]], None)
    # batches 4 0 | 2 1 3: 4 takes 0's answer, 0 takes 4's; 2 takes 3's, 1 takes 2's, 3 takes 1's
    assert received(found) == [[7], [5], [6], [4], [3]]
    pair = example("pair", [3], ("chosen", [4]), ("rejected", [5]))
    (alone,) = with_answers_of_the_row_before([pair], [[pair]], None)
    assert received((alone,)) == [[5, 4]]


def test_one_row_of_each_prompt_is_drawn_by_content() -> None:
    pairs = [example(f"p{n}", [n + 3], ("chosen", [n + 3, 9]), ("rejected", [n + 3, 8])) for n in range(40)]
    found = one_row_per_prompt(pairs, seed=0)
    assert [item.prompt_id for item in found] == [item.prompt_id for item in pairs]
    kinds = Counter(item.responses[0].role for item in found)
    assert all(len(item.responses) == 1 for item in found)
    assert min(kinds["chosen"], kinds["rejected"]) >= 8
    assert one_row_per_prompt(pairs[::-1], seed=0)[::-1] == found
    assert len(one_row_per_prompt(labelled([1, 2, 1, 1, 2]), seed=0)) == 2
