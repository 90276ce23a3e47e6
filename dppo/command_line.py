"""Shared by the commands: one line for what the user must mend, and the status the shell sees."""

from __future__ import annotations

import argparse
import difflib
import functools
import os
import re
import sys
from collections.abc import Callable, Iterable, Sequence
from typing import NoReturn

from dppo.errors import UserError
from dppo.stopping import EXIT_INTERRUPTED
from dppo.terminal import harmless

EXIT_FAILED = 1
EXIT_USER_ERROR = 2
# Of a longer message the middle is left out: it quotes what was typed, which the user has.
_HEAD, _TAIL = 700, 500


class Parser(argparse.ArgumentParser):
    """Arguments of a command; what is wrong with them is a UserError in place of argparse's usage lines."""

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


def complain(message: str) -> int:
    """Print the one line and return the exit status of a user's error."""
    if len(message) > _HEAD + _TAIL:
        message = f"{message[:_HEAD]} ... {message[-_TAIL:]}"
    print(f"error: {harmless(message)}", file=sys.stderr, flush=True)
    return EXIT_USER_ERROR


def command(main: Callable[[Sequence[str] | None], int]) -> Callable[..., int]:
    """The main function of a command, with its errors in one line; quiet when its reader has seen enough."""

    @functools.wraps(main)
    def answer(argv: Sequence[str] | None = None) -> int:
        try:
            status = main(argv)
            sys.stdout.flush()
            return status
        except UserError as error:
            return complain(str(error))
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            return EXIT_INTERRUPTED
        except BrokenPipeError:
            # What is still buffered has no reader: the flush at exit would complain.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            return 0
        except OSError as error:
            return complain(f"{error.filename}: {error.strerror}" if error.filename else str(error))

    return answer


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Rows of equally many cells as lines of a table."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def explain_composition(error: Exception, overrides: Sequence[str], known: Iterable[str]) -> str:
    """One line for an exception of Hydra's while composing; ``known`` are the keys that exist."""
    text = str(error)
    if match := re.search(r"Could not override '([^']+)'\.?(.*)", text, re.DOTALL):
        return _unknown_key(match[1], match[2], overrides, list(known))
    if match := re.search(r"Could not find '([^']+)/([^'/]+)'", text):
        group, option = match[1], match[2]
        options = re.findall(r"^\t(\w+)$", text, re.MULTILINE)
        near = difflib.get_close_matches(option, options, n=1)
        hint = f" Did you mean {near[0]}?" if near else ""
        listed = f" Options: {', '.join(options)}" if options else " The group has no options yet"
        words = (override.lstrip("+") for override in overrides)
        chosen = re.compile(rf"{re.escape(group)}(@[\w.]+)?={re.escape(option)}")
        typed = next(filter(chosen.fullmatch, words), f"{group}={option}")
        return f"{typed}: there is no such option.{hint}{listed}"
    if match := re.search(r"Ambiguous value for argument '([^']+)'", text):
        return f"{match[1]}: several values need a multirun: add -m (or --multirun) as the last word"
    if match := re.search(r"Error parsing override '([^']*)'\n([^\n]*)", text):
        reason = re.sub(r"expecting \{.*\}", "here", match[2])
        return f"{match[1]}: not an override ({reason}); write key=value, group=option or +key=value"
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return " ".join(lines[:2]) if lines else type(error).__name__


def _unknown_key(key: str, rest: str, overrides: Sequence[str], known: Sequence[str]) -> str:
    typed = next((override for override in overrides if re.split(r"[=@]", override.lstrip("+~"))[0] == key), key)
    if "defaults list" in rest or "Did you mean to override" in rest:
        group = re.split(r"[/@]", key)[0]
        return (
            f"{typed}: nothing in this run uses {key} (the chosen {'loss' if group in ('loss', 'penalty') else group} "
            f"does not take it); drop it, or choose an option that does, for instance loss=unll"
        )
    parent, _, last = key.rpartition(".")
    siblings = [name.rpartition(".")[2] for name in known if name.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(last, siblings, n=1, cutoff=0.6)
    if near:
        return f"{typed}: unknown key. Did you mean {f'{parent}.' if parent else ''}{near[0]}?"
    elsewhere = [name for name in known if name.rpartition(".")[2] == last]
    if elsewhere:
        return f"{typed}: unknown key. Did you mean {elsewhere[0]}?"
    where = f"in {parent}" if parent else "at the top"
    return f"{typed}: unknown key. Known {where}: {', '.join(sorted(siblings)) or 'none'}"


def duration(seconds: float) -> str:
    """A time to read."""
    if seconds < 90:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
