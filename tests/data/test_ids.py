from __future__ import annotations

import hashlib

import pytest

from dppo.data.ids import canonical_json, example_id, prompt_id
from dppo.types import Message, Prompt, Response


def first_digits(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def prompt(*turns: Message, checks: tuple[tuple[str, str], ...] = ()) -> Prompt:
    return Prompt(prompt_id(turns), turns, checks)


def test_prompt_id_is_the_hash_of_this_exact_text() -> None:
    """Stored results are joined by these ids: a change of spelling would orphan every cache."""
    messages = (Message("system", "Be brief."), Message("user", 'Say "é".'))
    assert prompt_id(messages) == first_digits(r'[["system","Be brief."],["user","Say \"\u00e9\"."]]')


def test_example_id_is_the_hash_of_this_exact_text() -> None:
    asked = prompt(Message("user", "Hi"))
    responses = (Response("chosen", "Hello"), Response("rejected", "No", 2.5))
    expected = first_digits(f'["{asked.prompt_id}",[["chosen","Hello",null],["rejected","No",2.5]]]')
    assert example_id(asked, responses) == expected


def test_ids_tell_contents_apart() -> None:
    asked = prompt(Message("user", "Hi"))
    rows = [
        (asked, (Response("chosen", "a"), Response("rejected", "b"))),
        (asked, (Response("rejected", "b"), Response("chosen", "a"))),
        (asked, (Response("chosen", "b"), Response("rejected", "a"))),
        (asked, (Response("chosen", "a", 0.0), Response("rejected", "b"))),
        (asked, (Response("chosen", "a"),)),
        (asked, ()),
        (prompt(Message("user", "hi")), (Response("chosen", "a"), Response("rejected", "b"))),
        (prompt(Message("user", "Hi "),), (Response("chosen", "a"), Response("rejected", "b"))),
        (prompt(Message("system", "Hi")), (Response("chosen", "a"), Response("rejected", "b"))),
        (prompt(Message("user", "H"), Message("user", "i")), (Response("chosen", "a"), Response("rejected", "b"))),
    ]  # fmt: skip
    assert len({example_id(*row) for row in rows}) == len(rows)


def test_an_id_does_not_depend_on_checks_or_on_the_spelling_of_a_score() -> None:
    turns = (Message("user", "Hi"),)
    assert prompt(*turns) != prompt(*turns, checks=(("answer", "1"),))
    assert prompt(*turns).prompt_id == prompt(*turns, checks=(("answer", "1"),)).prompt_id
    whole, real = Response("chosen", "a", 1), Response("chosen", "a", 1.0)
    assert example_id(prompt(*turns), (whole,)) == example_id(prompt(*turns), (real,))


def test_keys_are_sorted_and_nothing_but_json_is_hashed() -> None:
    assert canonical_json({"b": 1, "a": [True, None]}) == '{"a":[true,null],"b":1}'
    with pytest.raises(ValueError, match="not JSON compliant"):
        example_id(prompt(Message("user", "Hi")), (Response("chosen", "a", float("nan")),))
