"""One process that answers many cases, one after another: ``python -m tests.fuzz.worker LIMIT_IN_BYTES``.

Reads a JSON line for each case {folder, environment, command, words}, runs the command as its module would be run, in
``folder``, with the standard streams going to files, and answers with a JSON line {status}. The real entry of every
command runs, without the seconds of start-up.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import sys
import tempfile
import traceback
from collections.abc import Sequence
from typing import Any

from tests.conftest import remember_parsed


def main(limit: int) -> None:
    """Answer cases until there are no more."""
    requests = os.fdopen(os.dup(0), encoding="utf-8")
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _stream(os.devnull, 0, os.O_RDONLY)
    remember_parsed(setattr)
    for line in requests:
        case = json.loads(line)
        status = _answer(case)
        replies.write(json.dumps({"status": status}) + "\n")
        replies.flush()


def _answer(case: dict[str, Any]) -> int:
    before = dict(os.environ)
    os.environ.update(case["environment"])
    tempfile.tempdir = None  # asked again: every case has its own
    os.chdir(case["folder"])
    for number, name in ((1, "stdout"), (2, "stderr")):
        _stream(case[name], number, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    try:
        return _run(case["command"], case["words"])
    finally:
        with contextlib.suppress(OSError, ValueError):
            sys.stdout.flush()
            sys.stderr.flush()
        os.environ.clear()
        os.environ.update(before)


def _run(command: str, words: Sequence[str]) -> int:
    """The exit status that the interpreter would have."""
    sys.argv = [command, *words]
    try:
        if command == "dppo":
            status = importlib.import_module("dppo.__main__").main()
        else:
            name = "dppo.report.__main__" if command == "dppo.report" else command
            status = importlib.import_module(name).main(list(words))
    except SystemExit as stop:
        if stop.code is None or isinstance(stop.code, int):
            return stop.code or 0
        print(stop.code, file=sys.stderr)
        return 1
    except BaseException:
        traceback.print_exc()
        return 1
    return int(status)


def _stream(path: str, number: int, flags: int) -> None:
    descriptor = os.open(path, flags, 0o666)
    os.dup2(descriptor, number)
    os.close(descriptor)


if __name__ == "__main__":
    main(int(sys.argv[1]))
