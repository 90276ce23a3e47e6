"""From rows to examples: what a conversation and a pair must look like, and what happens to rows that don't.

A row that cannot be used is left out and counted by its reason; a data set of which no row is left is an error.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from dppo.data import ids
from dppo.data.draws import share
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


def collect(
    rows: Iterable[Row],
    convert: Callable[[Row], PreferenceExample],
    where: str,
    leave_out: frozenset[str] = frozenset(),
) -> list[PreferenceExample]:
    """Convert every row; leave out and count the unusable, the repeated, and prompts in ``leave_out`` (ids).

    Logs one line with the counts. Raises UserError, naming ``where``, if no row is left.
    """
    examples: dict[str, PreferenceExample] = {}
    dropped: Counter[str] = Counter()
    n_rows = 0
    for row in rows:
        n_rows += 1
        try:
            example = convert(row)
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
    return list(examples.values())


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


def demonstration(row: Row, columns: ChatColumns, single_turn: bool) -> PreferenceExample:
    """A conversation as a demonstration of its last answer. Raises UnusableRow."""
    turns = conversation(row.get(columns.messages), columns.messages)
    prompt, answer = _split(turns, single_turn)
    responses = (Response("chosen", answer),)
    return PreferenceExample(ids.example_id(prompt, responses), prompt, responses)


def pair(row: Row, columns: PairColumns, single_turn: bool) -> PreferenceExample:
    """A preference pair. Raises UnusableRow."""
    turns = None if columns.prompt is None else row.get(columns.prompt)
    prompt, chosen = _split(_continued(turns, row.get(columns.chosen), "chosen"), single_turn)
    other, rejected = _split(_continued(turns, row.get(columns.rejected), "rejected"), single_turn)
    if other.prompt_id != prompt.prompt_id:
        raise UnusableRow("chosen and rejected answer different prompts")
    if chosen == rejected:
        raise UnusableRow("chosen and rejected are equal")
    responses = (
        Response("chosen", chosen, _score(row, columns.score_chosen)),
        Response("rejected", rejected, _score(row, columns.score_rejected)),
    )
    return PreferenceExample(ids.example_id(prompt, responses), prompt, responses)


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


def _split(turns: tuple[Message, ...], single_turn: bool) -> tuple[Prompt, str]:
    """The prompt, and the answer of the last assistant turn."""
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
    return Prompt(ids.prompt_id(before), before), answer


def _score(row: Row, column: str | None) -> float | None:
    value = None if column is None else row.get(column)
    if value is None:
        return None
    try:
        score = float(cast(Any, value))
    except (TypeError, ValueError):
        raise UnusableRow(f"{column} is not a number") from None
    if not math.isfinite(score):
        raise UnusableRow(f"{column} is not finite")
    return score
