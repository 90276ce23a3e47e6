"""A server on loopback that takes what W&B uploads: enough of its HTTP interface to see what arrives, and how often.

The client is W&B's own. What a server would do with the data beyond keeping it is not here.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler
from threading import Event
from typing import Any

import wandb  # noqa: TID251 - its process-wide state is reset between servers

from dppo.tracking import weights_and_biases
from tests.loopback import listening


class Received:
    """What arrived: runs by id as they were registered, and the lines of their history and summary."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[str, Any]] = {}
        self.history: dict[str, dict[int, dict[str, Any]]] = {}
        self.summary: dict[str, dict[str, Any]] = {}
        self.exit_codes: dict[str, int] = {}
        self.requests: list[str] = []
        self.lines: list[tuple[str, dict[str, Any]]] = []  # of histories, as they came in
        self.broken = False
        self.views: list[dict[str, Any]] = []
        self.silent_after: int | None = None
        self.n_requests = 0
        self.mute = Event()
        self.closed = Event()
        self.url = ""

    def rows(self, run: str) -> list[dict[str, Any]]:
        return [row for _, row in sorted(self.history.get(run, {}).items())]

    # --- the interface -----------------------------------------------------------------------------------------------

    def graphql(self, query: str, variables: dict[str, Any]) -> dict[str, Any]:
        operation = (re.search(r"(?:query|mutation)\s+(\w+)", query) or [""])[1]
        self.requests.append(operation)
        if operation == "UpsertBucket":
            run = str(variables["name"])
            inserted = run not in self.runs
            known = self.runs.setdefault(run, {})
            known.update({key: value for key, value in variables.items() if value is not None})
            return {"upsertBucket": {"bucket": self._bucket(run), "inserted": inserted}}
        if operation == "RunResumeStatus":
            run = str(variables["name"])
            bucket = self._bucket(run) if run in self.runs else None
            return {"model": {"id": "1", "name": "dppo", "entity": {"id": "1", "name": "me"}, "bucket": bucket}}
        if operation in ("Viewer", "ServerInfo"):
            viewer = {"id": "1", "entity": "me", "username": "me", "flags": "{}", "teams": {"edges": []}}
            return {"viewer": viewer, "serverInfo": {"cliVersionInfo": {}, "latestLocalVersionInfo": None}}
        if operation == "CreateArtifact":
            sequence = {"id": "1", "latestArtifact": {"id": "1", "versionIndex": 0}}
            return {"createArtifact": {"artifact": {"id": "1", "state": "COMMITTED", "artifactSequence": sequence}}}
        if operation == "CreateRunFiles":
            files = [{"name": name, "uploadUrl": f"{self.url}/stored/{name}"} for name in variables["files"]]
            return {"createRunFiles": {"runID": "1", "uploadHeaders": [], "files": files}}
        if operation == "UpsertView2":
            self.views.append(variables)
            return {"upsertView": {"view": {"id": "1", "name": variables["name"]}, "inserted": True}}
        return {}

    def _bucket(self, run: str) -> dict[str, Any]:
        rows = self.rows(run)
        # A run that the client has begun holds its telemetry: without it nothing is resumed.
        begun = json.loads(self.runs[run].get("config", "{}")).get("_wandb", {}).get("value", {})
        project = {"id": "1", "name": self.runs[run].get("project", "dppo"), "entity": {"id": "1", "name": "me"}}
        return {
            "id": f"id-{run}",
            "name": run,
            "displayName": self.runs[run].get("displayName", run),
            "description": None,
            "config": self.runs[run].get("config", "{}"),
            "sweepName": None,
            "project": project,
            "historyLineCount": len(rows),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "historyTail": json.dumps([json.dumps(rows[-1])] if rows else []),
            "eventsTail": "[]",
            "summaryMetrics": json.dumps(self.summary.get(run, {})),
            "tags": self.runs[run].get("tags", []),
            "wandbConfig": json.dumps({"t": begun.get("t", {})}),
        }

    def file_stream(self, run: str, body: dict[str, Any]) -> None:
        for name, part in (body.get("files") or {}).items():
            lines = [json.loads(line) for line in part["content"]]
            if name == "wandb-history.jsonl":
                for place, line in enumerate(lines, start=part["offset"]):
                    self.history.setdefault(run, {})[place] = line
                    self.lines.append((run, line))
            elif name == "wandb-summary.json":
                self.summary.setdefault(run, {}).update(lines[-1])
        if body.get("complete"):
            self.exit_codes[run] = int(body["exitcode"])


def forget() -> None:
    """Have this process forget which server W&B talks to, and which one did not answer."""
    with suppress(ConnectionError):  # its process may have been killed by another test
        wandb.teardown()
    weights_and_biases._refused.clear()


@contextmanager
def serve() -> Iterator[Received]:
    """What the server at ``url`` has received.

    ``broken`` makes it answer 400 to everything, ``mute`` nothing, ``silent_after`` nothing after so many requests.
    """
    received = Received()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: object) -> None:
            pass

        def _answer(self) -> None:
            data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            if self.headers.get("Content-Encoding") == "gzip":
                data = gzip.decompress(data)
            received.n_requests += 1
            if received.silent_after is not None and received.n_requests > received.silent_after:
                received.mute.set()
            if received.mute.is_set():
                received.closed.wait()
                return
            answer: dict[str, Any] = {}
            if received.broken:
                received.requests.append(self.path)
                answer = {"errors": [{"message": "out of order"}]}
            elif self.path == "/graphql":
                body = json.loads(data)
                answer = {"data": received.graphql(body["query"], body.get("variables") or {})}
            elif match := re.fullmatch(r"/files/[^/]*/[^/]*/([^/]+)/file_stream", self.path):
                received.file_stream(match[1], json.loads(data))
            text = json.dumps(answer).encode()
            self.send_response(400 if received.broken else 200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = _answer

    with listening(Handler, received.closed) as received.url:
        yield received
