"""Preference pairs in the forms that TRL reads: prompt given or to be found, text or messages.

https://huggingface.co/docs/trl/dataset_formats, "Preference".
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from dppo.data.rows import DIFFERENT_PROMPTS, Columns, Row, UnusableRow, conversation, make_example, split_answer
from dppo.types import Message, PreferenceExample, Response


@dataclass(frozen=True)
class TrlColumns(Columns):
    """Which columns hold a pair whose prompt may be implicit: what chosen and rejected begin with in common.

    The first row that can tell settles for all rows whether the answers are text or lists of {role, content} messages
    (``conversational``), and whether the prompt is ``explicit``: it is if there is one, and it is text where the
    answers are, messages where they are. Otherwise it is implicit, whatever a column ``prompt`` holds, as in TRL. Rows
    of another form are left out. A prompt in text becomes a user turn, which TRL passes to a model as it is.
    """

    prompt: str
    chosen: str
    rejected: str

    @property
    def needed(self) -> tuple[str, ...]:
        return (self.chosen, self.rejected)

    @property
    def optional(self) -> tuple[str, ...]:
        return (self.prompt,)

    def settled(self, row: Row) -> Columns | None:
        answers = {_kind(row.get(self.chosen)), _kind(row.get(self.rejected))}
        if len(answers) != 1 or None in answers:
            return None
        conversational = answers == {"messages"}
        explicit = _kind(row.get(self.prompt)) in answers
        return _SettledColumns(self.prompt, self.chosen, self.rejected, conversational, explicit)

    def example(self, row: Row, single_turn: bool) -> PreferenceExample:
        """The pair of a row that is alone in its data set. Raises UnusableRow."""
        settled = self.settled(row)
        if settled is None:
            raise UnusableRow("its schema cannot be told")
        return settled.example(row, single_turn)


@dataclass(frozen=True)
class _SettledColumns(TrlColumns):
    """The same in one of the four forms."""

    conversational: bool
    explicit: bool

    def example(self, row: Row, single_turn: bool) -> PreferenceExample:
        kind: Literal["text", "messages"] = "messages" if self.conversational else "text"
        prompt, chosen, rejected = (row.get(column) for column in (self.prompt, self.chosen, self.rejected))
        for name, value in (
            ("chosen", chosen),
            ("rejected", rejected),
            ("prompt", prompt if self.explicit else chosen),
        ):
            if value is None:
                raise UnusableRow(f"{name} is null")
            if _kind(value) != kind:
                raise UnusableRow(f"{name} is not {kind}, as in the first row")
        if not self.explicit:
            if _kind(prompt) == kind:
                raise UnusableRow("prompt is given, unlike in the first row")
            prompt, chosen, rejected = shared_prompt(chosen, rejected)  # type: ignore[arg-type]
        before, better = split_answer(_whole(prompt, chosen, "chosen"), single_turn)
        other, worse = split_answer(_whole(prompt, rejected, "rejected"), single_turn)
        if other != before:
            raise UnusableRow(DIFFERENT_PROMPTS)
        return make_example(before, Response("chosen", better), Response("rejected", worse))


def shared_prompt(chosen: Sequence[object], rejected: Sequence[object]) -> tuple[object, object, object]:
    """(prompt, chosen, rejected) of two answers that begin with their prompt: texts, or lists of messages.

    The prompt is the longest common beginning; in text without a space at its end, which goes to the answers. So does
    TRL's ``extract_prompt``. Where one answer is the beginning of the other (TRL then cuts the last common item off)
    they have no prompt in common that leaves both an answer. Raises UnusableRow.
    """
    end = next((place for place, (one, other) in enumerate(zip(chosen, rejected, strict=False)) if one != other), None)
    if end is None:
        equal = len(chosen) == len(rejected)
        raise UnusableRow("chosen and rejected are equal" if equal else "one answer is the beginning of the other")
    if end and chosen[end - 1] == " ":
        end -= 1
    return chosen[:end], chosen[end:], rejected[end:]


def _whole(prompt: object, answer: object, name: str) -> tuple[Message, ...]:
    """Prompt and answer as one conversation."""
    before = (Message("user", prompt),) if isinstance(prompt, str) else conversation(prompt, "prompt")
    after = (Message("assistant", answer),) if isinstance(answer, str) else conversation(answer, name)
    if [turn.role for turn in after] != ["assistant"]:
        raise UnusableRow(f"{name} is not one assistant turn behind the prompt")
    return before + after


def _kind(value: object) -> Literal["text", "messages"] | None:
    if isinstance(value, str):
        return "text"
    if isinstance(value, Sequence) and value and all(isinstance(turn, Mapping) for turn in value):
        return "messages"
    return None
