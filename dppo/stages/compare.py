"""The comparison of two models' answers: win rate, rewards and lengths, with intervals."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from dppo.artifacts import Build, Slot
from dppo.config import EvaluationSettings
from dppo.data.ids import content_hash
from dppo.evaluation.win_rates import compared_rewards, win_rate
from dppo.stages.workbench import WORK
from dppo.types import Artifact, Generation, Prompt

if TYPE_CHECKING:
    from dppo.stages.workbench import Workbench

VERSION = 1


def compare_slot(
    bench: Workbench, prompts: Sequence[Prompt], parents: Sequence[str], settings: EvaluationSettings
) -> Slot:
    """The place of a comparison; ``parents``: the policy's answers, the reference's answers and the scores."""
    return bench.cache.artifact(
        "compare",
        {
            "version": VERSION,
            "prompts": content_hash([prompt.prompt_id for prompt in prompts]),
            "n_bootstrap": settings.n_bootstrap,
            "bootstrap_seed": settings.bootstrap_seed,
        },
        parents=parents,
    )


def compare(
    bench: Workbench,
    prompts: Sequence[Prompt],
    policy: tuple[Artifact, Mapping[str, Generation], Sequence[float]],
    reference: tuple[Artifact, Mapping[str, Generation], Sequence[float]],
    scored: Artifact,
    settings: EvaluationSettings,
) -> tuple[Artifact, dict[str, Any]]:
    """Win rate, reward and length of both models; each model is (its answers' artifact, answers, rewards)."""
    parents = [policy[0].fingerprint, reference[0].fingerprint, scored.fingerprint]
    slot = compare_slot(bench, prompts, parents, settings)

    def build(started: Build) -> None:
        intervals = {"n_bootstrap": settings.n_bootstrap, "seed": settings.bootstrap_seed}
        result = {
            "win_rate": asdict(win_rate(policy[2], reference[2], **intervals)),
            "reward": compared_rewards(policy[2], reference[2], **intervals),
            "length": {"policy": _lengths(prompts, policy[1]), "reference": _lengths(prompts, reference[1])},
            "n_prompts": len(prompts),
        }
        if bench.is_main:
            (started.directory / "comparison.json").write_text(json.dumps(result))
            started.extra[WORK] = len(prompts)

    artifact = bench.artifact("compare", slot, f"{len(prompts)} prompts", build)
    result: dict[str, Any] = json.loads((Path(artifact.path) / "comparison.json").read_text())
    return artifact, result


def _lengths(prompts: Sequence[Prompt], answers: Mapping[str, Generation]) -> dict[str, float]:
    """Mean lengths, and the share of answers that ended with the end-of-turn token."""
    own = [answers[prompt.prompt_id] for prompt in prompts]
    return {
        "tokens": float(np.mean([len(answer.token_ids) for answer in own])),
        "characters": float(np.mean([len(answer.text) for answer in own])),
        "end_of_turn_rate": float(np.mean([answer.stopped_by == "eos" for answer in own])),
    }
