"""``python -m dppo.compare RUNS``: which configuration is better, with intervals over prompts and seeds."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from dppo.command_line import Parser, aligned, command
from dppo.evaluation.comparison import (
    METRICS,
    PAIR_METRICS,
    Line,
    compare_runs,
    configurations,
    sft_value,
    shown_interval,
    shown_p,
)
from dppo.evaluation.runs import find_runs
from dppo.evaluation.win_rates import Interval

_WHISKERS = 25


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for a user's error."""
    arguments = _parser().parse_args(argv)
    found = configurations(find_runs(arguments.paths))
    lines = compare_runs(
        found,
        metric=arguments.metric,
        baseline=arguments.baseline,
        n_bootstrap=arguments.n_bootstrap,
        seed=0,
    )
    print("\n".join(table(lines, arguments.metric, sft_value(found, arguments.metric))))
    if arguments.json is not None:
        content = {"metric": arguments.metric, "lines": [_without_nan(asdict(line)) for line in lines]}
        arguments.json.write_text(json.dumps(content, indent=2))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m dppo.compare", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="run directories, or folders with runs anywhere below")
    parser.add_argument(
        "--metric", choices=METRICS, default="win_rate", help="; ".join(f"{k}: {v}" for k, v in METRICS.items())
    )
    parser.add_argument("--baseline", help="a word of its label, such as loss=dpo (default: the oldest configuration)")
    parser.add_argument("--n-bootstrap", type=int, default=10_000, help="resamples of prompts and seeds")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    return parser


def table(lines: Sequence[Line], metric: str, sft: float | None) -> list[str]:
    """The comparison as text; the whiskers span the lowest to the highest bound, ``sft`` is the SFT model's value."""
    low = min(line.value.low for line in lines)
    high = max(line.value.high for line in lines)
    comparisons = sum(line.difference is not None for line in lines)
    rows = [
        [
            "configuration",
            "seeds",
            metric,
            f"{low:.3f} {'':^{_WHISKERS - 14}} {high:.3f}",
            "t over seeds",
            "difference",
            "p",
            "KL",
            "tokens",
        ]
    ]
    for line in lines:
        seeds = str(len(line.seeds)) + (f" ({len(line.diverged)} diverged)" if line.diverged else "")
        rows.append(
            [
                line.label,
                seeds,
                shown_interval(line.value),
                _whiskers(line.value, low, high),
                "" if math.isnan(line.over_seeds.low) else f"[{line.over_seeds.low:.3f}, {line.over_seeds.high:.3f}]",
                "baseline" if line.difference is None else shown_interval(line.difference, sign="+"),
                shown_p(line.p),
                f"{line.means['kl_nats_per_answer']:.2f}" if line.means else "",
                f"{line.means['tokens']:.1f}" if line.means else "",
            ]
        )
    text = aligned(rows)
    notes = [
        f"{metric}: {METRICS[metric]}; n = {lines[0].n}; 95 % intervals, bootstrap over seeds and "
        f"{'pairs' if metric in PAIR_METRICS else 'prompts'}."
    ]
    if any(len(line.seeds) > 1 for line in lines):
        notes[0] += " t over seeds: Student's interval over the seeds' means alone."
    if sft is not None:
        notes[0] += f" The SFT model: {sft:.3f}."
    if comparisons:
        several = f"{comparisons} comparison{'s' if comparisons > 1 else ''}"
        notes.append(
            f"Differences are paired, over common seeds; {several}: simultaneous 95 % intervals, Holm's p. "
            "KL to SFT in nats an answer."
        )
    if all(len(line.seeds) == 1 for line in lines):
        notes.append(
            "One seed each: the intervals hold for these trained models, not for the methods; add seed=0,1,2,3,4."
        )
    return [text[0], "-" * max(map(len, text)), *text[1:], "", *notes]


def _whiskers(found: Interval, low: float, high: float) -> str:
    """An interval as ``|--o--|`` on a scale from ``low`` to ``high``."""
    scale = (_WHISKERS - 1) / (high - low) if high > low else 0.0
    left, middle, right = (round((value - low) * scale) for value in (found.low, found.value, found.high))
    cells = [" "] * _WHISKERS
    cells[left : right + 1] = "-" * (right + 1 - left)
    cells[left] = cells[right] = "|"
    cells[middle] = "o"
    return "".join(cells)


def _without_nan(value: object) -> object:
    if isinstance(value, dict):
        return {key: _without_nan(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
