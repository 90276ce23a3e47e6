"""Beam search as transformers does it, and diverse groups of beams."""

from __future__ import annotations

import random
from collections import Counter
from typing import Any, cast

import pytest
import torch
from transformers import PreTrainedModel

from dppo.errors import UserError
from dppo.generation import Beam, DiverseBeam
from tests.test_generation import (  # noqa: F401
    ENDS,
    MODELS,
    PROMPTS,
    WIDTH,
    Watch,
    answers,
    read_and_written,
    rows,
    words,
)
from tests.tiny_models import VOCABULARY, gpt2, llama

LONGEST = 10
PLAIN = [ids for _, ids in PROMPTS]


def beam(n_answers: int, *, temperature: float = 1.0, length_penalty: float = 1.0, longest: int = LONGEST) -> Beam:
    return Beam(longest, 100_000, "fp32", n_answers, temperature, length_penalty)


def diverse(n_answers: int, n_groups: int, penalty: float, *, length_penalty: float = 1.0) -> DiverseBeam:
    return DiverseBeam(LONGEST, 100_000, "fp32", n_answers, 1.0, length_penalty, n_groups, penalty)


def token_ids(found: list[list[Any]]) -> list[list[tuple[int, ...]]]:
    return [[answer.token_ids for answer in given] for given in found]


def found_by(settings: Beam, model: PreTrainedModel, prompts: list[list[int]] = PLAIN) -> list[list[Any]]:
    with torch.inference_mode():
        return settings.search(model, prompts, ENDS)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(("width", "length_penalty"), [(4, 1.0), (3, 0.0)])
def test_answers_and_scores_are_those_of_transformers(name: str, width: int, length_penalty: float) -> None:
    model = MODELS[name]()
    cast("Any", model).generation_config.eos_token_id = None
    prompts = PLAIN[:8]
    found = found_by(beam(width, length_penalty=length_penalty), model, prompts)
    lengths = set()
    for ids, own in zip(prompts, found, strict=True):
        prompt = torch.tensor([ids])
        output = cast("Any", model).generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            do_sample=False,
            num_beams=width,
            num_return_sequences=width,
            length_penalty=length_penalty,
            max_new_tokens=LONGEST,
            pad_token_id=0,
            eos_token_id=sorted(ENDS),
            return_dict_in_generate=True,
            output_scores=True,
        )
        for answer, expected, score in zip(
            own, output.sequences[:, len(ids) :].tolist(), output.sequences_scores.tolist(), strict=True
        ):
            assert list(answer.token_ids) == expected[: len(answer.token_ids)]
            ended = answer.token_ids[-1] in ENDS
            assert ended or len(answer.token_ids) == LONGEST
            assert answer.score == pytest.approx(score, abs=1e-5)
            lengths.add(len(answer.token_ids))
    assert len(lengths) > 3


@pytest.mark.parametrize("name", MODELS)
def test_one_beam_is_greedy_and_a_wider_one_finds_likelier_answers(name: str) -> None:
    model = MODELS[name]()
    greedy = answers(model, max_new_tokens=LONGEST)
    one = found_by(beam(1), model)
    assert token_ids(one) == [[greedy[key].token_ids] for key, _ in PROMPTS]
    four = found_by(beam(4), model)
    gains = [wide[0].score - narrow[0].score for wide, narrow in zip(four, one, strict=True)]
    assert sum(gain > 1e-6 for gain in gains) > 3 * sum(gain < -1e-6 for gain in gains)
    assert all(given == sorted(given, reverse=True) for given in four)
    assert all(len({answer.token_ids for answer in given}) == 4 for given in four)


def test_the_temperature_divides_the_logits() -> None:
    model, hot = llama(), llama()
    with torch.no_grad():
        cast("Any", hot).lm_head.weight /= 2.0
    assert token_ids(found_by(beam(3, temperature=2.0), model)) == token_ids(found_by(beam(3), hot))
    assert token_ids(found_by(beam(3), model)) != token_ids(found_by(beam(3), hot))


@pytest.mark.parametrize(
    "settings", [beam(4, length_penalty=0.0), diverse(4, 2, 0.7, length_penalty=0.0)], ids=["beam", "diverse"]
)
def test_the_batch_changes_nothing(settings: Beam, rows: Watch) -> None:  # noqa: F811
    model = llama()
    alone = [found_by(settings, model, [ids])[0] for ids in PLAIN]
    seen = rows(model)
    together = found_by(settings, model)
    assert token_ids(together) == token_ids(alone)
    read, written = read_and_written(seen)  # a prompt once, not for every beam
    assert read[-1][1] == WIDTH
    assert written[0] == (96, 1)
    sizes = [n_rows for n_rows, _ in written]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) > 1  # prompts that are done leave
    shuffled = random.Random(2).sample(PROMPTS, len(PROMPTS))
    given: dict[str, list[Any]] = {}
    for batch in settings.generate(model, shuffled, ENDS, words):
        for answer in batch:
            given.setdefault(answer.prompt_id, []).append(answer.token_ids)
    assert given == {key: own for (key, _), own in zip(PROMPTS, token_ids(alone), strict=True)}


def one_beam_a_group(model: PreTrainedModel, prompt: list[int], n_groups: int, penalty: float) -> list[tuple[int, ...]]:
    """Diverse beam search with groups of one beam, written out: whole sequences, no cache.

    A group's answer is the best by score a token; it goes on beside one that has ended while it scores higher.
    """
    running: list[tuple[list[int], float]] = [([], 0.0)] * n_groups
    ended: list[tuple[float, tuple[int, ...]] | None] = [None] * n_groups
    done = [False] * n_groups
    for length in range(1, LONGEST + 1):
        taken: Counter[int] = Counter()
        for group in range(n_groups):
            tokens, score = running[group]
            logits = cast("Any", model)(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1].float()
            totals = torch.log_softmax(logits, -1) + score
            for token, times in taken.items():
                totals[token] -= penalty * times
            order = totals.argsort(descending=True).tolist()
            taken[order[0]] += 1
            if (order[0] in ENDS or length == LONGEST) and not done[group]:
                new = (float(totals[order[0]]) / length, (*tokens, order[0]))
                ended[group] = max(filter(None, [ended[group], new]))
            going = next(token for token in order if token not in ENDS)
            running[group] = ([*tokens, going], float(totals[going]))
            best = ended[group]
            done[group] |= best is not None and running[group][1] / length <= best[0]
    return [answer for _, answer in filter(None, ended)]


@torch.inference_mode()
@pytest.mark.parametrize("penalty", [0.4, 3.0])
def test_groups_of_one_beam_are_those_written_out(penalty: float) -> None:
    model = llama()
    found = token_ids(found_by(diverse(3, 3, penalty), model, PLAIN[:10]))
    assert found == [one_beam_a_group(model, ids, 3, penalty) for ids in PLAIN[:10]]
    plain = token_ids(found_by(beam(1), model, PLAIN[:10]))
    assert [given[0] for given in found] == [given[0] for given in plain]  # the first group minds nobody
    assert any(given[1] != given[0] for given in found)


def test_groups_that_hardly_mind_one_another_find_the_same() -> None:
    model = gpt2()
    narrow = token_ids(found_by(beam(2), model))
    assert token_ids(found_by(diverse(6, 3, 1e-6), model)) == [given * 3 for given in narrow]
    apart = token_ids(found_by(diverse(6, 3, 100.0), model))
    for given in apart:
        assert given[:2] == narrow[apart.index(given)]
        assert not {answer[0] for answer in given[:2]} & {answer[0] for answer in given[2:]}


def test_what_decides_the_texts_is_the_identity() -> None:
    assert beam(4).identity() != beam(3).identity() != beam(3, length_penalty=0.5).identity()
    assert beam(4).identity() != beam(4, temperature=0.5).identity() != beam(4, longest=3).identity()
    assert diverse(4, 2, 1.0).identity() != diverse(4, 4, 1.0).identity() != diverse(4, 4, 2.0).identity()
    assert Beam(LONGEST, 5, "fp32", 4, 1.0, 1.0).identity() == beam(4).identity()


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: diverse(5, 2, 1.0), r"n_groups=2: must be at least 2 and divide n_answers \(5\)"),
        (lambda: diverse(5, 1, 1.0), "n_groups=1: must be at least 2"),
        (lambda: diverse(4, 2, 0.0), "diversity_penalty=0.0: must be > 0"),
        (lambda: found_by(beam(VOCABULARY), llama()), "dataset.answers.n_answers=61: too many for 61 tokens"),
    ],
)
def test_settings_out_of_range_are_refused(make: Any, said: str) -> None:
    with pytest.raises(UserError, match=f"^{said}"):
        make()
