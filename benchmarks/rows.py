"""One row of the table: two things timed in turn, and how they compare."""

from __future__ import annotations

import dataclasses
import resource
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Action = tuple[str, Callable[[], object]]
Timing = tuple[float, float]
"""Seconds on the clock, and seconds of all cores together."""


@dataclass(frozen=True)
class Row:
    """``first`` against ``second``: best and median of both, and the rounds' median ratio second / first.

    ``ratio_best`` is that of the best rounds, ``ratio_cpu`` the median ratio of the cores' seconds, which other work
    on the machine changes less; None where time is not what is measured.
    """

    name: str
    first: str
    second: str
    first_best: float
    first_median: float
    second_best: float
    second_median: float
    ratio_median: float
    ratio_best: float
    ratio_cpu: float | None
    rounds: int
    note: str = ""
    unit: str = "s"

    def noted(self, more: str) -> Row:
        return dataclasses.replace(self, note=f"{self.note}; {more}" if self.note else more)


def compared(
    name: str,
    first: tuple[str, Sequence[Timing]],
    second: tuple[str, Sequence[Timing]],
    note: str = "",
) -> Row:
    """The row of two series of equally many rounds."""
    own, other = [[wall for wall, _ in series] for _, series in (first, second)]
    own_cpu, other_cpu = [[cpu for _, cpu in series] for _, series in (first, second)]
    ratios = [b / a for a, b in zip(own, other, strict=True)]
    return Row(
        name,
        first[0],
        second[0],
        min(own),
        statistics.median(own),
        min(other),
        statistics.median(other),
        statistics.median(ratios),
        min(other) / min(own),
        statistics.median(b / a for a, b in zip(own_cpu, other_cpu, strict=True)),
        len(ratios),
        note,
    )


def timed(action: Callable[[], object]) -> Timing:
    """How long an action takes, processes that it starts and waits for included."""
    before = now()
    action()
    return since(before)


def now() -> Timing:
    """The clock, and what the cores have spent on this process and on those that it has waited for."""
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return time.perf_counter(), sum(one.ru_utime + one.ru_stime for one in used)


def since(before: Timing) -> Timing:
    """What has passed since ``now`` gave ``before``."""
    wall, cpu = now()
    return wall - before[0], cpu - before[1]


def alternate(name: str, first: Action, second: Action, rounds: int, note: str = "") -> Row:
    """Time two actions in turn after one warm-up of each."""
    (row,) = alternate_all(name, [first], second, rounds, note)
    return row


def alternate_all(name: str, firsts: Sequence[Action], second: Action, rounds: int, note: str = "") -> list[Row]:
    """Time several actions and the one they are compared with in turn, after one warm-up of each."""
    actions = [*firsts, second]
    found: list[list[Timing]] = [[] for _ in actions]
    for number in range(rounds + 1):
        for (_, action), series in zip(actions, found, strict=True):
            took = timed(action)
            if number:
                series.append(took)
    return [
        compared(name, (label, series), (second[0], found[-1]), note)
        for (label, _), series in zip(firsts, found[:-1], strict=True)
    ]
