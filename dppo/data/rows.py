"""From rows to examples: what a conversation and a pair must look like, and what happens to rows that don't.

A row that cannot be used is left out and counted by its reason; a data set of which no row is left is an error.
"""

from __future__ import annotations

import functools
import logging
import math
from collections import Counter
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

from dppo.data import ids
from dppo.data.draws import share
from dppo.data.tables import read_rows
from dppo.errors import UserError
from dppo.types import Message, PreferenceExample, Prompt, Response, Split

logger = logging.getLogger("dppo.data")
Row = Mapping[str, object]


class UnusableRow(Exception):
    """Why a row is left out: a few words that are the same for all rows with this fault."""


@dataclass(frozen=True)
class ChatColumns:
    """Which column holds a conversation: a list of {role, content} messages."""

    messages: str

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that a file must have."""
        return (self.messages,)

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that are read where a file has them."""
        return ()

    def example(self, row: Row, single_turn: bool) -> PreferenceExample:
        """A demonstration: the conversation's last answer as ``chosen``. Raises UnusableRow."""
        before, answer = _split(conversation(row.get(self.messages), self.messages), single_turn)
        return _example(before, Response("chosen", answer))


@dataclass(frozen=True)
class PairColumns:
    """Which columns hold a preference pair.

    An answer is text, or a list of {role, content} messages that ends with an assistant turn and may begin with the
    whole conversation. ``prompt`` (text, or such a list) is read only where the answers do not hold the
    conversation; None if they always do. Scores are optional ratings.
    """

    prompt: str | None
    chosen: str
    rejected: str
    score_chosen: str | None
    score_rejected: str | None

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that a file must have."""
        return tuple(column for column in (self.prompt, self.chosen, self.rejected) if column is not None)

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that are read where a file has them."""
        return tuple(column for column in (self.score_chosen, self.score_rejected) if column is not None)

    def example(self, row: Row, single_turn: bool) -> PreferenceExample:
        """A preference pair. Raises UnusableRow."""
        prompt = None if self.prompt is None else row.get(self.prompt)
        before, chosen = _split(_continued(prompt, row.get(self.chosen), "chosen"), single_turn)
        other, rejected = _split(_continued(prompt, row.get(self.rejected), "rejected"), single_turn)
        if other != before:
            raise UnusableRow("chosen and rejected answer different prompts")
        if chosen == rejected:
            raise UnusableRow("chosen and rejected are equal")
        return _example(
            before,
            Response("chosen", chosen, _score(row, self.score_chosen)),
            Response("rejected", rejected, _score(row, self.score_rejected)),
        )


@dataclass(frozen=True)
class RankedColumns:
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
        """Columns that a file must have."""
        return (self.prompt, self.responses, self.scores)

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that are read where a file has them."""
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
            found, text = _split(_continued(prompt, answer, "responses"), single_turn)
            if place and found != before:
                raise UnusableRow("responses answer different prompts")
            before = found
            score = _number(value, "scores")
            if score is None:
                raise UnusableRow("scores has a null")
            ranked.setdefault(text, Response("ranked", text, score))
        if len(ranked) < 2:
            raise UnusableRow("fewer than two different answers")
        return _example(before, *ranked.values())


@dataclass(frozen=True)
class LabelledColumns:
    """Which columns hold a prompt, one answer to it, and whether the answer is desirable.

    ``label`` holds true and false (in CSV as words, or 1 and 0).
    """

    prompt: str | None
    completion: str
    label: str

    @property
    def needed(self) -> tuple[str, ...]:
        """Columns that a file must have."""
        return tuple(column for column in (self.prompt, self.completion, self.label) if column is not None)

    @property
    def optional(self) -> tuple[str, ...]:
        """Columns that are read where a file has them."""
        return ()

    def example(self, row: Row, single_turn: bool) -> PreferenceExample:
        """One labelled answer. Raises UnusableRow."""
        prompt = None if self.prompt is None else row.get(self.prompt)
        before, answer = _split(_continued(prompt, row.get(self.completion), "completion"), single_turn)
        label = str(row.get(self.label)).lower()
        if label not in ("true", "1", "false", "0"):
            raise UnusableRow("label is not true or false")
        return _example(before, Response("desirable" if label in ("true", "1") else "undesirable", answer))


class Columns(Hashable, Protocol):
    """Which columns of a file hold an example."""

    @property
    def needed(self) -> tuple[str, ...]: ...

    @property
    def optional(self) -> tuple[str, ...]: ...

    def example(self, row: Row, single_turn: bool) -> PreferenceExample: ...


def read_examples(
    files: Sequence[Path],
    columns: Columns,
    single_turn: bool,
    where: str,
    leave_out: frozenset[str] = frozenset(),
) -> tuple[PreferenceExample, ...]:
    """The examples of files, without unusable and repeated rows and prompts in ``leave_out`` (ids).

    Logs one line with the counts. Raises UserError, naming ``where``, if no row is left, and for files that cannot
    be read. The last two results are kept, because several splits are cut from the same rows.
    """
    stamps = tuple((file, file.stat().st_size, file.stat().st_mtime_ns) if file.exists() else file for file in files)
    return _read_examples(tuple(files), stamps, columns, single_turn, where, leave_out)


@functools.lru_cache(maxsize=2)
def _read_examples(
    files: tuple[Path, ...],
    stamps: tuple[object, ...],
    columns: Columns,
    single_turn: bool,
    where: str,
    leave_out: frozenset[str],
) -> tuple[PreferenceExample, ...]:
    """``stamps`` are the files' sizes and times of change, so that a rewritten file is read anew."""
    examples: dict[str, PreferenceExample] = {}
    dropped: Counter[str] = Counter()
    n_rows = 0
    for row in read_rows(files, columns.needed, columns.optional):
        n_rows += 1
        try:
            example = columns.example(row, single_turn)
        except UnusableRow as reason:
            dropped[str(reason)] += 1
            continue
        if example.prompt.prompt_id in leave_out:
            dropped["prompt is in the test split"] += 1
        elif example.example_id in examples:
            dropped["repeated"] += 1
        else:
            examples[example.example_id] = example
    if not examples:
        raise UserError(f"{where}: none of its {n_rows:,} rows can be used ({listed(dropped)})")
    left_out = f"; left out {n_rows - len(examples):,} ({listed(dropped)})" if dropped else ""
    logger.info("%s: %s of %s rows%s", where, f"{len(examples):,}", f"{n_rows:,}", left_out)
    return tuple(examples.values())


def listed(reasons: Counter[str]) -> str:
    """Reasons with their counts, the most frequent first; at most five by name."""
    named = reasons.most_common(5)
    others = reasons.total() - sum(count for _, count in named)
    return ", ".join(f"{reason}: {count:,}" for reason, count in [*named, ("others", others)] if count)


def cut(
    examples: Sequence[PreferenceExample], split: Split, validation_share: float, test_share: float, seed: int
) -> list[PreferenceExample]:
    """The examples of one split, by a hash of ``seed`` and the prompt: all rows of a prompt are in the same one.

    Raises UserError if the split is empty.
    """
    found = []
    for example in examples:
        place = share("split", seed, example.prompt.prompt_id)
        of: Split = "train"
        if place < test_share + validation_share:
            of = "test" if place < test_share else "validation"
        if of == split:
            found.append(example)
    if not found:
        key = f"{'test' if split == 'test' else 'validation'}_share"
        value = test_share if split == "test" else validation_share
        raise UserError(f"dataset.{key}={value}: leaves no {split} row of {len(examples):,}; change it")
    return found


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
        raise UnusableRow(f"{name} is not a list of messages")
    messages = []
    for turn in value:
        if not isinstance(turn, Mapping) or "role" not in turn or "content" not in turn:
            raise UnusableRow(f"{name} has a turn without role and content")
        role, content = turn["role"], turn["content"]
        if role not in ("system", "user", "assistant"):
            raise UnusableRow(f"{name} has a turn of role {role}")
        if not isinstance(content, str):
            raise UnusableRow(f"{name} has a turn whose content is {'null' if content is None else 'not text'}")
        messages.append(Message(cast(Any, role), content))
    return tuple(messages)


def _continued(prompt: object, answer: object, name: str) -> tuple[Message, ...]:
    """Prompt and answer as one conversation."""
    if answer is None:
        raise UnusableRow(f"{name} is null")
    turns = (Message("assistant", answer),) if isinstance(answer, str) else conversation(answer, name)
    if any(turn.role == "user" for turn in turns):
        return turns
    if prompt is None:
        raise UnusableRow("no prompt")
    before = (Message("user", prompt),) if isinstance(prompt, str) else conversation(prompt, "prompt")
    return before + turns


def _split(turns: tuple[Message, ...], single_turn: bool) -> tuple[tuple[Message, ...], str]:
    """What comes before the last assistant turn, and that answer."""
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


def _example(messages: tuple[Message, ...], *responses: Response) -> PreferenceExample:
    prompt = Prompt(ids.prompt_id(messages), messages)
    return PreferenceExample(ids.example_id(prompt, responses), prompt, responses)


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
    except (TypeError, ValueError):
        raise UnusableRow(f"{column} is not a number") from None
    if not math.isfinite(score):
        raise UnusableRow(f"{column} is not finite")
    return score
