"""Scores and verdicts from a server over HTTP: many requests at once, patience with a busy server, keys kept secret.

Two kinds of address: the OpenAI-compatible chat completions that hosted models, vLLM, llama.cpp and NIM speak, and any
other that answers JSON with JSON. What has no say in a score, such as how many requests are under way, lives in
``Server`` and enters no fingerprint.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import queue
import random
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from typing import Any, Generic, TypeVar, cast
from urllib.parse import urlsplit

from dppo.config import require
from dppo.errors import UserError
from dppo.types import Json, Prompt

# What one request alone is refused for: too long, or not to the server's liking. Others may do.
_REFUSED_ALONE = (400, 413, 422)
_BUSY = (408, 409, 425, 429)
_SHOWN = 200  # characters of what a server said

Answer = TypeVar("Answer")
Read = Callable[[Json], Answer]
"""What a reply says; raises ``Unreadable`` where it does not say it."""


class Unreadable(Exception):
    """A reply in JSON that does not say what it should; the message is what is wrong with it."""


@dataclass(frozen=True)
class Server:
    """Where requests go and how patiently.

    ``base_url`` is what stands before ``/chat/completions``; for plain JSON it is the address that is posted to.
    ``api_key_env`` names the environment variable with the key, which is sent as a bearer token; null sends none.
    ``concurrency`` requests are under way at a time. One without an answer after ``timeout`` seconds, one that the
    server is too busy for (408, 409, 425, 429, 5xx), a dropped connection and a damaged reply are tried again, each
    at most ``max_attempts`` times in all. The waits in between double from ``first_wait`` to ``max_wait`` seconds, each
    cut at random by up to a half; a server that names its own (Retry-After) is obeyed, by all requests, up to
    ``max_wait``. When more than ``max_failures`` requests failed for good, no further one is made.
    """

    base_url: str
    api_key_env: str | None
    concurrency: int
    timeout: float
    max_attempts: int
    first_wait: float
    max_wait: float
    max_failures: int

    def __post_init__(self) -> None:
        try:
            url = urlsplit(self.base_url)
            secret = "@" in url.netloc or url.query or url.fragment
        except ValueError:
            raise UserError("base_url: is not an address; give one such as http://localhost:8000/v1") from None
        if secret:  # not shown: it may hold a password
            raise UserError(
                "base_url: must not hold a user name, a password or anything behind ? or #; put the key into an "
                "environment variable and name it in api_key_env"
            )
        if url.scheme not in ("http", "https") or not url.hostname:
            raise UserError(f"base_url={self.base_url}: must begin with http:// or https:// and a host")
        if self.api_key_env is not None and not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):
            raise UserError(  # not shown: it may be the key itself
                "api_key_env: must be the NAME of an environment variable that holds the key, such as OPENAI_API_KEY"
            )
        for key in ("concurrency", "max_attempts"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        require(self.max_failures >= 0, "max_failures", self.max_failures, "must be at least 0")
        require(self.timeout > 0, "timeout", self.timeout, "must be > 0 seconds")
        require(self.first_wait >= 0, "first_wait", self.first_wait, "must be >= 0 seconds")
        require(self.max_wait >= self.first_wait, "max_wait", self.max_wait, "must be at least first_wait")

    def check(self) -> None:
        """Raise UserError if the client library or the key is not there; asks the server nothing."""
        _require_package()
        self.key()

    def key(self) -> str | None:
        """The key, from the environment. Raises UserError if the variable is not set."""
        if self.api_key_env is None:
            return None
        found = os.environ.get(self.api_key_env, "").strip()
        if not found:
            raise UserError(
                f"reward.server.api_key_env={self.api_key_env}: this environment variable is not set; export it with "
                f"the key for {self.base_url}, or set reward.server.api_key_env=null for a server that needs none"
            )
        return found


class Trouble(Exception):
    """Why one attempt has failed. ``again``: another may succeed; ``fatal``: no other request will.

    ``retry_after`` is the number of seconds after which the server wants to be asked again, if it says.
    """

    def __init__(self, why: str, *, again: bool = True, fatal: bool = False, retry_after: float | None = None) -> None:
        super().__init__(why)
        self.why, self.again, self.fatal, self.retry_after = why, again, fatal, retry_after


Send = Callable[[Any], Json]
"""Makes one attempt at a request and returns the reply's JSON; raises ``Trouble``."""


def chat(server: Server, model: str, parameters: Mapping[str, Any]) -> Send:
    """Requests are conversations (lists of {role, content}), replies whole chat completions."""
    _require_package()
    import openai

    _quiet()
    # Retries are made by ``ask``, in one way for both kinds of address; no key of the environment slips in unnamed.
    client = openai.OpenAI(
        base_url=server.base_url, api_key=server.key() or "none", timeout=server.timeout, max_retries=0
    )

    def send(messages: Any) -> Json:
        try:
            raw = client.chat.completions.with_raw_response.create(
                model=model, messages=messages, extra_body=dict(parameters)
            )
        except openai.APIStatusError as error:
            raise _status(error.status_code, error.response.headers, error.response.content, server) from None
        except openai.APITimeoutError:
            raise Trouble(f"no answer within {server.timeout:g} s") from None
        except openai.APIConnectionError as error:
            raise Trouble(f"no connection ({_cause(error)})") from None
        return _parsed(raw.content, raw.headers, server)

    return send


def post(server: Server) -> Send:
    """Requests are JSON values that are posted to ``base_url``."""
    _require_package()
    import httpx2

    _quiet()
    key = server.key()
    headers = {} if key is None else {"Authorization": f"Bearer {key}"}
    client = httpx2.Client(timeout=server.timeout, headers=headers)

    def send(request: Any) -> Json:
        try:
            reply = client.post(server.base_url, json=request)
        except httpx2.TimeoutException:
            raise Trouble(f"no answer within {server.timeout:g} s") from None
        except httpx2.HTTPError as error:
            raise Trouble(f"no connection ({_cause(error)})") from None
        if reply.status_code >= 300:
            raise _status(reply.status_code, reply.headers, reply.content, server)
        return _parsed(reply.content, reply.headers, server)

    return send


def ask(
    server: Server,
    send: Send,
    requests: Sequence[Any],
    read: Read[Answer],
    *,
    max_unreadable: int,
    otherwise: Callable[[], Answer] | None = None,
) -> Iterator[tuple[int, Answer]]:
    """(place in ``requests``, what ``read`` made of the reply), in the order in which replies arrive.

    A request whose reply was unreadable ``max_unreadable`` times has failed, or gets ``otherwise()``. What was answered
    is always given out before the first failure is raised, as UserError.
    """
    yield from _Asking(server, send, requests, read, max_unreadable, otherwise).answers()


class _Asking(Generic[Answer]):
    """One batch of requests; every thread makes one after the other until none is left."""

    def __init__(
        self,
        server: Server,
        send: Send,
        requests: Sequence[Any],
        read: Read[Answer],
        max_unreadable: int,
        otherwise: Callable[[], Answer] | None,
    ) -> None:
        self.server, self.send, self.requests, self.read = server, send, requests, read
        self.max_unreadable, self.otherwise = max_unreadable, otherwise
        self.left = deque(range(len(requests)))
        self.failures: list[Trouble] = []  # of requests that failed for good
        # Short, so that answers are kept about as fast as they are asked for: what waits here a kill would lose.
        self.found: queue.Queue[tuple[int, Answer] | Exception | None] = queue.Queue(maxsize=1)
        self.stop = threading.Event()
        self.gone = threading.Event()  # nobody reads any more
        self.not_before = 0.0  # the server asked for quiet until then, on the monotonic clock

    def answers(self) -> Iterator[tuple[int, Answer]]:
        running = min(self.server.concurrency, len(self.requests))
        for _ in range(running):  # they end with the process: a stopped run waits for no server
            threading.Thread(target=self._work, daemon=True).start()
        n_answered = 0
        try:
            while running:
                found = self.found.get()
                if found is None:
                    running -= 1
                elif isinstance(found, Exception):
                    raise found
                else:
                    n_answered += 1
                    yield found
        finally:
            self.stop.set()
            self.gone.set()
        if self.failures:
            first = next((one for one in self.failures if one.fatal), self.failures[0])
            share = "" if first.fatal else f"{len(self.failures)} of {len(self.requests)} requests failed, the first: "
            kept = "; what was answered is kept, the same command goes on from there" if n_answered else ""
            raise UserError(f"reward.server.base_url={self.server.base_url}: {share}{first.why}{kept}")

    def _work(self) -> None:
        try:
            while not self.stop.is_set():
                try:
                    place = self.left.popleft()
                except IndexError:
                    break
                self._one(place)
        finally:
            self._give(None)

    def _give(self, found: tuple[int, Answer] | Exception | None) -> None:
        while not self.gone.is_set():
            try:
                return self.found.put(found, timeout=0.2)
            except queue.Full:
                continue

    def _one(self, place: int) -> None:
        try:
            self._give((place, self._answer(self.requests[place])))
        except Trouble as trouble:
            if trouble.again and self.stop.is_set():
                return  # given up for others' failures
            self.failures.append(trouble)  # at once: the next request may be one too many
            if trouble.fatal or len(self.failures) > self.server.max_failures:
                self.stop.set()
        except Exception as error:  # shown where the answers are awaited, not lost with the thread
            self._give(error)

    def _answer(self, request: Any) -> Answer:
        failed = unreadable = 0
        while True:
            self._wait(0.0)
            try:
                return self.read(self.send(request))
            except Unreadable as error:
                unreadable += 1
                if unreadable >= self.max_unreadable:
                    if self.otherwise is not None:
                        return self.otherwise()
                    raise Trouble(f"{error} (asked {unreadable} times)", again=False) from None
            except Trouble as trouble:
                failed += 1
                if not trouble.again:
                    raise
                if failed >= self.server.max_attempts:
                    raise Trouble(f"{trouble.why} (tried {failed} times)", again=False) from None
                self._wait(self._pause(trouble, failed))

    def _pause(self, trouble: Trouble, failed: int) -> float:
        """Seconds to wait after a failed attempt."""
        limit = self.server.max_wait
        if trouble.retry_after is not None:
            if trouble.retry_after > limit:
                why = (
                    f"{trouble.why}; it asks to come back in {trouble.retry_after:.0f} s, more than max_wait={limit:g}"
                )
                raise Trouble(why, again=False, fatal=True)
            self.not_before = max(self.not_before, time.monotonic() + trouble.retry_after)
            return 0.0
        doubled = self.server.first_wait * 2.0 ** min(failed - 1, 60)
        return min(limit, doubled) * random.uniform(0.5, 1.0)

    def _wait(self, seconds: float) -> None:
        """Wait so long, and until the server wants to hear of us again. Raises Trouble if all is to end."""
        until = time.monotonic() + seconds
        while (left := max(until, self.not_before) - time.monotonic()) > 0:
            if self.stop.wait(left):
                break
        if self.stop.is_set():
            raise Trouble("given up")


# --- what a server says ----------------------------------------------------------------------------------------------


def content(body: Json) -> str:
    """The text of a chat completion; raises Trouble if it is none, an empty text if it has no text."""
    if not (isinstance(body, Mapping) and isinstance(choices := body.get("choices"), list) and choices):
        raise Trouble(f"its reply is no chat completion: {shown(json.dumps(body))}")
    message = choices[0].get("message") if isinstance(choices[0], Mapping) else None
    text = message.get("content") if isinstance(message, Mapping) else None
    if not isinstance(message, Mapping) or not (text is None or isinstance(text, str)):
        raise Trouble(f"its reply is no chat completion: {shown(json.dumps(body))}")
    return text or ""


def number(value: object, where: str) -> float:
    """A finite number; raises Unreadable, which says ``where``, for anything else, text and booleans included."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise Unreadable(f"{where} is {shown(json.dumps(value))}, not a number")
    try:
        found = float(value)
    except OverflowError:
        found = math.inf
    if not math.isfinite(found):
        raise Unreadable(f"{where} is {found}, not a finite number")
    return found


def conversation(prompt: Prompt, answer: str | None = None) -> list[dict[str, str]]:
    """The prompt's turns as chat completions take them, and the answer as the assistant's last one."""
    turns = [{"role": turn.role, "content": turn.content} for turn in prompt.messages]
    return turns if answer is None else [*turns, {"role": "assistant", "content": answer}]


def as_text(prompt: Prompt) -> str:
    """The prompt as one text: a single question as it is, the turns of a longer conversation with their roles."""
    if len(prompt.messages) == 1:
        return prompt.messages[0].content
    return "\n\n".join(f"{turn.role.capitalize()}: {turn.content}" for turn in prompt.messages)


def check_parameters(parameters: Mapping[str, Any]) -> None:
    """Refuse what is not a matter of ``parameters``."""
    for key in ("model", "messages", "stream", "n"):
        if key in parameters:
            raise UserError(f"parameters.{key}={parameters[key]}: is not a parameter that can be set here; drop it")


def in_order(found: Iterator[tuple[int, Answer]], n: int) -> list[Answer]:
    """What came in any order, by place."""
    by_place = dict(found)
    return [by_place[place] for place in range(n)]


def _parsed(data: bytes, headers: Mapping[str, str], server: Server) -> Json:
    text = _text(data, server)
    try:
        return cast("Json", json.loads(text))
    except (ValueError, RecursionError):
        kind = headers.get("content-type", "no content type")
        raise Trouble(f"its reply is no JSON ({kind}): {shown(text)}") from None


def _status(status: int, headers: Mapping[str, str], data: bytes, server: Server) -> Trouble:
    text = _text(data, server)
    said = f": {shown(text)}" if text.strip() else ""
    if status in _BUSY or status >= 500:
        return Trouble(f"status {status}{said}", retry_after=_retry_after(headers.get("retry-after")))
    if status in _REFUSED_ALONE:
        return Trouble(f"status {status}{said}", again=False)
    hint = ""
    if status in (401, 403):
        hint = "; name the environment variable with its key in reward.server.api_key_env"
        if server.api_key_env is not None:
            hint = f"; the key in the environment variable {server.api_key_env} is not accepted"
    elif status == 404:
        hint = "; there is no such address or model: look at reward.server.base_url and reward.model"
    return Trouble(f"status {status}{said}{hint}", again=False, fatal=True)


def _retry_after(value: str | None) -> float | None:
    """Seconds, from a number or a date."""
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            seconds = parsedate_to_datetime(value).timestamp() - time.time()
        except (ValueError, TypeError):
            return None
    return max(0.0, seconds) if math.isfinite(seconds) else None


def _text(data: bytes, server: Server) -> str:
    """What a server sent, without our key, which some repeat."""
    text = data.decode("utf-8", "replace")
    key = server.key()
    return text if key is None else text.replace(key, "***")


def shown(text: str) -> str:
    """The beginning of a text, in one line."""
    text = " ".join(text.split())
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def _cause(error: Exception) -> str:
    """What the innermost error says: the client library's own is always the same."""
    cause: BaseException = error
    while (inner := cause.__cause__ or cause.__context__) is not None:
        cause = inner
    return shown(str(cause)) or type(cause).__name__


def _quiet() -> None:
    """The client library would note every request in the run's log."""
    for name in ("openai", "httpx2", "httpcore2"):
        logger = logging.getLogger(name)
        if logger.level == logging.NOTSET:
            logger.setLevel(logging.WARNING)


def _require_package() -> None:
    if importlib.util.find_spec("openai") is None:
        raise UserError("reward.server: asking a server needs the package openai: pip install 'dppo[endpoint]'")
