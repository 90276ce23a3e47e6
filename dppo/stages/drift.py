"""How far the policy moved: exact KL to the reference on its own answers, and likelihoods of held-out pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dppo.artifacts import Build, Slot
from dppo.batches import collate, micro_batches
from dppo.config import TrainSettings
from dppo.data.ids import content_hash
from dppo.evaluation.drift import exact_kl
from dppo.evaluation.edits import PairRow, pair_rows
from dppo.evaluation.win_rates import crossed_mean
from dppo.logps import ResponseScorer
from dppo.loop import likelihoods
from dppo.stages.training import autocast, saved_policy, scorer_like
from dppo.stages.workbench import WORK
from dppo.types import Artifact, EncodedExample, Json

if TYPE_CHECKING:
    from dppo.stages.workbench import Workbench

VERSION = 2
PAIRS = "pairs.jsonl"
_RESAMPLES = 10_000


def drift_slot(
    bench: Workbench,
    policy: str,
    reference: str,
    answers: Sequence[str],
    pairs: Sequence[EncodedExample],
    settings: TrainSettings,
    *,
    own_distribution: bool,
) -> Slot:
    """The place of the drift between two models, given by their fingerprints; ``answers`` are ids of examples."""
    return bench.cache.artifact(
        "drift",
        {
            "version": VERSION,
            "answers": content_hash(sorted(answers)),
            "pairs": content_hash(sorted(example.example_id for example in pairs)),
            "numerics": bench.training_numerics(settings),
            **({"own_distribution": True} if own_distribution else {}),
        },
        parents=[policy, reference],
    )


def n_responses(answers: int, pairs: Sequence[EncodedExample]) -> int:
    """How many responses both models score."""
    return answers + sum(len(pair.responses) for pair in pairs)


def drift(
    bench: Workbench,
    policy: Artifact,
    reference: Artifact,
    answers: Sequence[EncodedExample],
    pairs: Sequence[EncodedExample],
    settings: TrainSettings,
    *,
    own_distribution: bool,
) -> tuple[Artifact, dict[str, Any], list[dict[str, Json]]]:
    """``{"kl": {...}, "held_out": {...}}`` of a policy, and the rows of its pairs (``edits.PairRow``).

    ``answers`` have one response each, ``pairs`` two. With ``own_distribution``, answers drawn from the policy as it
    is, ``kl`` also has ``monte_carlo``: the mean log-ratio of an answer, which estimates the same, with its interval.
    """
    ids = [example.example_id for example in answers]
    slot = drift_slot(
        bench, policy.fingerprint, reference.fingerprint, ids, pairs, settings, own_distribution=own_distribution
    )

    def build(started: Build) -> None:
        own = scorer_like(bench, saved_policy(bench, policy), settings)
        other = scorer_like(bench, saved_policy(bench, reference), settings)
        with autocast(bench, settings.precision):
            kl = exact_kl(own, other, answers, settings.tokens_per_micro_batch)
            means, rows = _held_out(own, other, pairs, settings.tokens_per_micro_batch)
        told = asdict(kl)
        ratios = np.array([told.pop("log_ratios")])
        if own_distribution:
            found = crossed_mean(ratios, n_bootstrap=_RESAMPLES, seed=0)
            told["monte_carlo"] = {"value": found.value, "ci_low": found.low, "ci_high": found.high}
        if bench.is_main:
            (started.directory / "drift.json").write_text(json.dumps({"kl": told, "held_out": means}))
            lines = (json.dumps(row.to_json()) + "\n" for row in sorted(rows, key=lambda row: row.example_id))
            (started.directory / PAIRS).write_text("".join(lines))
            started.extra[WORK] = n_responses(len(answers), pairs)

    artifact = bench.artifact("drift", slot, f"KL on {len(answers)} answers, {len(pairs)} held-out pairs", build)
    found: dict[str, Any] = json.loads((Path(artifact.path) / "drift.json").read_text())
    rows = [json.loads(line) for line in (Path(artifact.path) / PAIRS).read_text().splitlines()]
    return artifact, found, rows


@torch.inference_mode()
def _held_out(
    policy: ResponseScorer, reference: ResponseScorer, pairs: Sequence[EncodedExample], budget: int
) -> tuple[dict[str, float | int], list[PairRow]]:
    """Means over held-out pairs of log-probs (nats), log-ratios and ranking accuracies, and a row for each pair."""
    columns: dict[str, list[torch.Tensor]] = {}
    rows: list[PairRow] = []
    device = next(policy.parameters()).device
    for part in micro_batches(pairs, budget):
        batch = collate(part).to(device)
        own, other = policy(batch), reference(batch)
        rows += pair_rows(part, own, other)
        for name, values in likelihoods(own, other).items():
            columns.setdefault(name, []).append(values.double().cpu())
    means = {name: float(torch.cat(values).nanmean()) for name, values in columns.items()}
    return {"n_pairs": len(pairs), **means}, rows
