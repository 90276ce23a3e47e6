"""``python -m dppo.compare RUNS``: which configuration is better, with intervals over prompts and seeds.

Two run directories are compared head to head, with what differs in their configurations and sample answers; with
``--ranking`` all are played against each other.
"""

from __future__ import annotations

import json
import math
import sys
from argparse import ArgumentTypeError, Namespace
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from dppo.command_line import Parser, command
from dppo.comparison_text import head_to_head_text, ranking_table, table
from dppo.errors import UserError
from dppo.evaluation.comparison import METRICS, Configuration, compare_runs, configurations, sft_value, standings
from dppo.evaluation.head_to_head import head_to_head
from dppo.evaluation.runs import Broken, Run, is_run, read_runs
from dppo.terminal import columns, harmless, print_anything

_BOOTSTRAP_SEED = 0


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for a user's error."""
    arguments = _parser().parse_args(argv)
    print_anything()
    paths: list[Path] = arguments.paths
    table_asked = arguments.ranking or arguments.metric is not None or arguments.baseline is not None
    runs, broken = read_runs(paths)
    if len(paths) == 2 and not table_asked and all(map(is_run, paths)):
        lines, content = _two(paths, runs, broken, arguments)
    else:
        lines, content = _many(paths, runs, broken, arguments)
    print("\n".join(lines))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(_plain(content), indent=2), encoding="utf-8")
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m dppo.compare", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="run directories, or folders with runs anywhere below")
    parser.add_argument("--ranking", action="store_true", help="win matrix and Bradley-Terry ratings, SFT among them")
    parser.add_argument(
        "--metric", choices=METRICS, help="; ".join(f"{k}: {v}" for k, v in METRICS.items()) + " (default: win_rate)"
    )
    parser.add_argument("--baseline", help="a word of its label, such as loss=dpo (default: the oldest configuration)")
    parser.add_argument("--samples", type=_at_least(0), default=2, help="of two runs: answers shown for each side")
    parser.add_argument("--n-bootstrap", type=_at_least(100), default=10_000, help="resamples of prompts and seeds")
    parser.add_argument("--json", type=Path, help="write the numbers to this file too")
    return parser


def _at_least(least: int) -> Callable[[str], int]:
    def number(word: str) -> int:
        if not word.isdecimal() or int(word) < least:
            raise ArgumentTypeError(f"{word}: must be a whole number, at least {least}")
        return int(word)

    return number


def _two(
    paths: Sequence[Path], runs: Sequence[Run], broken: Sequence[Broken], arguments: Namespace
) -> tuple[list[str], dict[str, Any]]:
    """Two run directories head to head."""
    for one in broken:
        raise UserError(f"{one.path}: is not a run that can be read ({one.why}); mend it, or give another")
    places = {run.path.resolve(): run for run in runs}
    if paths[0].resolve() == paths[1].resolve():
        raise UserError(f"{paths[0]} {paths[1]}: are one and the same run; give two")
    first, second = (places[path.resolve()] for path in paths)
    found = head_to_head(
        first, second, n_samples=arguments.samples, n_bootstrap=arguments.n_bootstrap, seed=_BOOTSTRAP_SEED
    )
    names = {
        name: {"path": str(run.path), "words": list(run.words), "seed": run.seed, "ending": run.ending}
        for name, run in (("A", first), ("B", second))
    }
    return head_to_head_text(first, second, found, columns()), {**names, **asdict(found)}


def _many(
    paths: Sequence[Path], runs: Sequence[Run], broken: Sequence[Broken], arguments: Namespace
) -> tuple[list[str], dict[str, Any]]:
    """A table or a ranking of configurations, below a line for every run that is left out."""
    left_out = [f"left out: {harmless(str(one.path))}: {harmless(one.why)}" for one in broken]
    left_out += [f"left out: {harmless(str(run.path))}: {harmless(run.ending)}" for run in runs if not run.finished]
    finished = [run for run in runs if run.finished]
    if not finished:
        told = f" ({len(left_out)} left out; {left_out[0]})" if left_out else ""
        raise UserError(f"{' '.join(map(str, paths))}: no finished run (result.json) in there{told}")
    lines = [*left_out, ""] if left_out else []
    found = configurations(finished)
    if arguments.ranking:
        text, content = _ranked(found, arguments)
    else:
        metric = arguments.metric or "win_rate"
        compared = compare_runs(
            found,
            metric=metric,
            baseline=arguments.baseline,
            n_bootstrap=arguments.n_bootstrap,
            seed=_BOOTSTRAP_SEED,
        )
        text = table(compared, metric, sft_value(found, metric))
        content = {"metric": metric, "lines": [asdict(line) for line in compared]}
    return [*lines, *text], {**content, "left_out": left_out}


def _ranked(found: Sequence[Configuration], arguments: Namespace) -> tuple[list[str], dict[str, Any]]:
    if arguments.metric not in (None, "win_rate"):
        raise UserError(
            f"--metric {arguments.metric}: a ranking is by rewards, answer against answer; drop one of both"
        )
    ranked = standings(found, baseline=arguments.baseline, n_bootstrap=arguments.n_bootstrap, seed=_BOOTSTRAP_SEED)
    content = {"labels": ranked.labels, "n_prompts": ranked.n_prompts, "diverged": ranked.diverged}
    return ranking_table(ranked, columns()), {**content, "sft": ranked.sft, "ranking": vars(ranked.ranking)}


def _plain(value: object) -> object:
    """What JSON can hold: arrays as lists, and null for numbers that are not finite."""
    if isinstance(value, np.ndarray):
        return _plain(value.tolist())
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    sys.exit(main())
