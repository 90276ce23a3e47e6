"""From rows to examples: what a conversation and a pair must look like, and what happens to rows that don't.

A row that cannot be used is left out and counted by its reason; a data set of which no row is left is an error.
"""

from __future__ import annotations

import logging
import math
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from dppo.data import ids
from dppo.data.tables import read_rows
from dppo.errors import UserError
from dppo.types import Message, PreferenceExample, Prompt, Response

logger = logging.getLogger("dppo.data")
Row = Mapping[str, object]
_SHOWN = 20  # characters of an unknown role that a reason names at most: it may hold anything


DIFFERENT_PROMPTS = "chosen and rejected answer different prompts"


class UnusableRow(Exception):
    """Why a row is left out: a few words that are the same for all rows with this fault."""


class Columns(ABC):
    """Which columns of a file hold an example: a frozen dataclass whose fields are their names.

    A schema of your own is a subclass; ``dppo.data.rows`` has what it needs: ``conversation``, ``split_answer``,
    ``make_example`` and the exception ``UnusableRow``.
    """

    @property
    @abstractmethod
    def needed(self) -> tuple[str, ...]:
        """Columns that a file must have."""

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that are read where a file has them."""
        return ()

    @abstractmethod
    def example(self, row: Row, single_turn: bool) -> PreferenceExample:
        """The example that a row holds. Raises UnusableRow."""

    def settled(self, row: Row) -> Columns | None:
        """The schema for all rows of a data set whose first row this is; None: this row cannot tell, ask the next."""
        return self

    def notes(self, examples: Sequence[PreferenceExample]) -> tuple[str, ...]:
        """What there is to say about the examples of a file, for the line that is logged."""
        return ()


@dataclass(frozen=True)
class ChatColumns(Columns):
    """Which column holds a conversation: a list of {role, content} messages."""

    messages: str

    @property
    def needed(self) -> tuple[str, ...]:
        return (self.messages,)

    def example(self, row: Row, single_turn: bool) -> PreferenceExample:
        """A demonstration: the conversation's last answer as ``chosen``. Raises UnusableRow."""
        before, answer = split_answer(conversation(row.get(self.messages), self.messages), single_turn)
        return make_example(before, Response("chosen", answer))


@dataclass(frozen=True)
class PairColumns(Columns):
    """Which columns hold a preference pair.

    An answer is text, or a list of {role, content} messages that ends with an assistant turn and may begin with the
    whole conversation. ``prompt`` (text, or such a list) is read only where the answers do not hold the
    conversation; None if they always do. Scores are optional ratings. ``system`` is a column with a system turn, which
    a row may leave empty.
    """

    prompt: str | None
    chosen: str
    rejected: str
    score_chosen: str | None
    score_rejected: str | None
    system: str | None

    @property
    def needed(self) -> tuple[str, ...]:
        return tuple(column for column in (self.prompt, self.chosen, self.rejected) if column is not None)

    @property
    def optional(self) -> tuple[str, ...]:
        return tuple(column for column in (self.score_chosen, self.score_rejected, self.system) if column is not None)

    def example(self, row: Row, single_turn: bool) -> PreferenceExample:
        """A preference pair. Raises UnusableRow."""
        prompt = None if self.prompt is None else row.get(self.prompt)
        before, chosen = split_answer(continued(prompt, row.get(self.chosen), "chosen"), single_turn)
        other, rejected = split_answer(continued(prompt, row.get(self.rejected), "rejected"), single_turn)
        if other != before:
            raise UnusableRow(DIFFERENT_PROMPTS)
        return make_example(
            _with_system(row, self.system, before),
            Response("chosen", chosen, _score(row, self.score_chosen)),
            Response("rejected", rejected, _score(row, self.score_rejected)),
        )


@dataclass(frozen=True)
class RankedColumns(Columns):
    """Which columns hold a prompt and its K >= 2 ranked answers.

    ``responses`` is a list of texts (or of lists of {role, content} messages as in a pair), ``scores`` a list of as
    many numbers, larger is better. ``context`` names an optional column of earlier turns, a list of messages that may
    be empty. Of equal answers to a prompt the first one counts.
    """

    prompt: str
    responses: str
    scores: str
    context: str | None

    @property
    def needed(self) -> tuple[str, ...]:
        return (self.prompt, self.responses, self.scores)

    @property
    def optional(self) -> tuple[str, ...]:
        return () if self.context is None else (self.context,)

    def example(self, row: Row, single_turn: bool) -> PreferenceExample:
        """A group of ranked answers. Raises UnusableRow."""
        prompt = _with_context(row.get(self.prompt), None if self.context is None else row.get(self.context))
        answers, scores = _items(row.get(self.responses), "responses"), _items(row.get(self.scores), "scores")
        if len(answers) != len(scores):
            raise UnusableRow("scores and responses differ in number")
        before: tuple[Message, ...] = ()
        ranked: dict[str, Response] = {}
        for place, (answer, value) in enumerate(zip(answers, scores, strict=True)):
            found, text = split_answer(continued(prompt, answer, "responses"), single_turn)
            if place and found != before:
                raise UnusableRow("responses answer different prompts")
            before = found
            score = _number(value, "scores")
            if score is None:
                raise UnusableRow("scores has a null")
            ranked.setdefault(text, Response("ranked", text, score))
        if len(ranked) < 2:
            raise UnusableRow("fewer than two different answers")
        return make_example(before, *ranked.values())


@dataclass(frozen=True)
class LabelledColumns(Columns):
    """Which columns hold a prompt, one answer to it, and whether the answer is desirable.

    ``label`` holds true and false (in CSV as words, or 1 and 0).
    """

    prompt: str | None
    completion: str
    label: str

    @property
    def needed(self) -> tuple[str, ...]:
        return tuple(column for column in (self.prompt, self.completion, self.label) if column is not None)

    def example(self, row: Row, single_turn: bool) -> PreferenceExample:
        """One labelled answer. Raises UnusableRow."""
        prompt = None if self.prompt is None else row.get(self.prompt)
        before, answer = split_answer(continued(prompt, row.get(self.completion), "completion"), single_turn)
        label = str(row.get(self.label)).lower()
        if label not in ("true", "1", "false", "0"):
            raise UnusableRow("label is not true or false")
        return make_example(before, Response("desirable" if label in ("true", "1") else "undesirable", answer))


@dataclass(frozen=True)
class Reading:
    """What became of the rows of some files: of ``n_rows``, ``n_kept`` are examples, the others ``left_out``.

    ``where`` names the source and its split. ``left_out`` counts rows by reason; ``notes`` are further words for the
    user.
    """

    where: str
    n_rows: int
    n_kept: int
    left_out: Mapping[str, int]
    notes: tuple[str, ...]

    def __str__(self) -> str:
        reasons = Counter(self.left_out)
        left_out = f"; left out {reasons.total():,} ({listed(reasons)})" if reasons else ""
        return f"{self.where}: {self.n_kept:,} of {self.n_rows:,} rows{left_out}" + "".join(
            f"; {note}" for note in self.notes
        )


def read_examples(
    files: Sequence[Path], columns: Columns, single_turn: bool, where: str
) -> tuple[tuple[PreferenceExample, ...], Reading]:
    """The examples of files, without unusable and repeated rows, and what became of all rows.

    Of rows that say the same (the same prompt and answers, whatever their white space, Unicode composition and the
    ratings of a pair) the first one counts: another copy would only double its weight. Raises UserError for files that
    cannot be read.
    """
    examples: dict[str, PreferenceExample] = {}
    exact: set[str] = set()
    left_out: Counter[str] = Counter()
    settled: Columns | None = None
    n_rows = 0
    for row in read_rows(files, columns.needed, columns.optional):
        n_rows += 1
        settled = settled or columns.settled(row)
        try:
            if settled is None:
                raise UnusableRow("its schema cannot be told")
            example = settled.example(row, single_turn)
        except UnusableRow as reason:
            left_out[str(reason)] += 1
            continue
        if example.example_id in exact:
            left_out["repeated"] += 1
        elif (key := ids.content_key(example.prompt, example.responses)) in examples:
            left_out["repeated but for white space or ratings"] += 1
        else:
            examples[key] = example
            exact.add(example.example_id)
    kept = tuple(examples.values())
    return kept, Reading(where, n_rows, len(kept), left_out, (settled or columns).notes(kept))


def listed(reasons: Counter[str]) -> str:
    """Reasons with their counts, the most frequent first; at most five by name."""
    named = reasons.most_common(5)
    others = reasons.total() - sum(count for _, count in named)
    return ", ".join(f"{reason}: {count:,}" for reason, count in [*named, ("others", others)] if count)


def check_share(key: str, value: float) -> None:
    """Raise UserError unless 0 < value < 1."""
    if not 0 < value < 1:
        raise UserError(f"{key}={value}: must be above 0 and below 1")


def unique_prompts(examples: Iterable[PreferenceExample]) -> list[Prompt]:
    """The prompts in their order, each once."""
    return list({example.prompt.prompt_id: example.prompt for example in examples}.values())


def conversation(value: object, name: str) -> tuple[Message, ...]:
    """A list of {role, content} mappings as messages. Raises UnusableRow."""
    if value is None:
        raise UnusableRow(f"{name} is null")
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UnusableRow(f"{name} is neither text nor a list of messages")
    messages = []
    for turn in value:
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise UnusableRow(f"{name} has a turn without role and content")
        role, content = turn["role"], turn["content"]
        if role not in ("system", "user", "assistant"):
            plain = isinstance(role, str) and len(role) <= _SHOWN and role.isascii() and role.isidentifier()
            raise UnusableRow(f"{name} has a turn of {f'role {role}' if plain else 'an unknown role'}")
        if not isinstance(content, str):
            raise UnusableRow(f"{name} has a turn whose content is {'null' if content is None else 'not text'}")
        messages.append(Message(cast(Any, role), content))
    return tuple(messages)


def continued(prompt: object, answer: object, name: str) -> tuple[Message, ...]:
    """Prompt and answer as one conversation. Raises UnusableRow."""
    if answer is None:
        raise UnusableRow(f"{name} is null")
    turns = (Message("assistant", answer),) if isinstance(answer, str) else conversation(answer, name)
    if any(turn.role == "user" for turn in turns):
        return turns
    if prompt is None:
        raise UnusableRow("no prompt")
    before = (Message("user", prompt),) if isinstance(prompt, str) else conversation(prompt, "prompt")
    return before + turns


def split_answer(turns: tuple[Message, ...], single_turn: bool) -> tuple[tuple[Message, ...], str]:
    """What comes before the last assistant turn, and that answer. Raises UnusableRow."""
    answers = [place for place, turn in enumerate(turns) if turn.role == "assistant"]
    if not answers:
        raise UnusableRow("no assistant turn")
    before, answer = turns[: answers[-1]], turns[answers[-1]].content
    if not before or before[-1].role != "user":
        raise UnusableRow("no user turn before the answer")
    if single_turn and (len(answers) > 1 or sum(turn.role == "user" for turn in turns) > 1):
        raise UnusableRow("more than one turn")
    if not answer.strip():
        raise UnusableRow("empty answer")
    if not before[-1].content.strip():
        raise UnusableRow("empty prompt")
    return before, answer


def make_example(messages: tuple[Message, ...], *responses: Response) -> PreferenceExample:
    """An example of these turns and answers. Raises UnusableRow."""
    check_unicode(*(turn.content for turn in messages), *(one.text for one in responses))
    if [one.role for one in responses] == ["chosen", "rejected"] and responses[0].text == responses[1].text:
        raise UnusableRow("chosen and rejected are equal")
    prompt = Prompt(ids.prompt_id(messages), messages)
    return PreferenceExample(ids.example_id(prompt, responses), prompt, responses)


def check_unicode(*texts: str) -> None:
    """Raise UnusableRow for half a surrogate pair, which JSON can hold and no tokenizer takes."""
    for text in texts:
        try:
            text.isascii() or text.encode()
        except UnicodeEncodeError:
            raise UnusableRow("text with half a surrogate pair, which is no Unicode") from None


def _with_system(row: Row, column: str | None, turns: tuple[Message, ...]) -> tuple[Message, ...]:
    """The turns behind the system turn that a column holds; as they are if it is empty."""
    text = None if column is None else row.get(column)
    if text is None or text == "":
        return turns
    if not isinstance(text, str):
        raise UnusableRow(f"{column} is not text")
    if turns[0].role == "system":
        raise UnusableRow("two system turns")
    return (Message("system", text), *turns) if text.strip() else turns


def _with_context(prompt: object, context: object) -> object:
    """A prompt behind its earlier turns."""
    if context is None or context == []:
        return prompt
    turns = (Message("user", prompt),) if isinstance(prompt, str) else conversation(prompt, "prompt")
    return [{"role": turn.role, "content": turn.content} for turn in (*conversation(context, "context"), *turns)]


def _items(value: object, name: str) -> Sequence[object]:
    if isinstance(value, str) or not isinstance(value, Sequence):
        raise UnusableRow(f"{name} is not a list")
    return value


def _score(row: Row, column: str | None) -> float | None:
    return None if column is None else _number(row.get(column), column)


def _number(value: object, column: str) -> float | None:
    if value is None:
        return None
    try:
        score = float(cast(Any, value))
    except (TypeError, ValueError, OverflowError):
        raise UnusableRow(f"{column} is not a number") from None
    if not math.isfinite(score):
        raise UnusableRow(f"{column} is not finite")
    return score
