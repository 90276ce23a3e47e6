"""Pairs whose rejected answer is the correct one, spoilt: for the study of pairs that differ in few tokens.

After Pal et al. 2024, "Smaug" (arXiv 2402.13228), section 4: mathematics with an altered intermediate value (a low edit
distance), and multiple choice with a wrong option (a high one). What is drawn depends on ``seed`` and the row alone.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from dppo.data.draws import pick, stream
from dppo.data.rows import Columns, Row, UnusableRow, check_unicode, make_example
from dppo.errors import UserError
from dppo.types import Message, PreferenceExample, Response

_TOKEN = re.compile(r"\d|[^\W\d]+|[^\w\s]")
_ANNOTATION = re.compile(r"<<.*?>>")  # GSM8K's calculator
_NUMBER = r"\d+(?:,\d{3})*(?:\.\d+)?"
_RESULT = re.compile(rf"=\s*[$€£]?\s*({_NUMBER})")
_FINAL = re.compile(r"(?:####|[Tt]he answer is:?)\s*[$€£]?\s*(\S[^\n]*)\s*$")


@dataclass(frozen=True)
class _Spoilt(Columns):
    """What the schemas below share."""

    seed: int

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise UserError(f"seed={self.seed}: must be >= 0")

    def notes(self, examples: Sequence[PreferenceExample]) -> tuple[str, ...]:
        """The edit distance of the pairs."""
        found = sorted(edit_distance(*(response.text for response in example.responses)) for example in examples)
        if not found:
            return ()
        p95 = found[math.ceil(0.95 * len(found)) - 1]
        return (f"token edit distance {median(found):.3f} (median), {p95:.3f} (p95)",)


@dataclass(frozen=True)
class AlteredNumberColumns(_Spoilt):
    """Which columns hold a question and its solution; rejected is the solution with one intermediate number altered.

    The number is a result in the solution (behind ``=``; any number where there is no such result) that is not the
    final answer, if there is another one; the stated final answer is never altered. One digit of it is another digit.
    GSM8K's ``<<48/2=24>>`` are taken out and its ``#### 72`` becomes ``The answer is: 72``, as in MetaMath.
    """

    question: str
    answer: str

    @property
    def needed(self) -> tuple[str, ...]:
        return (self.question, self.answer)

    def example(self, row: Row, single_turn: bool) -> PreferenceExample:
        """A preference pair. Raises UnusableRow."""
        question, answer = _text(row.get(self.question), "question"), _text(row.get(self.answer), "answer")
        answer = re.sub(r"^####[ ]*", "The answer is: ", _ANNOTATION.sub("", answer), flags=re.MULTILINE).strip()
        stated = _FINAL.search(answer)
        end = len(answer) if stated is None else stated.start()
        final = "" if stated is None else _plain_number(stated[1])
        places = [found.span(1) for found in _RESULT.finditer(answer, 0, end)]
        places = places or [found.span() for found in re.finditer(rf"(?<![\w.]){_NUMBER}", answer[:end])]
        if not places:
            raise UnusableRow("answer has no intermediate number")
        inner = [(start, stop) for start, stop in places if _plain_number(answer[start:stop]) != final]
        rng = stream("altered number", self.seed, question, answer)
        start, stop = pick(rng, inner or places)
        at = pick(rng, [place for place in range(start, stop) if answer[place].isdecimal()])
        # No leading zero, so that the number has as many digits as before.
        digits = "123456789" if at == start else "0123456789"
        other = pick(rng, [digit for digit in digits if digit != answer[at]])
        wrong = answer[:at] + other + answer[at + 1 :]
        return make_example(_user(question), Response("chosen", answer), Response("rejected", wrong))


@dataclass(frozen=True)
class OptionsColumns(_Spoilt):
    """Which columns hold a question, its options as {text, label} lists, and the correct label, as in ARC.

    Chosen is the text of the correct option, rejected that of another one.
    """

    question: str
    choices: str
    answer_key: str

    @property
    def needed(self) -> tuple[str, ...]:
        return (self.question, self.choices, self.answer_key)

    def example(self, row: Row, single_turn: bool) -> PreferenceExample:
        """A preference pair. Raises UnusableRow."""
        choices = row.get(self.choices)
        if not isinstance(choices, Mapping):
            raise UnusableRow("choices has no text and label")
        texts, labels = _texts(choices.get("text"), "choices"), _texts(choices.get("label"), "choices")
        key = row.get(self.answer_key)
        if len(texts) != len(labels) or labels.count(str(key)) != 1:
            raise UnusableRow("answer key is not one of the labels")
        return _choice(_text(row.get(self.question), "question"), texts, labels.index(str(key)), self.seed)


@dataclass(frozen=True)
class EndingsColumns(_Spoilt):
    """Which columns hold the beginning of a text, a list of endings, and the number of the right one, as in HellaSwag.

    Chosen is the right ending, rejected another one. Rows without a label, as in its test split, are left out.
    """

    context: str
    endings: str
    label: str

    @property
    def needed(self) -> tuple[str, ...]:
        return (self.context, self.endings, self.label)

    def example(self, row: Row, single_turn: bool) -> PreferenceExample:
        """A preference pair. Raises UnusableRow."""
        endings = _texts(row.get(self.endings), "endings")
        label = str(row.get(self.label))
        if label not in map(str, range(len(endings))):
            raise UnusableRow("label is not the number of an ending")
        return _choice(_text(row.get(self.context), "context"), endings, int(label), self.seed)


def edit_distance(one: str, other: str) -> float:
    """Tokens to insert, delete or replace to make ``other`` of ``one``, divided by the longer one's tokens: 0 to 1.

    Tokens are words, single digits and punctuation marks.
    """
    left, right = _TOKEN.findall(one), _TOKEN.findall(other)
    longest = max(len(left), len(right))
    start = 0
    while start < min(len(left), len(right)) and left[start] == right[start]:
        start += 1
    left, right = left[start:], right[start:]
    while left and right and left[-1] == right[-1]:
        left.pop()
        right.pop()
    row = list(range(len(right) + 1))
    for place, token in enumerate(left, start=1):
        before, row[0] = row[0], place
        for column, against in enumerate(right, start=1):
            before, row[column] = row[column], min(row[column] + 1, row[column - 1] + 1, before + (token != against))
    return row[-1] / longest if longest else 0.0


def _choice(question: str, texts: Sequence[str], right: int, seed: int) -> PreferenceExample:
    others = [text for text in texts if text.strip() and text != texts[right]]
    if not texts[right].strip() or not others:
        raise UnusableRow("no right option and another one")
    wrong = pick(stream("wrong option", seed, question, *texts), others)
    return make_example(_user(question), Response("chosen", texts[right]), Response("rejected", wrong))


def _user(question: str) -> tuple[Message, ...]:
    return (Message("user", question),)


def _text(value: object, name: str) -> str:
    if value is None:
        raise UnusableRow(f"{name} is null")
    if not isinstance(value, str):
        raise UnusableRow(f"{name} is not text")
    if not value.strip():
        raise UnusableRow(f"empty {'prompt' if name in ('question', 'context') else name}")
    check_unicode(value)
    return value


def _texts(value: object, name: str) -> list[str]:
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(one, str) for one in value):
        raise UnusableRow(f"{name} is not a list of texts")
    check_unicode(*value)
    return list(value)


def _plain_number(text: str) -> str:
    """A number without separators, unit and superfluous zeros, to be compared."""
    found = re.search(_NUMBER, text)
    digits = "" if found is None else found[0].replace(",", "")
    return digits.rstrip("0").rstrip(".") if "." in digits else digits
