from __future__ import annotations

import dataclasses

import pytest

from dppo.errors import UserError
from dppo.rewards.verifiable import Findings, Verifiable, count_sentences, inspect_answer, repetition, words_of
from dppo.types import Message, Prompt

REWARD = Verifiable(met=1.0, violated=0.5, repetition=2.0, surplus_word=0.1)


def prompt(*checks: tuple[str, str]) -> Prompt:
    return Prompt("id", (Message("user", "Please."),), checks)


@pytest.mark.parametrize(
    ("check", "answer", "met"),
    [
        (("mention", "kite"), "The kite is old.", True),
        (("mention", "kite"), "KITE!", True),
        (("mention", "kite"), "The kites are old.", False),
        (("mention", "kite"), "", False),
        (("finish", "thank you"), "Hello, thank you.", True),
        (("finish", "thank you"), "Hello. Thank you!", True),
        (("finish", "thank you"), "Thank you, hello.", False),
        (("finish", "thank you"), "Hello, I thank you all.", False),
        (("finish", "thank you"), "you", False),
        (("finish", "thank you"), "", False),
        (("sentences", "2"), "One. Two.", True),
        (("sentences", "2"), "One! Two? Three.", False),
        (("sentences", "2"), "no full stop", True),
        (("sentences", "2"), "", False),
        (("sentences", "2"), " ... ", False),
        (("no_repetition", ""), "The kite and the boat.", True),
        (("no_repetition", ""), "The kite and the kite.", False),
        (("no_repetition", ""), "", False),
        (("answer", "42"), "40 plus 2 is 42.", True),
        (("answer", "42"), "42 is 40 plus 2.", False),
        (("answer", "42"), "It is 42, or 042.", True),
        (("answer", "-3"), "1 minus 4 is -3.", True),
        (("answer", "3"), "1 minus 4 is -3.", False),
        (("answer", "42"), "forty-two", False),
        (("answer", "42"), "", False),
    ],
)
def test_each_check(check: tuple[str, str], answer: str, met: bool) -> None:
    found = inspect_answer(answer, [check])
    assert (found.met, found.violated) == ((1, 0) if met else (0, 1))


def test_unknown_check() -> None:
    with pytest.raises(ValueError, match="unknown check 'colour'"):
        inspect_answer("red", [("colour", "red")])


def test_words_sentences_and_repetition() -> None:
    assert words_of("Don't say 'Öl', 3 times_2!") == ["don't", "say", "öl", "3", "times", "2"]
    assert count_sentences("It costs 3.50. Really?! Yes") == 3
    # (a b) (b a) (a b) (b c): the third pair occurred before, so 1 of 4.
    assert repetition(["a", "b", "a", "b", "c"]) == 0.25
    assert repetition(["a"]) == repetition([]) == 0


def test_golden_reward() -> None:
    """Met: mention kite, sentences 2. Violated: mention boat, finish "thank you".

    The words are "the kite the kite is old": 6, of which 4 are asked for (kite, boat, thank, you), so 2 are surplus.
    Its pairs are (the kite) (kite the) (the kite) (kite is) (is old): 1 of 5 occurred before.
    2 * 1 - 2 * 0.5 - 2 * 0.2 - 2 * 0.1 = 0.4.
    """
    asked = prompt(("mention", "kite"), ("mention", "boat"), ("finish", "thank you"), ("sentences", "2"))
    answer = "The kite, the kite is old."
    found = inspect_answer(answer, asked.checks)
    assert dataclasses.replace(found, repetition=round(found.repetition, 9)) == Findings(2, 2, 0.2, 2)
    assert REWARD.score([asked], [answer]) == [0.4]


@pytest.mark.parametrize("field", ["met", "violated", "repetition", "surplus_word"])
def test_each_weight_moves_the_reward_in_its_own_direction(field: str) -> None:
    asked = prompt(("mention", "kite"), ("mention", "boat"))
    answer = "The kite. The kite is old."
    changed = dataclasses.replace(REWARD, **{field: getattr(REWARD, field) + 1})
    difference = changed.score([asked], [answer])[0] - REWARD.score([asked], [answer])[0]
    # One met, one violated, 1 of 5 pairs of words repeated, 4 of 6 words beyond the two that are asked for.
    expected = {"met": 1.0, "violated": -1.0, "repetition": -0.2, "surplus_word": -4.0}[field]
    assert difference == pytest.approx(expected)


def test_an_answer_shorter_than_what_is_asked_for_earns_nothing_extra() -> None:
    asked = prompt(("mention", "kite"), ("finish", "thank you"))
    assert REWARD.score([asked], ["Kite."]) == [0.5]


def test_an_arithmetic_answer_is_worth_one_point_either_way_before_its_length() -> None:
    reward = Verifiable(met=1.0, violated=1.0, repetition=2.0, surplus_word=0.0)
    assert reward.score([prompt(("answer", "7"))] * 3, ["3 plus 4 is 7.", "3 plus 4 is 8.", ""]) == [1.0, -1.0, -1.0]


def test_scores_keep_the_order_and_equal_findings_tie_exactly() -> None:
    kite, boat = prompt(("mention", "kite")), prompt(("mention", "boat"))
    answers = ["A kite and a lamp.", "A lamp and a boat."]
    first, second = REWARD.score([kite, boat], answers)
    assert first == second
    assert REWARD.score([boat, kite], answers) == [first - 1.5, second - 1.5]
    with pytest.raises(ValueError, match="shorter"):
        REWARD.score([kite, boat], ["A kite."])


def test_prompts_without_checks_are_refused_in_one_line() -> None:
    REWARD.check([prompt(("answer", "1"))])
    with pytest.raises(UserError, match=r"reward=verifiable: 1 of 2 prompts .*dataset=instructions.*arithmetic") as one:
        REWARD.check([prompt(), prompt(("answer", "1"))])
    assert "\n" not in str(one.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"met": -1.0}, r"reward\.met=-1\.0: must be"),
        ({"repetition": float("nan")}, r"reward\.repetition=nan"),
        ({"surplus_word": float("inf")}, r"reward\.surplus_word=inf"),
        ({"met": 0.0, "violated": 0.0}, r"reward\.met=0 reward\.violated=0"),
    ],
)
def test_weights_out_of_range(settings: dict[str, float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        dataclasses.replace(REWARD, **settings)


def test_identity_follows_every_weight() -> None:
    fields = [field.name for field in dataclasses.fields(Verifiable)]
    others = [dataclasses.replace(REWARD, **{name: 3.0}).identity() for name in fields]
    assert all(other != REWARD.identity() for other in others)
    assert REWARD.identity() == dataclasses.replace(REWARD).identity()
