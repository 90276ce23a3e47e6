"""``python -m tests.fuzz --minutes 10 --seed 0``: cases until the time is over, then what was wrong, by class."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from tests.fuzz import files, words, world
from tests.fuzz.cases import Case, Verdict, Worker, clear, judge

MAKERS: dict[str, Callable[[Path, int, int], Case]] = {
    "overrides": words.override_case,
    "data": files.data_case,
    "sweeps": words.sweep_case,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run cases; returns 0 if all were right, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--minutes", type=float, default=5.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", choices=list(MAKERS), help="one kind of cases")
    parser.add_argument("--case", type=int, help="repeat the case of this number; needs --only")
    parser.add_argument("--first", type=int, default=0, help="number of the first case")
    parser.add_argument("--most", type=int, default=1_000_000, help="number of cases at most")
    parser.add_argument("--limit", type=float, default=60.0, help="seconds after which a case hangs")
    arguments = parser.parse_args(argv)
    sys.set_int_max_str_digits(0)  # this process writes numbers of thousands of digits; the workers read them
    kinds = [arguments.only] if arguments.only else list(MAKERS)
    with tempfile.TemporaryDirectory(prefix="dppo-fuzz-") as folder:
        root = Path(folder)
        root.chmod(0o755)
        (root / "world").mkdir()
        world.build(root / "world")
        session = Session(root, arguments.limit)
        try:
            if arguments.case is not None:
                session.show(MAKERS[kinds[0]](root / "world", arguments.case, arguments.seed))
                return 1 if session.wrong else 0
            end = time.monotonic() + arguments.minutes * 60
            for number in range(arguments.first, arguments.first + arguments.most):
                if time.monotonic() > end:
                    break
                kind = kinds[number % len(kinds)]
                session.run(MAKERS[kind](root / "world", number, arguments.seed))
        except KeyboardInterrupt:
            print("interrupted")
        finally:
            session.worker.stop()
        session.summary()
        return 1 if session.wrong else 0


class Session:
    """The cases of one call and what came of them."""

    def __init__(self, root: Path, limit: float) -> None:
        self.root = root
        self.worker = Worker(limit)
        self.tried: Counter[tuple[str, object]] = Counter()
        self.wrong: Counter[str] = Counter()
        self.began = time.monotonic()

    def run(self, case: Case) -> Verdict:
        """Run a case; one that is wrong is run again in a fresh process, and told if it is wrong there too."""
        verdict = self._judge(case)
        self.tried[case.kind, verdict.status] += 1
        if verdict.wrong:
            self.worker.stop()
            again = self._judge(case)
            if again.wrong:
                verdict = again
                note = ""
            else:
                note = " (not in a fresh process)"
            for kind, detail in verdict.wrong:
                self.wrong[f"{kind}{note}"] += 1
                print(
                    f"WRONG {case.kind} {case.number} {kind}{note}: {detail}\n      {case.command}: {case.note}",
                    flush=True,
                )
        return verdict

    def show(self, case: Case) -> None:
        """Run one case and print all of it."""
        print(f"{case.command} {' '.join(map(repr, case.words))}\n{case.note}")
        verdict = self.run(case)
        self.worker.stop()
        print(f"status {verdict.status}\n--- stdout\n{verdict.out}\n--- stderr\n{verdict.err}")

    def summary(self) -> None:
        """Print how many cases ended how."""
        seconds = time.monotonic() - self.began
        print(f"{self.tried.total()} cases in {seconds:.0f} s")
        for (kind, status), count in sorted(self.tried.items(), key=str):
            print(f"  {kind:<10} {'ended by force' if status is None else f'exit status {status}'}: {count}")
        for kind, count in self.wrong.most_common():
            print(f"  wrong: {kind}: {count}")
        if not self.wrong:
            print("  all right")

    def _judge(self, case: Case) -> Verdict:
        top = self.root / f"{case.kind}-{case.number}"
        try:
            return judge(case, self.worker, top)
        finally:
            clear(top)


if __name__ == "__main__":
    sys.exit(main())
