"""Starts ``python -m dppo`` many times: what every start would import is imported once, each run is a fork.

Orders arrive on stdin, one JSON object a line: ``cwd``, ``log``, ``words``, ``rows`` (of a shard), ``operation``,
``signal`` and ``user`` (its number, its group's and a umask, or null). Before a run's so-manieth change of a file it
sends itself that signal. The answers are its process id and,
when it has ended, its status. How many changes a whole run made is the last line of its log.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import tempfile
import traceback
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any, NoReturn

import accelerate  # noqa: F401
import peft  # noqa: F401
import transformers.models.llama.modeling_llama  # noqa: F401

from dppo import __main__ as command
from dppo import pipeline  # noqa: F401
from dppo.stages import generate, reference, scores
from tests.conftest import small

OPERATIONS, STRUCK = "file operations: ", "signal before "
_CHANGES = frozenset({"os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.copyfile", "os.utime"})


def main() -> None:
    if "warm" in sys.argv:
        # What is imported late too: another user may not be allowed to read it where Python lies.
        with tempfile.TemporaryDirectory() as folder, redirect_stdout(sys.stderr):
            sys.argv = ["python -m dppo", *small("loss=unll", "alpha=0.1", "device=cpu", f"cache.dir={folder}")]
            sys.argv.append(f"hydra.run.dir={folder}/run")
            command.main()
    print(json.dumps({"ready": True}), flush=True)
    for line in sys.stdin:
        pid = os.fork()
        if pid == 0:
            _run(json.loads(line))
        print(json.dumps({"pid": pid}), flush=True)
        _, status = os.waitpid(pid, 0)
        print(json.dumps({"status": os.waitstatus_to_exitcode(status)}), flush=True)


def _run(order: dict[str, Any]) -> NoReturn:
    os.setsid()  # a signal to the killer's terminal is not this run's
    os.chdir(order["cwd"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    nowhere = os.open(os.devnull, os.O_RDONLY)
    for number, descriptor in enumerate((nowhere, log, log)):
        os.dup2(descriptor, number)
    if order["user"] is not None:
        user, group, umask = order["user"]
        os.setgroups([group])
        os.setgid(group)
        os.setuid(user)
        os.umask(umask)
        os.environ["HOME"] = order["cwd"]
    generate._ROWS_PER_SHARD = reference._ROWS_PER_SHARD = scores._ANSWERS_PER_CALL = order["rows"]
    done = _count(Path.cwd(), order["operation"], order["signal"])
    sys.argv = ["python -m dppo", *order["words"]]
    status = 1
    try:
        status = command.main()
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        os.write(1, f"{OPERATIONS}{done[0]}\n".encode())
        os._exit(status)


def _count(below: Path, at: int | None, number: int) -> list[int]:
    """Count the changes of files below a folder; before change ``at`` the signal ``number`` is sent."""
    done = [0]

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event not in _CHANGES and not (event == "open" and _writes(arguments)):
            return
        path = arguments[0]
        if not isinstance(path, str | os.PathLike) or below not in (place := Path(os.path.abspath(path))).parents:
            return
        done[0] += 1
        if done[0] == at:
            os.write(1, f"{STRUCK}{event} {place.relative_to(below)}\n".encode())
            signal.raise_signal(number)

    sys.addaudithook(hook)
    return done


def _writes(arguments: tuple[Any, ...]) -> bool:
    _, mode, flags = arguments
    return bool(set(mode or "") & set("wxa+")) or bool(flags & (os.O_WRONLY | os.O_RDWR))


if __name__ == "__main__":
    main()
