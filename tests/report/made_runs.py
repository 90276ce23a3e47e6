"""Run directories with chosen numbers, in the schema of ``dppo/results.py``, and what a report gathers from them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from dppo.evaluation.runs import read_runs
from dppo.evaluation.win_rates import crossed_mean, win_rate
from dppo.report.evidence import Evidence, gather

DPO = {"_target_": "dppo.losses.pairwise.DPO", "beta": 0.1}
QUADRATIC = {"_target_": "dppo.losses.penalties.Quadratic"}
Row = Mapping[str, Any]


def unll(alpha: float) -> dict[str, Any]:
    """The settings of a penalised loss."""
    return {"_target_": "dppo.losses.penalised.UnLL", "alpha": alpha, "base": DPO, "penalty": QUADRATIC}


def make_run(
    path: Path,
    *words: str,
    seed: int = 0,
    loss: Mapping[str, Any] | None = DPO,
    phases: Mapping[str, Any] | None = None,
    settings: Mapping[str, Any] | None = None,
    policy: Sequence[float] = (1.0, 0.0, -1.0),
    reference: Sequence[float] | None = None,
    kl: tuple[float, float] = (0.1, 1.0),
    pairs: Sequence[Row] = (),
    metrics: Sequence[Row] | None = (),
    stages: Sequence[tuple[str, str, float, bool]] = (),
    status: str = "complete",
    split: str = "test",
) -> Path:
    """A finished run; ``loss=None`` without ``phases`` is SFT against itself.

    ``policy`` and ``reference`` (zeros by default) are rewards by prompt, ``kl`` nats per token and per answer,
    ``pairs`` and ``metrics`` rows of those files (``metrics=None``: no such file), ``stages`` name, fingerprint,
    seconds and whether it was reused. Prompts are called p0, p1 and so on.
    """
    path.mkdir(parents=True)
    other = [0.0] * len(policy) if reference is None else list(reference)
    config = {
        "seed": seed,
        "phases": dict(phases or {}),
        "dataset": {"_target_": "dppo.data.instructions.Instructions", "seed": 0},
        "reward": {"_target_": "dppo.rewards.verifiable.Verifiable"},
        "evaluation": {"split": split, "n_prompts": len(policy)},
        **({} if loss is None else {"loss": dict(loss)}),
        **(settings or {}),
    }
    (path / "config.yaml").write_text(yaml.safe_dump(config, sort_keys=False))
    command = " ".join(["python", "-m", "dppo", *words, f"seed={seed}"])
    (path / "command.txt").write_text(command + "\n")
    result: dict[str, Any] = {"schema": 1, "command": command, "status": status}
    if status == "complete":
        result |= _complete(policy, other, kl, pairs, split)
    else:
        result |= {"objective": 0.0, "win_rate": {"value": 0.0}}
    seconds = sum(found[2] for found in stages)
    timings = [
        {"stage": name, "fingerprint": fingerprint, "seconds": taken, "reused": reused, "rows": None}
        for name, fingerprint, taken, reused in stages
    ]
    result["timings"] = {"stages": timings, "total_seconds": seconds}
    (path / "result.json").write_text(json.dumps(result, indent=2))
    if metrics is not None:
        _rows(path / "metrics.jsonl", metrics)
    if status == "complete":
        samples = [
            {
                "prompt_id": f"p{n}", "prompt": f"Write {n}.", "reference_answer": "No.", "policy_answer": "Yes.",
                "reference_reward": theirs, "policy_reward": own,
                "outcome": "win" if own > theirs else "tie" if own == theirs else "loss",
            }
            for n, (own, theirs) in enumerate(zip(policy, other, strict=True))
        ]  # fmt: skip
        _rows(path / "samples.jsonl", samples)
        _rows(path / "pairs.jsonl", pairs)
    return path


def pair_row(name: str, policy: Sequence[float], reference: Sequence[float]) -> dict[str, Any]:
    """A held-out pair that differs from its first token on; token log-probs of the chosen answer, nats."""
    return {
        "example_id": name,
        "edit": 0,
        "chosen": sum(policy),
        "rejected": sum(policy) - 1.0,
        "reference_chosen": sum(reference),
        "reference_rejected": sum(reference) - 0.5,
        "after_edit": float(np.mean(policy[1:])) if len(policy) > 1 else None,
        "reference_after_edit": float(np.mean(reference[1:])) if len(reference) > 1 else None,
        "by_distance": list(policy),
        "reference_by_distance": list(reference),
    }


def eval_row(
    step: int,
    *changes: float,
    start: Sequence[float] = (-10.0, -12.0, -8.0),
    accuracy: float = 0.5,
    phase: str = "main",
) -> dict[str, Any]:
    """Held-out likelihoods after ``step``: ``changes`` of chosen, rejected and generated since the phase began.

    The first row of a phase has none. ``start`` are the log-probs then, nats an answer of ten tokens.
    """
    row: dict[str, Any] = {"phase": phase, "step": step, "eval/loss": 0.7, "eval/accuracy": accuracy}
    for place, role in enumerate(("chosen", "rejected", "generated")[: len(start)]):
        now = start[place] + (changes[place] if changes else 0.0)
        row |= {f"eval/logps/{role}": now, f"eval/logps/{role}_per_token": now / 10}
        if changes:
            row[f"eval/logps_change/{role}"] = changes[place]
            row[f"eval/logps_change/{role}_per_token"] = changes[place] / 10
    return row


def gathered(*paths: Path, metric: str = "win_rate", baseline: str | None = None) -> Evidence:
    """What a report knows of these runs, or of those in these folders."""
    runs, broken = read_runs(paths)
    return gather(runs, broken, paths[0], metric=metric, baseline=baseline, n_bootstrap=200)


def _complete(
    policy: Sequence[float], reference: Sequence[float], kl: tuple[float, float], pairs: Sequence[Row], split: str
) -> dict[str, Any]:
    own, other = np.array(policy, dtype=float), np.array(reference, dtype=float)
    finite = bool(np.isfinite(own).all() and np.isfinite(other).all())
    rate = win_rate(list(own), list(other), n_bootstrap=50, seed=0) if finite else None
    value = None if rate is None else rate.value
    result: dict[str, Any] = {
        "split": split,
        "objective": value,
        "win_rate": {
            "value": value,
            "ci_low": None if rate is None else rate.ci_low,
            "ci_high": None if rate is None else rate.ci_high,
            "n": len(own),
        },
        "reward": {
            **{name: _mean(values) for name, values in (("policy", own), ("reference", other), ("delta", own - other))},
            "negative_share": {"policy": float((own < 0).mean()), "reference": float((other < 0).mean())},
        },
        "length": {
            who: {"tokens": 10.0, "characters": 40.0, "end_of_turn_rate": 1.0} for who in ("policy", "reference")
        },
        "n_prompts": len(own),
        "kl": {"nats_per_token": kl[0], "nats_per_answer": kl[1], "n_answers": len(own), "n_tokens": 10 * len(own)},
    }
    if pairs:
        result["held_out"] = {"n_pairs": len(pairs)}
        result["after_edit"] = {"n_pairs": sum(row["after_edit"] is not None for row in pairs)}
    return result


def _mean(values: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float]:
    if not np.isfinite(values).all():
        return {}
    found = crossed_mean(values[None], n_bootstrap=200, seed=0)
    return {"value": found.value, "ci_low": found.low, "ci_high": found.high}


def _rows(path: Path, rows: Sequence[Row]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
