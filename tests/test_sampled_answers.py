"""Sampled answers: from the model's distribution, and the same whatever else is in the batch."""

from __future__ import annotations

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from dppo.errors import UserError
from dppo.generation import Greedy, Sampled
from dppo.generation.sampled import drawn
from tests.test_generation import (  # noqa: F401
    ENDS,
    PROMPTS,
    WIDTH,
    Watch,
    answers,
    read_and_written,
    rows,
    windowed,
    words,
)
from tests.tiny_models import VOCABULARY, gpt2, llama

# The 99.9 % quantile of the chi-square distribution with seven degrees of freedom; an upper bound for fewer.
CHI_SQUARE = 24.32


def sampled(
    model: PreTrainedModel,
    prompts: Sequence[tuple[str, Sequence[int]]] = PROMPTS,
    *,
    n_answers: int = 4,
    temperature: float = 0.8,
    top_p: float = 0.95,
    seed: int = 0,
    max_new_tokens: int = 10,
    tokens_per_batch: int = 100_000,
) -> dict[str, list[tuple[int, ...]]]:
    """The token ids of all answers by prompt."""
    settings = Sampled(max_new_tokens, tokens_per_batch, "fp32", n_answers, temperature, top_p, seed)
    found: dict[str, list[tuple[int, ...]]] = {}
    for batch in settings.generate(model, prompts, ENDS, words):
        for answer in batch:
            found.setdefault(answer.prompt_id, []).append(answer.token_ids)
    assert {len(given) for given in found.values()} <= {n_answers}
    assert found.keys() == {prompt_id for prompt_id, _ in prompts}
    return found


def chi_square(seen: Mapping[int, int], expected: Tensor) -> float:
    """Sum of (seen - expected)^2 / expected over the tokens that have probability; others must not be seen."""
    n = sum(seen.values())
    assert all(expected[token] > 0 for token in seen)
    return math.fsum(
        (seen.get(token, 0) - n * share) ** 2 / (n * share) for token, share in enumerate(expected.tolist()) if share
    )


LOGITS = torch.tensor([1.5, -0.5, 0.0, 2.0, 0.7, -1.0, 1.1, 0.3])


def draws(temperature: float, top_p: float, n: int = 20_000) -> Counter[int]:
    generator = random.Random(3)
    shares = torch.tensor([generator.random() for _ in range(n)], dtype=torch.float64)
    return Counter(drawn(LOGITS.expand(n, -1), shares, temperature, top_p).tolist())


def test_tokens_come_from_the_distribution_at_the_temperature() -> None:
    for temperature in (0.5, 0.8, 1.0, 2.0):
        seen = draws(temperature, 1.0)
        assert chi_square(seen, torch.softmax(LOGITS / temperature, -1)) < CHI_SQUARE
        for wrong in (temperature * 1.1, temperature / 1.1):
            assert chi_square(seen, torch.softmax(LOGITS / wrong, -1)) > CHI_SQUARE


def test_top_p_keeps_the_smallest_set_that_reaches_it() -> None:
    """At temperature 1 the tokens by probability: 3 (.365), 0 (.221), 6 (.148), 4 (.100), 7 (.067), ..."""
    whole = torch.softmax(LOGITS, -1)
    for top_p, kept in ((0.3, [3]), (0.5, [3, 0]), (0.73, [3, 0, 6]), (0.74, [3, 0, 6, 4]), (0.90, [3, 0, 6, 4, 7])):
        expected = torch.zeros(8)
        expected[kept] = whole[kept] / whole[kept].sum()
        seen = draws(1.0, top_p)
        assert set(seen) == set(kept)
        assert chi_square(seen, expected) < CHI_SQUARE
    # The temperature comes first: at 2 three tokens reach less.
    assert set(draws(2.0, 0.73)) > {3, 0, 6, 4}


def test_a_token_without_probability_is_never_drawn() -> None:
    logits = torch.tensor([[-torch.inf, 1.0, -torch.inf, 1.0, -torch.inf]])
    shares = [0.0, 0.4999, 0.5001, 1 - 2.0**-53]
    found = [int(drawn(logits, torch.tensor([share], dtype=torch.float64), 1.0, 1.0)) for share in shares]
    assert found == [1, 1, 3, 3]


def test_the_answers_of_a_model_have_its_probabilities() -> None:
    """First tokens, and second ones behind the most frequent first: the cache of the prompt is that of every answer."""
    model = llama(dtype=torch.float32, initializer_range=0.2)
    prompt = PROMPTS[5][1]
    settings = Sampled(2, 1_000_000, "fp32", 3000, 0.7, 1.0, 0)
    (batch,) = settings.generate(model, [("a", prompt)], frozenset(), words)
    first = Counter(answer.token_ids[0] for answer in batch)
    top = first.most_common(1)[0][0]
    second = Counter(answer.token_ids[1] for answer in batch if answer.token_ids[0] == top)
    assert sum(second.values()) > 200
    for seen, given in ((first, prompt), (second, [*prompt, top])):
        logits = cast("Any", model)(input_ids=torch.tensor([given])).logits[0, -1].detach()
        for temperature, agrees in ((0.7, True), (1.0, False)):
            expected = torch.softmax(logits / temperature, -1)
            common = [token for token in range(VOCABULARY) if expected[token] * sum(seen.values()) >= 5]
            pooled = torch.tensor([*expected[common].tolist(), 1 - float(expected[common].sum())])
            counts = {place: seen[token] for place, token in enumerate(common)}
            counts[len(common)] = sum(seen.values()) - sum(counts.values())
            # The 99.9 % quantile by Wilson and Hilferty's approximation.
            df = len(common)
            limit = df * (1 - 2 / (9 * df) + 3.09 * (2 / (9 * df)) ** 0.5) ** 3
            assert (chi_square(counts, pooled) < limit) == agrees


@pytest.mark.parametrize("build", [llama, gpt2, windowed])
def test_an_answer_depends_on_seed_prompt_and_number_alone(build: Any) -> None:
    model = build()
    whole = sampled(model)
    assert len({answer for given in whole.values() for answer in given}) > 80
    assert len({len(answer) for given in whole.values() for answer in given}) > 5
    assert sampled(model, tokens_per_batch=1) == whole
    assert sampled(model, random.Random(1).sample(PROMPTS, len(PROMPTS)), tokens_per_batch=500) == whole
    some = PROMPTS[3:9]
    assert sampled(model, some) == {key: whole[key] for key, _ in some}
    more = sampled(model, some, n_answers=6)
    assert {key: given[:4] for key, given in more.items()} == {key: whole[key] for key, _ in some}
    assert all(given[4:] != given[:2] for given in more.values())
    assert sampled(model, some, seed=1) != {key: whole[key] for key, _ in some}
    renamed = sampled(model, [(f"other {key}", ids) for key, ids in some])
    assert all(renamed[f"other {key}"] != whole[key] for key, _ in some)


def test_the_prompt_is_computed_once_and_rows_leave(rows: Watch) -> None:  # noqa: F811
    model = llama()
    seen = rows(model)
    sampled(model)
    read, written = read_and_written(seen)
    assert read[-1][1] == WIDTH
    assert written[0][0] <= 24 * 4 and written[0][0] > 24 * 2
    assert {columns for _, columns in written} == {1}
    sizes = [n_rows for n_rows, _ in written]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 2


def test_the_budget_counts_all_answers_of_a_prompt(rows: Watch) -> None:  # noqa: F811
    model = llama()
    seen = rows(model)
    sampled(model, tokens_per_batch=4 * (WIDTH + 10))
    assert max(n_rows for n_rows, columns in seen if columns == 1) <= 4 * (WIDTH + 10) // 11


@pytest.mark.parametrize(("temperature", "top_p"), [(1e-4, 1.0), (1.0, 1e-6)])
def test_without_choice_the_answers_are_greedy(temperature: float, top_p: float) -> None:
    model = llama()
    greedy = answers(model, max_new_tokens=10)
    found = sampled(model, n_answers=2, temperature=temperature, top_p=top_p)
    assert found == {key: [answer.token_ids] * 2 for key, answer in greedy.items()}


def test_what_decides_the_texts_is_the_identity() -> None:
    settings: dict[str, Any] = {
        "max_new_tokens": 8, "tokens_per_batch": 100, "precision": "fp32", "n_answers": 4, "temperature": 0.8,
        "top_p": 0.9, "seed": 0,
    }  # fmt: skip
    own = Sampled(**settings).identity()
    assert Sampled(**{**settings, "tokens_per_batch": 7}).identity() == own
    for change in ({"max_new_tokens": 9}, {"precision": "bf16"}, {"n_answers": 5}, {"temperature": 1.0}, {"top_p": 1.0},
                   {"seed": 1}):  # fmt: skip
        assert Sampled(**{**settings, **change}).identity() != own
    assert Greedy(8, 100, "fp32").identity() != own


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"n_answers": 0}, "n_answers=0: must be at least 1"),
        ({"temperature": 0.0}, "temperature=0.0: must be > 0"),
        ({"top_p": 0.0}, "top_p=0.0: must be > 0 and <= 1"),
        ({"top_p": 1.1}, "top_p=1.1: must be > 0 and <= 1"),
        ({"seed": -1}, "seed=-1: must be >= 0"),
    ],
)
def test_settings_out_of_range_are_refused(change: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        sampled(llama(), [], **change)
