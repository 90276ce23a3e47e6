"""A case, what running it must look like, and the worker processes that run it."""

from __future__ import annotations

import contextlib
import functools
import json
import os
import re
import select
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from dppo.artifacts import maintenance
from dppo.artifacts.layout import TAG
from dppo.errors import UserError
from tests.fuzz.world import REPOSITORY

_LONGEST_LINE = 4000  # characters of a message: what was typed may be quoted, but not pages of it
_MEMORY = 12 * 2**30  # bytes of address space of a worker
_NOBODY = 65534  # who runs the cases where the fuzzer itself may do everything


@functools.cache
def others_run() -> bool:
    """Whether cases run as another user, who may write to its own folders only; to root nothing is forbidden."""
    if os.getuid() != 0:
        return False
    with contextlib.suppress(OSError):  # an interpreter that only root can reach
        return subprocess.run([sys.executable, "-c", ""], user=_NOBODY, group=_NOBODY, check=False).returncode == 0
    return False


@dataclass(frozen=True)
class Case:
    """One command line in a folder of its own.

    ``kind`` names the generator, ``number`` and the seed of the session repeat it. ``prepare`` puts files into the
    folder before it runs. ``statuses`` are the exit statuses that are right; 2 always is.
    """

    kind: str
    number: int
    command: str
    words: tuple[str, ...]
    prepare: Callable[[Path], None]
    statuses: tuple[int, ...] = (0,)
    note: str = ""


@dataclass(frozen=True)
class Verdict:
    """What came of a case: ``wrong`` are the ways in which it is, as (class, detail); empty if it is right."""

    case: Case
    status: int | None
    out: str
    err: str
    wrong: tuple[tuple[str, str], ...]


@dataclass
class Worker:
    """A process that runs cases, started again when it hangs or dies."""

    seconds: float
    _process: subprocess.Popen[str] | None = field(default=None, init=False)

    def run(self, request: dict[str, object]) -> int | str:
        """The exit status, or ``hang`` or ``died`` with the signal."""
        if self._process is None:
            self._start()
        process = self._process
        assert process is not None and process.stdin is not None and process.stdout is not None
        process.stdin.write(json.dumps(request) + "\n")
        process.stdin.flush()
        if not select.select([process.stdout], [], [], self.seconds)[0]:
            self.stop()
            return f"hang: no end after {self.seconds:.0f} s"
        line = process.stdout.readline()
        if not line:
            self._process = None
            return f"died: {process.wait()}"
        status: int = json.loads(line)["status"]
        return status

    def stop(self) -> None:
        """End the process, if there is one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None

    def _start(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.fuzz.worker", str(_MEMORY)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPOSITORY,
            user=_NOBODY if others_run() else None,
            group=_NOBODY if others_run() else None,
            extra_groups=[] if others_run() else None,
            env={
                **{name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "HF_"))},
                "PYTHONPATH": os.pathsep.join([str(REPOSITORY), *filter(None, [os.environ.get("PYTHONPATH")])]),
                "PYTHONDONTWRITEBYTECODE": "1",
                "OMP_NUM_THREADS": "1",
                "HF_HUB_OFFLINE": "1",
                "WANDB_MODE": "offline",
                "COLUMNS": "100",
            },
        )


def judge(case: Case, worker: Worker, top: Path) -> Verdict:
    """Run a case below ``top``, which is made for it, and say what is wrong with what it did.

    Its folder lies four levels down, so that ``..`` leads nowhere else; home and temporary files have folders too.
    """
    here = top / "a" / "b" / "c" / "here"
    for folder in (here, top / "home", top / "tmp", top / "streams"):
        folder.mkdir(parents=True)
    case.prepare(here)
    if others_run():
        subprocess.run(["chown", "-Rh", "--from=0", f"{_NOBODY}", str(top)], check=True)
        for secret in here.rglob("*.forbidden*"):
            os.chown(secret, 0, 0, follow_symlinks=False)
    else:
        for secret in here.rglob("*.forbidden*"):
            secret.chmod(0)
    before = dict(_files(top))
    out, err = top / "streams" / "out", top / "streams" / "err"
    status = worker.run(
        {
            "folder": str(here),
            "environment": {"HOME": str(top / "home"), "TMPDIR": str(top / "tmp"), "PWD": str(here)},
            "stdout": str(out),
            "stderr": str(err),
            "command": case.command,
            "words": case.words,
        }
    )
    said_out, said_err = (path.read_bytes().decode("utf-8", "replace") if path.exists() else "" for path in (out, err))
    wrong: list[tuple[str, str]] = []
    if isinstance(status, str):
        wrong.append((status.partition(":")[0], status))
    else:
        wrong += _said(case, status, said_out, said_err)
    wrong += _left(case, top, here, before)
    return Verdict(case, status if isinstance(status, int) else None, said_out, said_err, tuple(wrong))


def _said(case: Case, status: int, out: str, err: str) -> Iterator[tuple[str, str]]:
    for text in (out, err):
        if "Traceback (most recent call last)" in text:
            own = re.findall(r'File "[^"]*/((?:dppo|hydra_plugins)/[^"]*)", line (\d+)', text)
            yield "traceback", f"{':'.join(own[-1]) if own else '?'}: {text.strip().splitlines()[-1][:300]}"
            return
    if status not in (*case.statuses, 2):
        yield "status", f"exit status {status}: {err.strip()[-300:]}"
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    if status == 2:
        if len(errors) != 1:
            yield "lines", f"{len(errors)} lines begin with error: {err.strip()[-300:]}"
        elif not errors[0].removeprefix("error: ").strip():
            yield "lines", "an empty message"
        elif len(errors[0]) > _LONGEST_LINE:
            yield "long", f"a message of {len(errors[0])} characters: {errors[0][:200]}"
    elif status == 0 and errors:
        yield "lines", f"exit status 0, but {errors[0][:300]}"
    if any(re.search(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]", line) for line in errors):
        yield "terminal", f"control characters in what is printed: {err[-200:]!r}"


def _left(case: Case, top: Path, here: Path, before: dict[Path, object]) -> Iterator[tuple[str, str]]:
    named = [here / "outputs"]
    for word in case.words:
        for value in (word, *word.split("=")):
            value = value.strip("'\"")
            if value and "\0" not in value and (place := Path(os.path.normpath(here / value))) not in here.parents:
                named.append(place) if place != here else None
    after = dict(_files(top))
    for path in sorted(after.keys() | before.keys()):
        if path.is_relative_to(top / "streams") or any(path.is_relative_to(place) for place in named):
            continue
        if path.is_relative_to(top / "home" / ".cache") or path.is_relative_to(top / "home" / ".config"):
            continue  # of libraries, such as the fonts of matplotlib
        if path.is_dir() and path not in before:
            continue  # on the way to what is named; its files are looked at
        if before.get(path) != after.get(path) and not path.is_dir():
            yield "outside", f"wrote {path.relative_to(top)}"
    for tag in [path for path in after if path.name == TAG]:
        try:
            layout = maintenance.open_layout(tag.parent)
            for damage in maintenance.verify(layout, remove=False):
                if damage.path not in before:
                    yield "partial", f"{damage.path.relative_to(top)}: {damage.problem}"
        except UserError as error:
            yield "partial", str(error)
        for path in tag.parent.glob(".building/*"):
            yield "partial", f"left {path.relative_to(top)}"


def _files(top: Path) -> Iterator[tuple[Path, object]]:
    for folder, folders, names in os.walk(top):
        for name in [*names, *folders]:
            path = Path(folder) / name
            found = path.lstat()
            yield path, (found.st_size, found.st_mtime_ns) if not path.is_dir() or path.is_symlink() else None


def clear(top: Path) -> None:
    """Remove what a case left."""
    shutil.rmtree(top, ignore_errors=True)
