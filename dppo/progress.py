"""Progress of long work: a bar with rate and time left on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import sys
import time
from types import TracebackType

# Without a terminal a long stage still says every so often that it lives.
_SECONDS_BETWEEN_LINES = 30.0


class Progress:
    """``with Progress("train", 150, "step") as progress: ... progress.advance()``; ``total`` and counts in units."""

    def __init__(self, title: str, total: int, unit: str, *, start: int = 0) -> None:
        from tqdm import tqdm

        self._title, self._total, self._unit, self._done, self._first = title, total, unit, start, start
        self._started = self._printed = time.monotonic()
        self._note = ""
        self._terminal = sys.stderr.isatty()
        self._bar = tqdm(
            total=total,
            initial=start,
            desc=f"  {title}",
            unit=unit,
            leave=False,
            dynamic_ncols=True,
            disable=not self._terminal,
            file=sys.stderr,
        )

    def advance(self, n: int = 1) -> None:
        self._done += n
        self._bar.update(n)
        now = time.monotonic()
        if not self._terminal and now - self._printed >= _SECONDS_BETWEEN_LINES:
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
