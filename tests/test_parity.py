"""The comparison with TRL: that it can be run, and two of its rows."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest

from benchmarks import parity
from benchmarks.parity import CASES, Case, Comparison, Steps, compare, largest_difference
from dppo.config import compose, load

EXACT = Steps((1.0, 0.5), (3.0, 2.0))


def case(words: str) -> Case:
    """The first row for these words of dppo's command line."""
    return next(found for found in CASES if found.words == words)


@pytest.mark.parametrize("words", ["loss=dpo beta=0.1", "loss=kto beta=0.1 loss.z_scope=micro_batch"])
def test_loss_and_gradient_norm_are_those_of_trl(words: str) -> None:
    pytest.importorskip("trl", reason="the comparison with TRL needs the extra trl: pip install '.[trl]'")
    found = compare(case(words))
    assert len(found.dppo.losses) == 8
    assert found.dppo.losses[-1] < 0.7 * found.dppo.losses[0], "the model has to move"
    assert found.agrees, (found.loss_difference, found.grad_norm_difference)


@pytest.mark.parametrize("words", sorted({found.words for found in CASES}))
def test_every_row_is_a_command_line(words: str) -> None:
    overrides = [*words.split(), *parity.TRAIN, "train.epochs=1"]
    assert load(compose(overrides), overrides).phases


def test_differences_are_relative_to_the_larger_number() -> None:
    assert largest_difference((2.0, 1.0), (1.0, 1.0)) == 0.5
    assert largest_difference((0.0,), (0.0,)) == 0.0
    assert math.isinf(largest_difference((1.0,), (1.0, 1.0)))
    assert math.isinf(largest_difference((1.0, math.nan), (1.0, math.nan)))


def test_a_row_may_differ_only_for_a_reason() -> None:
    plain = case("loss=dpo beta=0.1")
    reasoned = replace(plain, differs="a reason")
    other = replace(EXACT, grad_norms=(3.0, 2.1))
    nan = replace(EXACT, losses=(1.0, math.nan))
    assert Comparison(plain, EXACT, EXACT).as_expected
    assert not Comparison(plain, EXACT, other).as_expected
    assert not Comparison(plain, nan, nan).as_expected
    assert Comparison(reasoned, EXACT, other).as_expected
    assert not Comparison(reasoned, EXACT, EXACT).as_expected
    assert "NOT AS EXPECTED, differ" in parity.table([Comparison(plain, EXACT, other)])


def test_text_is_read_as_the_tokens_it_was_made_of() -> None:
    tokenizer = parity.tokenizer()
    for example in parity.pairs():
        for answer in example.responses:
            ids = [*example.prompt_ids, *answer.token_ids]
            assert tokenizer(parity.text(ids))["input_ids"] == list(ids)
