"""``python -m dppo.report RUNS``: one HTML page that compares runs, a multirun or a search."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from dppo.command_line import Parser, command
from dppo.errors import UserError
from dppo.evaluation.comparison import METRICS
from dppo.report.making import report


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for a user's error."""
    parser = Parser(prog="python -m dppo.report", description=__doc__.replace("``", ""))
    parser.add_argument("paths", nargs="+", type=Path, help="run directories, or folders with runs anywhere below")
    parser.add_argument("--output", type=Path, help="a directory for the report (default: report in the first of them)")
    parser.add_argument(
        "--metric", choices=METRICS, default="win_rate", help="; ".join(f"{k}: {v}" for k, v in METRICS.items())
    )
    parser.add_argument("--baseline", help="a word of its label, such as loss=dpo (default: DPO, else SFT)")
    parser.add_argument("--n-bootstrap", type=int, default=10_000, help="resamples of prompts and seeds")
    parser.add_argument("--title", help="the heading of the page (default: the names of the directories)")
    arguments = parser.parse_args(argv)
    if arguments.n_bootstrap < 100:
        raise UserError(f"--n-bootstrap {arguments.n_bootstrap}: must be at least 100")
    output = arguments.output or arguments.paths[0] / "report"
    page = report(
        arguments.paths,
        output,
        metric=arguments.metric,
        baseline=arguments.baseline,
        n_bootstrap=arguments.n_bootstrap,
        title=arguments.title,
    )
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
