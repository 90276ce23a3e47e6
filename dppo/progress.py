"""Progress of long work: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

from dppo.processes import rank

# Without a terminal a long stage still says every so often that it lives.
_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """``with Progress("train", 150, "step") as progress: ... progress.advance()``; ``total`` and counts in units.

    Of several processes the first one alone shows anything. Where ``total`` is its share ``of`` what all do, it shows
    the whole: the shares are equal work.
    """

    def __init__(self, title: str, total: int, unit: str, *, start: int = 0, of: int | None = None) -> None:
        from tqdm import tqdm

        self._title, self._unit, self._share, self._own = title, unit, total, start
        self._total, self._done, self._first = total if of is None else of, start, start
        self._started = self._printed = time.monotonic()
        self._note = ""
        self._speaks = rank() == 0
        self._terminal = self._speaks and sys.stderr.isatty()
        self._bar = tqdm(
            total=self._total,
            initial=start,
            desc=f"  {title}",
            unit=unit,
            leave=False,
            dynamic_ncols=True,
            disable=not self._terminal,
            file=sys.stderr,
        )

    def advance(self, n: int = 1) -> None:
        self._own += n
        done = self._own if self._share == self._total else self._own * self._total // self._share
        self._bar.update(done - self._done)
        self._done = done
        now = time.monotonic()
        if self._speaks and not self._terminal and now - self._printed >= _SECONDS_BETWEEN_LINES:
            self._printed = now
            rate = (self._done - self._first) / (now - self._started)
            left = (self._total - self._done) / rate if rate else 0.0
            print(
                f"  {self._title}: {self._done}/{self._total} {self._unit}s, {rate:.2f}/s, {left:.0f} s left"
                f"{'  ' + self._note if self._note else ''}",
                file=sys.stderr,
                flush=True,
            )

    def note(self, text: str) -> None:
        """Show a short text behind the bar."""
        self._note = text
        self._bar.set_postfix_str(text, refresh=False)

    def clear(self) -> None:
        """Take the bar off its line, so that something else can be printed there; the next advance draws it again."""
        if self._terminal:
            self._bar.clear()
            sys.stderr.flush()

    def __enter__(self) -> Progress:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bar.close()
