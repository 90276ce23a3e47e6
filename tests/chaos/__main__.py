"""``python -m tests.chaos --minutes 10 --seed 0``: random kills of runs and searches for a while, and a table of them.

Every case is run once undisturbed. Then, until the time is over, it is started, struck at a random moment, started
again and so on until it completes, and compared with the undisturbed run: results, weights, answers, log-probs,
metrics and trials must be equal to the bit. The exit status is 1 if anything differs, is lost or ends badly.
"""

from __future__ import annotations

import argparse
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path

from tests.chaos.outcomes import differences, leftovers, outcome, unsound
from tests.chaos.runs import CASES, Case, Command, Ended, Fork, forking, run, strikes

SIGNALS = {"kill": signal.SIGKILL, "term": signal.SIGTERM, "int": signal.SIGINT, "usr1": signal.SIGUSR1}
_MOST = 8  # strikes of one run
# Statuses that a run struck by a signal it can notice may end with, and 0 where it was nearly over.
_STOPPED = (0, 75, 130)


@dataclass
class Tally:
    """What was struck where, and how it came out."""

    struck: Counter[tuple[str, str]] = field(default_factory=Counter)  # by case and stage
    signals: Counter[str] = field(default_factory=Counter)
    places: Counter[str] = field(default_factory=Counter)
    runs: Counter[str] = field(default_factory=Counter)
    leftovers: int = 0
    slowest: float = 0.0
    failures: list[str] = field(default_factory=list)

    @property
    def n_struck(self) -> int:
        return self.struck.total()

    def lines(self) -> list[str]:
        """The table: stages down, cases across."""
        cases = sorted(self.runs)
        stages = [stage for stage, _ in Counter(stage for _, stage in self.struck.elements()).most_common()]
        rows = [["struck in", *cases, "all"]]
        for stage in stages:
            counts = [self.struck[case, stage] for case in cases]
            rows.append([stage, *map(str, counts), str(sum(counts))])
        totals = [sum(count for (name, _), count in self.struck.items() if name == case) for case in cases]
        rows.append(["all", *map(str, totals), str(self.n_struck)])
        rows.append(["runs completed", *(str(self.runs[case]) for case in cases), str(self.runs.total())])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines.append("signals: " + ", ".join(f"{name} {count}" for name, count in self.signals.most_common()))
        if self.places:
            lines.append(f"before {self.places.total()} changes of files, of {len(self.places)} kinds")
        lines.append(f"left until gc: {self.leftovers} files and folders; nothing of them was used")
        lines.append(f"failures: {len(self.failures)}")
        return lines


def survive(
    starter: Fork | Command,
    case: Case,
    folder: Path,
    whole: tuple[Ended, dict[str, object]],
    chance: random.Random,
    tally: Tally,
    kinds: list[str],
    *,
    most: int = _MOST,
    rows: int = 4,
) -> None:
    """Strike one run of a case again and again, let it complete, and compare; what is wrong goes into ``tally``."""
    undisturbed, expected = whole
    history = []
    left = chance.randint(1, most)
    moments = strikes(case, chance, undisturbed, [SIGNALS[kind] for kind in kinds], counted=isinstance(starter, Fork))
    while left:
        strike = next(moments)
        ended = run(starter, case, folder, strike, rows)
        history.append(f"{strike} in {ended.stage}, {ended.place}: status {ended.status}")
        if ended.struck:
            left -= 1
            tally.struck[case.name, ended.stage] += 1
            tally.signals[strike.signal.name] += 1
            if ended.place:
                tally.places[ended.place] += 1
        allowed = (-strike.signal,) if strike.signal == signal.SIGKILL and not strike.worker else _STOPPED
        if (ended.struck and ended.status not in (*allowed, 0)) or (not ended.struck and ended.status != 0):
            tally.failures.append(f"{case.name}: status {ended.status} after {strike}\n{ended.log[-2000:]}")
        if "Traceback" in ended.log:
            tally.failures.append(f"{case.name}: a traceback after {strike}\n{ended.log[-3000:]}")
        if ended.status == 0 and (strike.worker or not ended.struck):
            break
    else:
        ended = run(starter, case, folder, None, rows)
        if ended.status != 0 or "Traceback" in ended.log:
            tally.failures.append(f"{case.name}: the last start ended with {ended.status}\n{ended.log[-3000:]}")
            return
    tally.runs[case.name] += 1
    tally.leftovers += leftovers(folder)
    told = differences(expected, outcome(case, folder)) + unsound(folder)
    if told:
        tally.failures.append("\n  ".join([f"{case.name}: not as undisturbed, in {folder}", *told[:20], *history]))


def undisturbed(starter: Fork | Command, case: Case, folder: Path, rows: int = 4) -> tuple[Ended, dict[str, object]]:
    """A whole run of a case and its outcome."""
    ended = run(starter, case, folder, None, rows)
    assert ended.status == 0, ended.log
    return ended, outcome(case, folder)


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", action="append", choices=list(SIGNALS), help="a signal to send (kill); repeat")
    parser.add_argument("--case", action="append", choices=list(CASES), help="what is run (all); repeat")
    parser.add_argument("--start", choices=["fork", "command"], default="fork", help="forks, or real commands")
    parser.add_argument("--keep", type=Path, help="a folder for everything, which is kept")
    given = parser.parse_args()
    chance, tally = random.Random(given.seed), Tally()
    rows = 4 if given.start == "fork" else 0
    deadline = time.monotonic() + 60 * given.minutes
    with (
        tempfile.TemporaryDirectory() if given.keep is None else nullcontext(str(given.keep)) as place,
        forking() if given.start == "fork" else nullcontext(Command()) as starter,
    ):
        root = Path(place).resolve()
        cases = [CASES[name] for name in given.case or CASES]
        whole = {case.name: undisturbed(starter, case, _made(root / f"whole-{case.name}"), rows) for case in cases}
        for number in range(10**9):
            if time.monotonic() > deadline:
                break
            case = cases[number % len(cases)]
            folder = _made(root / f"{number}-{case.name}")
            before = len(tally.failures)
            survive(starter, case, folder, whole[case.name], chance, tally, given.kind or ["kill"], rows=rows)
            for failure in tally.failures[before:]:
                print(f"FAILED {failure}", flush=True)
            if given.keep is None and len(tally.failures) == before:
                shutil.rmtree(folder)
            print(f"{number + 1} runs, {tally.n_struck} signals, {len(tally.failures)} failures", flush=True)
    for line in tally.lines():
        print(line)
    return 1 if tally.failures else 0


def _made(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder


if __name__ == "__main__":
    sys.exit(main())
