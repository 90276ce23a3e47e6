"""A reward model behind an address: OpenAI-compatible chat completions, or any JSON in and a number out."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dppo.config import require
from dppo.errors import UserError
from dppo.rewards import endpoints
from dppo.rewards.endpoints import Server, Unreadable
from dppo.types import Json, Prompt

VERSION = 1
_PLACE = re.compile(r"\{(prompt|response|model|messages|conversation)\}")


@dataclass(frozen=True)
class Endpoint:
    r"""The number that a server gives an answer.

    ``format`` chat sends the conversation with the answer as its last turn, or, with a ``template``, that text with
    ``{prompt}`` and ``{response}`` filled in as a question to a chat model, and ``parameters`` such as temperature. The
    whole reply must match the regular expression ``pattern``, whose first group is the score; a reply without text
    may say it as the log-prob of the token ``logprob_of``.

    ``format`` json posts ``request``, in which ``{prompt}``, ``{response}`` and ``{model}`` stand for texts,
    ``{messages}`` for the prompt's turns as a list of {role, content} and ``{conversation}`` for the same with the
    answer. The score is the number at the path ``result`` of the reply, such as ``data.0.score``.

    A reply without a finite number in its place is asked for again, ``max_attempts`` times in all, and then an error.
    ``model`` is the name in the request and, with ``revision``, a word of your own, in the fingerprint of the scores;
    the address is not, unless there is no name: the same model on another machine gives the same scores.
    """

    server: Server
    format: Literal["chat", "json"]
    model: str | None
    revision: str
    template: str | None
    parameters: Mapping[str, Any]
    pattern: str
    logprob_of: str | None
    request: Mapping[str, Any]
    result: str

    def __post_init__(self) -> None:
        endpoints.check_parameters(self.parameters)
        try:
            n_groups = re.compile(self.pattern).groups
        except re.error as error:
            raise UserError(f"pattern={self.pattern}: is not a regular expression ({error})") from None
        require(n_groups >= 1, "pattern", self.pattern, "must have a group (...) around the number")
        if self.format == "chat":
            require(self.model is not None, "model", None, "format=chat needs the name of the model to ask")
            if self.template is not None:
                for place in ("{prompt}", "{response}"):
                    require(place in self.template, "template", self.template, f"must hold {place}")
        else:
            require(bool(self.result), "result", self.result, "must be a path into the reply, such as score")
            require("{response}" in str(self.request) or "{conversation}" in str(self.request), "request",
                    dict(self.request), "must hold {response} or {conversation}")  # fmt: skip

    def identity(self) -> dict[str, Json]:
        """Everything that determines a score, as far as it can be known from here."""
        asked: dict[str, Json] = {
            "chat": {
                "template": self.template,
                "parameters": dict(self.parameters),
                "pattern": self.pattern,
                "logprob_of": self.logprob_of,
            },
            "json": {"request": dict(self.request), "result": self.result},
        }
        return {
            "reward": "endpoint",
            "version": VERSION,
            "model": self.model or self.server.base_url,
            "revision": self.revision,
            self.format: asked[self.format],
        }

    def check(self, prompts: Sequence[Prompt]) -> None:
        """Raises UserError if the client library or the key is missing; the server is not asked."""
        self.server.check()

    def score(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> list[float]:
        """One score per answer. Raises UserError if one cannot be had."""
        return endpoints.in_order(self.scores(prompts, answers), len(answers))

    def scores(self, prompts: Sequence[Prompt], answers: Sequence[str]) -> Iterator[tuple[int, float]]:
        """(place, score) for every answer, as they come. Raises UserError behind the last one if any failed."""
        pairs = list(zip(prompts, answers, strict=True))
        if self.format == "chat":
            send = endpoints.chat(self.server, self.model or "", self.parameters)
            requests: list[Any] = [self._question(prompt, answer) for prompt, answer in pairs]
            read = self._from_chat
        else:
            send = endpoints.post(self.server)
            requests = [filled(self.request, prompt, answer, self.model) for prompt, answer in pairs]
            read = self._from_json
        return endpoints.ask(self.server, send, requests, read, max_unreadable=self.server.max_attempts)

    def _question(self, prompt: Prompt, answer: str) -> list[dict[str, str]]:
        if self.template is None:
            return endpoints.conversation(prompt, answer)
        return [{"role": "user", "content": str(filled(self.template, prompt, answer, self.model))}]

    def _from_chat(self, body: Json) -> float:
        text = endpoints.content(body)
        if self.logprob_of is not None and not text.strip():
            return _logprob(body, self.logprob_of)
        match = re.fullmatch(self.pattern, text.strip())
        if match is None:
            raise Unreadable(f"its reply {endpoints.shown(text)!r} does not match reward.pattern={self.pattern}")
        try:
            return endpoints.number(float(match[1]), "its score")
        except (TypeError, ValueError):
            raise Unreadable(f"what reward.pattern={self.pattern} finds in its reply is {match[1]!r}") from None

    def _from_json(self, body: Json) -> float:
        where = f"reward.result={self.result} of its reply"
        found: Any = body
        for step in self.result.split("."):
            if isinstance(found, Mapping) and step in found:
                found = found[step]
            elif isinstance(found, list) and step.isdecimal() and int(step) < len(found):
                found = found[int(step)]
            else:
                raise Unreadable(f"{where} is not there: {endpoints.shown(str(body))}")
        return endpoints.number(found, where)


def filled(template: Any, prompt: Prompt, answer: str, model: str | None) -> Any:
    """A JSON value in which the places named in braces are filled in, in one go: texts bring no places of their own."""
    if isinstance(template, Mapping):
        return {key: filled(value, prompt, answer, model) for key, value in template.items()}
    if isinstance(template, list):
        return [filled(value, prompt, answer, model) for value in template]
    if not isinstance(template, str):
        return template
    if template == "{messages}":
        return endpoints.conversation(prompt)
    if template == "{conversation}":
        return endpoints.conversation(prompt, answer)
    texts = {"prompt": endpoints.as_text(prompt), "response": answer, "model": model or ""}
    return _PLACE.sub(lambda place: texts.get(place[1], place[0]), template)


def _logprob(body: Any, token: str) -> float:
    """The log-prob of a token of the reply, which reward models give their score as. Raises Unreadable without one."""
    found = (body["choices"][0].get("logprobs") or {}).get("content") or []
    values = [one.get("logprob") for one in found if isinstance(one, Mapping) and one.get("token") == token]
    if len(values) != 1:
        raise Unreadable(f"its reply has neither a text nor one log-prob of the token {token!r}")
    return endpoints.number(values[0], f"its log-prob of the token {token!r}")
