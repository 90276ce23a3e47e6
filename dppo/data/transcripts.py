r"""Pairs of whole conversations as one text each: ``\n\nHuman: ... \n\nAssistant: ...``, as in Anthropic's HH data."""

from __future__ import annotations

import re
from dataclasses import dataclass

from dppo.data.rows import DIFFERENT_PROMPTS, Columns, Row, UnusableRow, make_example, split_answer
from dppo.types import Message, PreferenceExample, Response

_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


@dataclass(frozen=True)
class TranscriptColumns(Columns):
    r"""Which columns hold two transcripts that are equal up to their last ``\n\nAssistant:``.

    Turns alternate, a person's first and the assistant's last; the white space around a turn is no part of it. What a
    person writes is not escaped in such data: a line of theirs that looks like a turn is read as one, and mostly makes
    the transcript malformed, which is counted.
    """

    chosen: str
    rejected: str

    @property
    def needed(self) -> tuple[str, ...]:
        return (self.chosen, self.rejected)

    def example(self, row: Row, single_turn: bool) -> PreferenceExample:
        """A preference pair. Raises UnusableRow."""
        before, chosen = split_answer(_turns(row.get(self.chosen), "chosen"), single_turn)
        other, rejected = split_answer(_turns(row.get(self.rejected), "rejected"), single_turn)
        if other != before:
            raise UnusableRow(DIFFERENT_PROMPTS)
        return make_example(before, Response("chosen", chosen), Response("rejected", rejected))


def _turns(text: object, name: str) -> tuple[Message, ...]:
    if text is None:
        raise UnusableRow(f"{name} is null")
    if not isinstance(text, str):
        raise UnusableRow(f"{name} is not text")
    before, *found = _TURN.split(text)
    if before.strip() or not found:
        raise UnusableRow(f"{name} is malformed: it does not begin with a turn")
    speakers = found[0::2]
    if speakers != ["Human", "Assistant"] * (len(speakers) // 2):
        raise UnusableRow(f"{name} is malformed: its turns do not alternate from Human to Assistant")
    return tuple(
        Message("user" if speaker == "Human" else "assistant", said.strip())
        for speaker, said in zip(speakers, found[1::2], strict=True)
    )
