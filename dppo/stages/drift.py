"""How far the policy moved: exact KL to the reference on its own answers, and likelihoods of held-out pairs."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from dppo.artifacts import Build
from dppo.batches import collate, micro_batches
from dppo.config import TrainSettings
from dppo.data.ids import content_hash
from dppo.evaluation.drift import exact_kl
from dppo.logps import ResponseScorer
from dppo.loop import likelihoods
from dppo.stages.training import autocast, saved_policy
from dppo.types import Artifact, EncodedExample

if TYPE_CHECKING:
    from dppo.stages.workbench import Workbench

VERSION = 1


def drift(
    bench: Workbench,
    policy: Artifact,
    reference: Artifact,
    answers: Sequence[EncodedExample],
    pairs: Sequence[EncodedExample],
    settings: TrainSettings,
) -> tuple[Artifact, dict[str, Any]]:
    """``{"kl": {...}, "held_out": {...}}`` of a policy; ``answers`` have one response each, ``pairs`` two."""
    slot = bench.cache.artifact(
        "drift",
        {
            "version": VERSION,
            "answers": content_hash(sorted(example.example_id for example in answers)),
            "pairs": content_hash(sorted(example.example_id for example in pairs)),
            "numerics": bench.numerics(settings.precision, settings.packing),
        },
        parents=[policy.fingerprint, reference.fingerprint],
    )

    def build(started: Build) -> None:
        own = ResponseScorer(saved_policy(bench, policy), settings.packing)
        other = ResponseScorer(saved_policy(bench, reference), settings.packing)
        with autocast(bench, settings.precision):
            kl = exact_kl(own, other, answers, settings.tokens_per_micro_batch)
            found = {"kl": asdict(kl), "held_out": _held_out(own, other, pairs, settings.tokens_per_micro_batch)}
        if bench.is_main:
            (started.directory / "drift.json").write_text(json.dumps(found))

    artifact = bench.artifact("drift", slot, f"KL on {len(answers)} answers, {len(pairs)} held-out pairs", build)
    found: dict[str, Any] = json.loads((Path(artifact.path) / "drift.json").read_text())
    return artifact, found


@torch.inference_mode()
def _held_out(
    policy: ResponseScorer, reference: ResponseScorer, pairs: Sequence[EncodedExample], budget: int
) -> dict[str, float | int]:
    """Means over held-out pairs of log-probs (nats), log-ratios and ranking accuracies."""
    columns: dict[str, list[torch.Tensor]] = {}
    device = next(policy.parameters()).device
    for part in micro_batches(pairs, budget):
        batch = collate(part).to(device)
        for name, values in likelihoods(policy(batch), reference(batch)).items():
            columns.setdefault(name, []).append(values.float().cpu())
    means = {name: float(torch.cat(values).nanmean()) for name, values in columns.items()}
    return {"n_pairs": len(pairs), **means}
