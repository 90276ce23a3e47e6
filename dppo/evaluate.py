"""``python -m dppo.evaluate``: who wins how often, with intervals, from files of any origin or from a finished run.

Judged pairs come in AlpacaEval's annotation columns; answers with scores in one file for both models, or in one each.
"""

from __future__ import annotations

import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dppo.artifacts.files import write_atomic
from dppo.command_line import Parser, command
from dppo.data.tables import FORMATS, MissingColumn, Placed, placed_rows
from dppo.errors import UserError
from dppo.evaluation.judged import (
    BOTH_ANSWERS,
    BOTH_REWARDS,
    DIFFICULTY,
    MODEL_WEIGHT,
    PAIR_COLUMNS,
    PROMPT_COLUMNS,
    WEIGHT_NAME,
    ScoredAnswers,
    joined_answers,
    judged_pairs,
    published_weights,
    scored_answers,
)
from dppo.evaluation.measured import measure_pairs, measure_scores
from dppo.evaluation.runs import complete_run, is_run, sample_rows
from dppo.terminal import harmless, print_anything

_N_BOOTSTRAP, _SEED = 10_000, 0  # of files; a run has its own


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for a user's error."""
    arguments = _parser().parse_args(argv)
    _check(arguments)
    print_anything()
    if arguments.preferences is not None:
        title, numbers = _preferences(arguments)
    elif arguments.scores is not None:
        title, numbers = _scores(arguments)
    else:
        title, numbers = _run(arguments)
    print("\n".join([harmless(title), *_table(numbers)]))
    if arguments.json is not None:
        _write(arguments.json, {"title": title, **numbers})
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m dppo.evaluate", description=__doc__)
    parser.add_argument("run", nargs="?", type=Path, help="directory of a finished run")
    files = f"a file ({', '.join(FORMATS)})"
    parser.add_argument(
        "--preferences",
        type=Path,
        metavar="FILE",
        help=f"{files} of judged pairs: preference 1 to 2, len_* or output_*",
    )
    parser.add_argument("--weights", type=Path, metavar="CSV", help="AlpacaEval's glm_weights.csv, with --preferences")
    parser.add_argument("--model", help="whose weights (default: generator_2 of the pairs)")
    parser.add_argument(
        "--scores",
        type=Path,
        metavar="FILE",
        help=f"{files} with {', '.join(BOTH_REWARDS)} of each prompt_id or prompt",
    )
    parser.add_argument(
        "--against", type=Path, metavar="FILE", help="the reference's file; both files then have a column reward"
    )
    parser.add_argument("--n-bootstrap", type=int, help=f"resamples of prompts (default: the run's, or {_N_BOOTSTRAP})")
    parser.add_argument("--seed", type=int, help=f"of the resamples (default: the run's, or {_SEED})")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file too")
    return parser


def _check(arguments: Namespace) -> None:
    """Raise UserError for arguments that don't go together, before anything is computed."""
    given = [name for name in ("run", "preferences", "scores") if getattr(arguments, name) is not None]
    if len(given) != 1:
        raise UserError(f"give one of RUN_DIRECTORY, --preferences FILE and --scores FILE, not {len(given)} of them")
    for flag, owner in (("weights", "preferences"), ("model", "weights"), ("against", "scores")):
        if getattr(arguments, flag) is not None and getattr(arguments, owner) is None:
            raise UserError(f"--{flag}: goes with --{owner}; add that, or drop --{flag}")
    if arguments.n_bootstrap is not None and arguments.n_bootstrap < 100:
        raise UserError(f"--n-bootstrap {arguments.n_bootstrap}: must be at least 100")
    if arguments.seed is not None and arguments.seed < 0:
        raise UserError(f"--seed {arguments.seed}: must be 0 or more")
    if arguments.json is not None and (arguments.json.is_dir() or not arguments.json.absolute().parent.is_dir()):
        raise UserError(f"--json {arguments.json}: must be a file in a folder that exists; make the folder first")


def _resamples(arguments: Namespace, own: Mapping[str, Any]) -> dict[str, int]:
    """Number and seed of the resamples: as typed, else as in the settings of the run, else the defaults."""
    n, seed = own.get("n_bootstrap", _N_BOOTSTRAP), own.get("bootstrap_seed", _SEED)
    return {
        "n_bootstrap": n if arguments.n_bootstrap is None else arguments.n_bootstrap,
        "seed": seed if arguments.seed is None else arguments.seed,
    }


def _preferences(arguments: Namespace) -> tuple[str, dict[str, Any]]:
    weighted = arguments.weights is not None
    needed = ("preference", DIFFICULTY) if weighted else ("preference",)
    pairs = judged_pairs(placed_rows([arguments.preferences], needed, PAIR_COLUMNS), with_difficulty=weighted)
    weights = None
    if weighted:
        model = arguments.model or pairs.model
        if model is None:
            raise UserError(f"{arguments.preferences}: doesn't name the model (generator_2); add --model NAME")
        weights = published_weights(placed_rows([arguments.weights], (DIFFICULTY, MODEL_WEIGHT), (WEIGHT_NAME,)), model)
    numbers = measure_pairs(pairs, weights=weights, **_resamples(arguments, {}))
    return f"{pairs.model or 'output_2'} against {pairs.reference or 'output_1'}", numbers


def _scores(arguments: Namespace) -> tuple[str, dict[str, Any]]:
    policy, reference = arguments.scores, arguments.against
    if reference is None:
        try:
            rows = _scored_rows(policy, BOTH_REWARDS, BOTH_ANSWERS)
        except MissingColumn as error:
            raise UserError(f"{error}; if it is of one model, add --against FILE of the other") from None
        title, scored = f"policy against reference in {policy}", scored_answers(rows)
    else:
        both = [_scored_rows(file, ("reward",), ("answer",)) for file in (policy, reference)]
        title, scored = f"{policy} against {reference}", joined_answers(*both)
    return title, measure_scores(scored, **_resamples(arguments, {}))


def _scored_rows(file: Path, rewards: Sequence[str], answers: Sequence[str]) -> list[Placed]:
    return list(placed_rows([file], rewards, (*PROMPT_COLUMNS, *answers)))


def _run(arguments: Namespace) -> tuple[str, dict[str, Any]]:
    path: Path = arguments.run
    if not path.is_dir() or not is_run(path):
        raise UserError(f"{path}: is not the directory of a run; files go with --preferences or --scores")
    run = complete_run(path, "answers to evaluate")
    rows = sample_rows(run).values()
    scored = ScoredAnswers(
        tuple(own for own, _ in run.rewards.values()),
        tuple(other for _, other in run.rewards.values()),
        (tuple(row["policy_answer"] for row in rows), tuple(row["reference_answer"] for row in rows)),
    )
    own = run.settings.get("evaluation")
    numbers = measure_scores(scored, **_resamples(arguments, own if isinstance(own, Mapping) else {}))
    return f"policy against SFT in {path}", numbers


def _table(numbers: Mapping[str, Any]) -> list[str]:
    """The numbers as lines of text."""
    rate = numbers["win_rate"]
    left_out = _left_out(numbers)
    rows = [
        ("prompts", f"{numbers['n']}{f' ({left_out})' if left_out else ''}"),
        ("wins / ties / losses", f"{rate['wins']} / {rate['ties']} / {numbers['losses']}"),
        ("win rate (mean preference)" if numbers["soft"] else "win rate (ties 1/2)", _interval(rate)),
        ("win rate (strict)", _interval(rate, names=("strict", "strict_ci_low", "strict_ci_high"))),
    ]
    if controlled := numbers["length_controlled"]:
        rows.append(("win rate (length-controlled)", _interval(controlled)))
        if controlled["warning"]:
            rows.append(("", f"warning: {controlled['warning']}"))
    if reward := numbers["reward"]:
        share = reward["negative_share"]
        rows += [
            ("reward", _interval(reward["policy"])),
            ("reward of the reference", _interval(reward["reference"])),
            ("reward gain", _interval(reward["delta"], sign="+")),
            ("negative rewards", f"{share['policy']:.1%} (reference {share['reference']:.1%})"),
        ]
    if length := numbers["length"]:
        own, other = (length[who]["characters"] for who in ("policy", "reference"))
        rows.append(("answer characters", f"{own:.1f} (reference {other:.1f})"))
    if text := numbers["text"]:
        for key in text["policy"]:
            own, other = (_share(text[who][key]) for who in ("policy", "reference"))
            rows.append((key.replace("_", "-" if key[-1].isdigit() else " "), f"{own} (reference {other})"))
    lines = [f"  {name:<30}{value}" for name, value in rows]
    if published := numbers["alpaca_eval"]:
        lines.append("AlpacaEval's columns, 0 to 100")
        lines += [f"  {name:<30}{_short(value)}" for name, value in published.items() if value is not None]
    notes = ["Intervals are 95 %, over prompts: bootstrap; of the strict rate Wilson's."]
    if numbers["soft"]:
        notes.append("Preferences are soft: a win is one above 1/2; the strict rate counts wins alone.")
    if odd := numbers.get("n_same_answer_other_score"):
        notes.append(f"Answers of the same text with different scores, counted as scored: {odd}.")
    return [*lines, *notes]


def _left_out(numbers: Mapping[str, Any]) -> str:
    if dropped := numbers.get("n_dropped"):
        return f"{dropped} rows without a preference left out"
    unmatched = numbers.get("n_unmatched") or {}
    if any(unmatched.values()):
        return (
            f"left out, in one file only: {unmatched['policy']} of the model, {unmatched['reference']} of the reference"
        )
    return ""


def _interval(found: Mapping[str, float], sign: str = "", names: Sequence[str] = ("value", "ci_low", "ci_high")) -> str:
    value, low, high = (found[name] for name in names)
    return f"{value:{sign}.3f}  [{low:{sign}.3f}, {high:{sign}.3f}]"


def _share(value: float | None) -> str:
    return "-" if value is None else f"{value:.3f}"


def _short(value: float) -> str:
    return f"{value:.4f}" if isinstance(value, float) else str(value)


def _write(path: Path, content: Mapping[str, Any]) -> None:
    text = json.dumps(content, indent=2, allow_nan=False) + "\n"
    try:
        write_atomic(path, text.encode())
    except OSError as error:
        raise UserError(f"--json {path}: can't be written ({error.strerror}); choose another place") from None


if __name__ == "__main__":
    sys.exit(main())
