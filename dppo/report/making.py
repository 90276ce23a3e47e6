"""From directories to a report."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dppo.errors import UserError
from dppo.evaluation.runs import read_runs
from dppo.report.evidence import gather
from dppo.report.writing import title_of, write


def report(
    paths: Sequence[Path], output: Path, *, metric: str, baseline: str | None, n_bootstrap: int, title: str | None
) -> Path:
    """Write the report of all runs below ``paths`` into ``output`` and return its page.

    Raises UserError if no run can be compared, or the directory can't be written to.
    """
    runs, broken = read_runs(paths)
    evidence = gather(runs, broken, paths[0], metric=metric, baseline=baseline, n_bootstrap=n_bootstrap)
    if not evidence.groups:
        why = "; ".join(f"{one.path}: {one.why}" for one in evidence.left_out[:3])
        raise UserError(f"{' '.join(map(str, paths))}: no finished run{f' that can be read ({why})' if why else ''}")
    return write(evidence, output, title=title or title_of(paths))
