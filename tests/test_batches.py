"""Optimiser batches, their cuts and their layout."""

from __future__ import annotations

import dataclasses
import math
import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from dppo.batches import batches, collate, micro_batches
from dppo.types import EncodedExample, EncodedResponse
from tests.tiny_models import example, pairs

TOKENS = st.lists(st.integers(0, 60), min_size=1, max_size=6)
EXAMPLES = st.lists(st.tuples(TOKENS, st.lists(TOKENS, min_size=1, max_size=5)), min_size=1, max_size=6).map(
    lambda drawn: [
        example(str(number), prompt, *(("ranked", answer) for answer in answers))
        for number, (prompt, answers) in enumerate(drawn)
    ]
)


def names(made: list[list[EncodedExample]]) -> list[list[str]]:
    return [[item.example_id for item in batch] for batch in made]


# --- optimiser batches -----------------------------------------------------------------------------------------------


@given(n=st.integers(1, 20), size=st.integers(1, 7), steps=st.integers(1, 12), shuffle=st.randoms())
@settings(deadline=None)
def test_order_depends_on_seed_and_ids_only(n: int, size: int, steps: int, shuffle: random.Random) -> None:
    examples = pairs(n)
    others = list(examples)
    shuffle.shuffle(others)
    expected = names(list(batches(examples, size, steps, seed=3)))
    assert len(expected) == steps
    assert names(list(batches(others, size, steps, seed=3))) == expected


@given(n=st.integers(1, 20), size=st.integers(1, 7), epochs=st.integers(1, 3))
@settings(deadline=None)
def test_every_epoch_has_every_example_once(n: int, size: int, epochs: int) -> None:
    examples = pairs(n)
    per_epoch = math.ceil(n / size)
    made = names(list(batches(examples, size, epochs * per_epoch, seed=0)))
    for epoch in range(epochs):
        part = made[epoch * per_epoch : (epoch + 1) * per_epoch]
        assert [len(batch) for batch in part[:-1]] == [size] * (per_epoch - 1)
        assert sorted(name for batch in part for name in batch) == sorted(item.example_id for item in examples)


def test_seeds_and_epochs_have_orders_of_their_own() -> None:
    examples = pairs(10)
    first, second = names(list(batches(examples, 10, 2, seed=0)))
    (other,) = names(list(batches(examples, 10, 1, seed=1)))
    assert len({tuple(first), tuple(second), tuple(other)}) == 3


def test_the_order_is_the_same_on_every_machine_and_in_every_version() -> None:
    """In the order of sha256("seed:epoch:id"), so that a cached or published run can be repeated."""
    examples = [example(name, [1], ("chosen", [2])) for name in "abcde"]
    assert names(list(batches(examples, 2, 4, seed=0))) == [["a", "c"], ["b", "d"], ["e"], ["b", "e"]]


def test_no_examples_are_refused() -> None:
    with pytest.raises(ValueError, match="no examples"):
        list(batches([], 2, 1, seed=0))


# --- micro-batches ---------------------------------------------------------------------------------------------------


@given(examples=EXAMPLES, budget=st.integers(1, 80), shuffle=st.randoms())
@settings(deadline=None)
def test_micro_batches_hold_every_example_once_within_the_budget(
    examples: list[EncodedExample], budget: int, shuffle: random.Random
) -> None:
    parts = micro_batches(examples, budget)
    assert sorted(name for part in names(parts) for name in part) == sorted(item.example_id for item in examples)
    for part in parts:
        assert len(part) == 1 or sum(item.n_tokens for item in part) <= budget
    lengths = [item.n_tokens for part in parts for item in part]
    assert lengths == sorted(lengths)
    for left, right in pairwise(parts):  # no cut without need
        assert sum(item.n_tokens for item in left) + right[0].n_tokens > budget
    others = list(examples)
    shuffle.shuffle(others)
    assert names(micro_batches(others, budget)) == names(parts)


def test_an_example_above_the_budget_stands_alone() -> None:
    small = [example(name, [1], ("chosen", [2])) for name in "ab"]
    large = example("c", [1] * 5, ("chosen", [2] * 5))
    assert names(micro_batches([large, *small], 4)) == [["a", "b"], ["c"]]
    assert names(micro_batches([large, *small], 100)) == [["a", "b", "c"]]


# --- layout ----------------------------------------------------------------------------------------------------------


def test_collate_golden() -> None:
    """Example a: prompt 5 6, chosen 7 8 9, generated 7 8 1; example b: prompt 4, chosen 3, generated 3.

    Flat row: 5 6 | 7 8 9 | 7 8 1 || 4 | 3 | 3, at places 0 1 | 2 3 4 | 5 6 7 || 8 | 9 | 10.
    """
    a = example("a", [5, 6], ("chosen", [7, 8, 9]), ("generated", [7, 8, 1]))
    b = example("b", [4], ("chosen", [3]), ("generated", [3]))
    b = dataclasses.replace(b, responses=(dataclasses.replace(b.responses[0], score=0.5), b.responses[1]))
    batch = collate([a, b])
    assert batch.token_ids.tolist() == [5, 6, 7, 8, 9, 7, 8, 1, 4, 3, 3]
    assert batch.positions.tolist() == [0, 1, 2, 3, 4, 2, 3, 4, 0, 1, 1]
    assert batch.prompt_start.tolist() == [0, 8]
    assert batch.prompt_length.tolist() == [2, 1]
    assert batch.response_start.tolist() == [2, 5, 9, 10]
    assert batch.lengths.tolist() == [3, 3, 1, 1]
    assert batch.example.tolist() == [0, 0, 1, 1]
    assert batch.roles == ("chosen", "generated", "chosen", "generated")
    assert batch.predict_from.tolist() == [1, 2, 3, 1, 5, 6, 8, 8]
    assert batch.targets.tolist() == [7, 8, 9, 7, 8, 1, 3, 3]
    assert batch.example_ids == ("a", "b")
    assert batch.response_keys == (
        ("prompt of a", "a/0"),
        ("prompt of a", "a/1"),
        ("prompt of b", "b/0"),
        ("prompt of b", "b/1"),
    )
    assert batch.scores.isnan().tolist() == [True, True, False, True] and batch.scores[2] == 0.5
    assert batch.shared_prefix.tolist() == [2, 1]
    assert batch.equal_to_chosen.tolist() == [False, True]
    assert batch.n_examples == 2


def test_shared_prefix_needs_both_answers() -> None:
    batch = collate(
        [
            example("no y_g", [1], ("chosen", [2, 3]), ("rejected", [2, 3])),
            example("no chosen", [1], ("generated", [2, 3])),
            example("prefix", [1], ("chosen", [2, 3, 4]), ("generated", [2, 3])),
        ]
    )
    assert batch.shared_prefix.tolist() == [0, 0, 2]
    assert batch.equal_to_chosen.tolist() == [False, False, False]


@given(EXAMPLES)
@settings(deadline=None)
def test_every_token_is_laid_out_once_and_predicted_by_the_one_before_it(examples: list[EncodedExample]) -> None:
    batch = collate(examples)
    flat = [
        token
        for item in examples
        for part in (item.prompt_ids, *(answer.token_ids for answer in item.responses))
        for token in part
    ]
    assert batch.token_ids.tolist() == flat
    assert batch.targets.tolist() == [
        token for item in examples for answer in item.responses for token in answer.token_ids
    ]
    place = iter(batch.predict_from.tolist())
    for item in examples:
        for answer in item.responses:
            sequence = (*item.prompt_ids, *answer.token_ids)
            for position in range(len(item.prompt_ids), len(sequence)):
                before = next(place)
                assert batch.token_ids[before] == sequence[position - 1]
                assert batch.positions[before] == position - 1
    assert next(place, None) is None
    starts = batch.response_start.tolist()
    assert [batch.token_ids[start].item() for start in starts] == [
        answer.token_ids[0] for item in examples for answer in item.responses
    ]


def test_empty_prompts_and_responses_are_refused() -> None:
    with pytest.raises(ValueError, match="example x has an empty prompt"):
        collate([example("x", [], ("chosen", [1]))])
    with pytest.raises(ValueError, match="example x has an empty rejected response"):
        collate([example("x", [1], ("chosen", [1]), ("rejected", []))])


def test_to_moves_every_tensor() -> None:
    batch = collate([example("x", [1], ("chosen", [1]))]).to(torch.device("meta"))
    tensors = [getattr(batch, field.name) for field in dataclasses.fields(batch)]
    devices = {value.device.type for value in tensors if isinstance(value, torch.Tensor)}
    assert devices == {"meta"}
    assert batch.example_ids == ("x",)


def test_n_tokens_counts_the_prompt_once() -> None:
    item = EncodedExample(
        "e", "p", (1, 2, 3), (EncodedResponse("a", "chosen", (4,)), EncodedResponse("b", "rejected", (5, 6)))
    )
    assert item.n_tokens == 6 == len(collate([item]).token_ids)
