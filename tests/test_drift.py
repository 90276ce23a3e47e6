"""Exact KL between two models."""

from __future__ import annotations

import dataclasses
import math
import random
from collections.abc import Mapping
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

from dppo import logps
from dppo.evaluation.drift import exact_kl
from dppo.evaluation.edits import after_edit, pair_rows
from dppo.logps import ResponseScorer
from dppo.types import EncodedExample, Json
from tests.losses.pairs import logps as flat
from tests.tiny_models import VOCABULARY, draw, example, gpt2, llama


def answered(n: int = 7, seed: int = 0) -> list[EncodedExample]:
    """Prompts with one answer each, of 1 to 12 tokens."""
    generator = random.Random(seed)
    return [
        example(
            str(number),
            draw(generator, generator.randint(1, 12)),
            ("generated", draw(generator, generator.randint(1, 12))),
        )
        for number in range(n)
    ]


def naive(policy: PreTrainedModel, reference: PreTrainedModel, answers: list[EncodedExample]) -> list[list[float]]:
    """KL at every position of every answer, from the models' own logits and the definition."""
    found = []
    for item in answers:
        token_ids = torch.tensor([[*item.prompt_ids, *item.responses[0].token_ids]])
        with torch.no_grad():
            p = cast("Any", policy)(token_ids).logits[0].softmax(-1)
            q = cast("Any", reference)(token_ids).logits[0].softmax(-1)
        kl = (p * (p / q).log()).sum(-1)
        found.append(kl[len(item.prompt_ids) - 1 : -1].tolist())
    return found


@pytest.mark.parametrize("packing", ["packed", "padded"])
@pytest.mark.parametrize("budget", [1, 40, 10_000])
def test_kl_is_that_of_the_definition(packing: Any, budget: int, monkeypatch: pytest.MonkeyPatch) -> None:
    policy, reference, answers = llama(), gpt2(), answered()
    expected = naive(policy, reference, answers)
    n_tokens = sum(len(item.responses[0].token_ids) for item in answers)
    monkeypatch.setattr(logps, "_LOGITS_PER_CHUNK", 5 * VOCABULARY)
    found = exact_kl(ResponseScorer(policy, packing), ResponseScorer(reference, packing), answers, budget)
    assert (found.n_answers, found.n_tokens) == (7, n_tokens) == (7, sum(len(row) for row in expected))
    total = math.fsum(value for row in expected for value in row)
    assert found.nats_per_token == pytest.approx(total / n_tokens, rel=1e-9)
    assert found.nats_per_answer == pytest.approx(total / 7, rel=1e-9)
    assert found.nats_per_token > 0.1
    # The direction matters: KL(policy || reference), not the other one.
    back = exact_kl(ResponseScorer(reference, packing), ResponseScorer(policy, packing), answers, budget)
    assert back.nats_per_token != pytest.approx(found.nats_per_token, rel=1e-3)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_equal_models_have_a_kl_of_exactly_0(dtype: torch.dtype) -> None:
    found = exact_kl(
        ResponseScorer(llama(dtype=dtype), "packed"), ResponseScorer(llama(dtype=dtype), "packed"), answered(), 50
    )
    assert (found.nats_per_token, found.nats_per_answer) == (0.0, 0.0)


def test_kl_is_never_negative() -> None:
    """Between two nearly equal models rounding makes the sum negative in half of the cases."""
    found = []
    for seed in range(8):
        model, other = llama(dtype=torch.float32, seed=seed), llama(dtype=torch.float32, seed=seed)
        for value in other.parameters():
            value.data *= 1 + 1e-7
        scorers = ResponseScorer(model, "packed"), ResponseScorer(other, "packed")
        found.append(exact_kl(*scorers, answered(seed=seed), 10_000).nats_per_token)
    assert all(0 <= value < 1e-6 for value in found)
    assert 0 < found.count(0.0) < 8


def test_models_are_compared_without_dropout() -> None:
    policy, reference = gpt2(), gpt2(seed=1)
    expected = exact_kl(ResponseScorer(policy, "packed"), ResponseScorer(reference, "packed"), answered(), 50)
    policy.train()
    reference.train()
    found = exact_kl(ResponseScorer(policy, "packed"), ResponseScorer(reference, "packed"), answered(), 50)
    assert found == expected


def test_no_answers_are_refused() -> None:
    with pytest.raises(ValueError, match="no answers"):
        exact_kl(ResponseScorer(llama(), "packed"), ResponseScorer(llama(), "packed"), [], 50)


# --- behind the first edit -------------------------------------------------------------------------------------------


def test_rows_of_pairs_by_hand() -> None:
    """Pair a: edit at 1, tokens -0.2 (edited), -0.4, -0.6 behind it: -0.5. Pair b: only the edited token is left."""
    examples = [
        example("a", [5], ("chosen", [6, 7, 8, 9]), ("rejected", [6, 10, 8])),
        example("b", [5], ("chosen", [6, 7]), ("rejected", [6])),
    ]
    policy = flat(
        {"chosen": [-0.1, -0.2, -0.4, -0.6], "rejected": [-0.1, -1.0, -2.0]},
        {"chosen": [-0.3, -0.7], "rejected": [-0.3]},
    )
    reference = dataclasses.replace(policy, tokens=policy.tokens * 2)
    first, second = pair_rows(examples, policy, reference)
    assert (first.edit, second.edit) == (1, 1)
    assert (first.chosen, first.rejected, first.reference_chosen) == pytest.approx((-1.3, -3.1, -2.6))
    assert (first.after_edit, first.reference_after_edit) == pytest.approx((-0.5, -1.0))
    assert first.by_distance == pytest.approx((-0.2, -0.4, -0.6))
    assert (second.after_edit, second.reference_after_edit, second.by_distance) == (None, None, (-0.7,))
    found: Any = after_edit([row.to_json() for row in (first, second)], n_bootstrap=100, seed=0)
    assert found["n_pairs"] == 1
    assert found["delta"] == {"value": 0.5, "ci_low": 0.5, "ci_high": 0.5}
    assert [row["n_pairs"] for row in found["by_distance"]] == [2, 1, 1]
    assert found["by_distance"][0]["policy"] == pytest.approx(-0.45)
    assert found["by_distance"][2]["reference"] == pytest.approx(-1.2)
    assert after_edit([second.to_json()], n_bootstrap=100, seed=0) == {}


def test_the_interval_behind_the_edit_is_over_pairs() -> None:
    rows: list[Mapping[str, Json]] = [
        {"after_edit": -1.0 - 0.1 * n, "reference_after_edit": -1.0, "by_distance": [], "reference_by_distance": []}
        for n in range(40)
    ]
    found: Any = after_edit(rows, n_bootstrap=2000, seed=0)
    half = 1.96 * 0.1 * math.sqrt((40**2 - 1) / 12) / math.sqrt(40)
    assert found["policy"]["value"] == pytest.approx(-2.95)
    assert found["policy"]["ci_high"] - found["policy"]["value"] == pytest.approx(half, rel=0.1)
    assert found["reference"] == {"value": -1.0, "ci_low": -1.0, "ci_high": -1.0}
