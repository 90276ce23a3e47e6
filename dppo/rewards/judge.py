"""A language model as the judge of two answers: asked in both orders, its word taken strictly."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from dppo.config import require
from dppo.errors import UserError
from dppo.rewards import Verdict, endpoints
from dppo.rewards.endpoints import Server, Unreadable
from dppo.types import Json, Prompt

VERSION = 1
_VALUES = {"A": 1.0, "B": 0.0, "tie": 0.5}
_PLACE = re.compile(r"\{(prompt|answer_a|answer_b|mark)\}")
# What chat templates are made of: a server may read it as such even inside of a message.
_CONTROL = re.compile(
    r"<(?=\||/?s>|/?(?:start|end)_of_turn|/?(?:bos|eos|pad|unk)>|\uff5c)|\[(?=/?(?:INST|SYSTEM_PROMPT)\])"
)


@dataclass(frozen=True)
class Judge:
    r"""Which of two answers a chat model prefers.

    ``template`` is the question, with ``{prompt}``, ``{answer_a}``, ``{answer_b}`` and ``{mark}``, a word that none of
    the three texts holds: templates fence the texts with it, so that no text can end its own fence. What looks like a
    control token of a chat template is spelt with a space in the texts (``< |im_end|>``).

    The whole reply must match the regular expression ``pattern``, whose first group must be A, B or tie. A reply that
    does not is asked for again, ``max_asks`` times in all; then this order of the two answers is unparsable and counts
    as a tie. When more than the share ``max_unparsable`` of the orders of a comparison are, it is an error instead.

    Every pair is judged in both orders, and the verdict is the mean: a judge that always prefers the first place gives
    ties. Equal texts are a tie without asking. Model, revision (a word of your own), template, pattern, ``parameters``
    and ``max_asks`` decide a verdict and enter its fingerprint; the address does not.
    """

    server: Server
    model: str
    revision: str
    template: str
    pattern: str
    parameters: Mapping[str, Any]
    max_asks: int
    max_unparsable: float

    def __post_init__(self) -> None:
        endpoints.check_parameters(self.parameters)
        for place in ("{prompt}", "{answer_a}", "{answer_b}", "{mark}"):
            require(place in self.template, "template", endpoints.shown(self.template), f"must hold {place}")
        try:
            n_groups = re.compile(self.pattern).groups
        except re.error as error:
            raise UserError(f"pattern={self.pattern}: is not a regular expression ({error})") from None
        require(n_groups >= 1, "pattern", self.pattern, "must have a group (...) around A, B or tie")
        require(self.max_asks >= 1, "max_asks", self.max_asks, "must be at least 1")
        require(0 <= self.max_unparsable <= 1, "max_unparsable", self.max_unparsable, "must be in [0, 1]")

    def identity(self) -> dict[str, Json]:
        """Everything that determines a verdict, as far as it can be known from here."""
        return {
            "reward": "judge",
            "version": VERSION,
            "model": self.model,
            "revision": self.revision,
            "template": self.template,
            "pattern": self.pattern,
            "parameters": dict(self.parameters),
            "max_asks": self.max_asks,
        }

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError if the client library or the key is missing; the server is not asked."""
        self.server.check()

    def compare(self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]) -> list[float]:
        """How far ``first[i]`` is better, 0 to 1. Raises UserError if too much of it cannot be read."""
        found = endpoints.in_order(self.verdicts(prompts, first, second), len(prompts))
        self.accept([one for one, a, b in zip(found, first, second, strict=True) if a != b])
        return [one.value for one in found]

    def verdicts(
        self, prompts: Sequence[Prompt], first: Sequence[str], second: Sequence[str]
    ) -> Iterator[tuple[int, Verdict]]:
        """(place, verdict) for every pair, as they come. Raises UserError behind the last one if any request failed."""
        orders = []
        for place, (prompt, one, other) in enumerate(zip(prompts, first, second, strict=True)):
            if one == other:
                yield place, Verdict((0.5, 0.5))
            else:
                orders += [(place, 0, self._question(prompt, one, other))]
                orders += [(place, 1, self._question(prompt, other, one))]
        if not orders:
            return
        half: dict[int, tuple[int, float | None]] = {}
        send = endpoints.chat(self.server, self.model, self.parameters)
        replies = endpoints.ask(
            self.server,
            send,
            [question for _, _, question in orders],
            self._read,
            max_unreadable=self.max_asks,
            otherwise=lambda: None,
        )
        for at, said in replies:
            place, order, _ = orders[at]
            value = said if said is None or order == 0 else 1 - said
            if place not in half:
                half[place] = order, value
                continue
            earlier, other_value = half.pop(place)
            yield place, Verdict((other_value, value) if earlier == 0 else (value, other_value))

    def accept(self, verdicts: Sequence[Verdict]) -> None:
        """Raises UserError if more than ``max_unparsable`` of all replies could not be read."""
        replies = [order for one in verdicts for order in one.orders]
        unread = sum(one is None for one in replies)
        if unread > self.max_unparsable * len(replies):
            raise UserError(
                f"reward.max_unparsable={self.max_unparsable:g}: {unread} of {len(replies)} replies of {self.model} "
                f"do not match reward.pattern={self.pattern}; change reward.template, reward.pattern or the model, or "
                "raise the limit: such replies count as ties"
            )

    def _question(self, prompt: Prompt, a: str, b: str) -> list[dict[str, str]]:
        asked = endpoints.as_text(prompt)
        texts = {"prompt": _harmless(asked), "answer_a": _harmless(a), "answer_b": _harmless(b)}
        texts["mark"] = _mark(asked, *sorted((a, b)))
        return [{"role": "user", "content": _PLACE.sub(lambda place: texts[place[1]], self.template)}]

    def _read(self, body: Json) -> float | None:
        said = endpoints.content(body).strip()
        match = re.fullmatch(self.pattern, said)
        if match is None or match[1] not in _VALUES:
            raise Unreadable(f"its reply {endpoints.shown(said)!r} does not match reward.pattern={self.pattern}")
        return _VALUES[match[1]]


def _harmless(text: str) -> str:
    return _CONTROL.sub(lambda found: f"{found[0]} ", text)


def _mark(*texts: str) -> str:
    """A word that is in none of these texts, the same for the same texts."""
    joined = "\0".join(texts)
    number = 0
    while (mark := hashlib.sha256(f"{number}\0{joined}".encode("utf-8", "surrogatepass")).hexdigest()[:12]) in joined:
        number += 1
    return mark
