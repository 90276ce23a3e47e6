"""A server on loopback that scores and judges over HTTP, as badly as it is told to."""

from __future__ import annotations

import json
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from threading import Event, Lock
from typing import Any

from tests.loopback import listening

Say = Callable[[dict[str, Any]], Any]


def completion(text: str | None, **more: Any) -> dict[str, Any]:
    """A chat completion that says ``text``."""
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text}, **more}
    return {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


@dataclass
class Served:
    """What arrived, and what is done to it.

    ``say`` answers a request's JSON with JSON, or with text or bytes that are sent as they are. ``faults`` befall the
    next requests, one each: a status such as 500, ``(429, "0.3")`` with Retry-After, or one of drop, truncated, slow,
    html and torn. From ``broken_after`` requests on, everything is answered 500.
    """

    say: Say
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str | None] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    faults: deque[Any] = field(default_factory=deque)
    broken_after: int | None = None
    delay: float = 0.0
    at_once: int = 0
    most_at_once: int = 0
    lock: Any = field(default_factory=Lock)
    closed: Event = field(default_factory=Event)

    @property
    def v1(self) -> str:
        """The base of the chat completions."""
        return f"{self.url}/v1"


@contextmanager
def serve(say: Say) -> Iterator[Served]:
    """A server that answers with what ``say`` says, at ``url`` and as chat completions below ``v1``."""
    served = Served(say)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            with served.lock:
                served.bodies.append(body)
                served.keys.append(self.headers.get("Authorization"))
                served.times.append(time.monotonic())
                served.at_once += 1
                served.most_at_once = max(served.most_at_once, served.at_once)
                fault = served.faults.popleft() if served.faults else None
                if served.broken_after is not None and len(served.bodies) > served.broken_after:
                    fault = 500
            try:
                if served.delay and fault is None:
                    time.sleep(served.delay)
                self._befall(fault, body)
            finally:
                with served.lock:
                    served.at_once -= 1

        def _befall(self, fault: Any, body: dict[str, Any]) -> None:
            if fault == "drop":
                self.close_connection = True
                self.connection.close()
            elif fault == "slow":
                served.closed.wait(20)
                self.close_connection = True
            elif fault == "html":
                self._send(200, b"<html>Bad gateway</html>", kind="text/html")
            elif fault == "torn":
                self._send(200, json.dumps(served.say(body)).encode()[:-7])
            elif fault == "truncated":
                self._send(200, json.dumps(served.say(body)).encode(), missing=7)
            elif isinstance(fault, tuple):
                self._send(fault[0], b'{"error": {"message": "slow down"}}', retry_after=fault[1])
            elif isinstance(fault, int):
                said = {"error": {"message": f"no, {self.headers.get('Authorization')}"}}
                self._send(fault, json.dumps(said).encode())
            else:
                said = served.say(body)
                self._send(200, said if isinstance(said, bytes) else json.dumps(said).encode())

        def _send(
            self,
            status: int,
            data: bytes,
            *,
            kind: str = "application/json",
            retry_after: str | None = None,
            missing: int = 0,
        ) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            if retry_after is not None:
                self.send_header("Retry-After", retry_after)
            self.end_headers()
            self.wfile.write(data[: len(data) - missing])
            if missing:
                self.close_connection = True

    with listening(Handler, served.closed) as served.url:
        yield served
