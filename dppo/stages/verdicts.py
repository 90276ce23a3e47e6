"""Verdicts of a reward that compares two answers, once per prompt and pair of texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, cast

from dppo.data.ids import content_hash
from dppo.progress import Progress
from dppo.stages.workbench import Keep, Workbench
from dppo.types import Artifact, Json, Prompt

if TYPE_CHECKING:
    from dppo.artifacts import Store
    from dppo.rewards import PairwiseReward

VERSION = 1
_PAIRS_PER_CALL = 64

Contest = tuple[Prompt, str, str]
"""A prompt and two different answers to it."""


def verdicts_store(bench: Workbench, reward: PairwiseReward) -> Store[Json]:
    """Where the verdicts of this kind lie, by ``verdict_key``."""
    return bench.cache.json_store("verdicts", {"version": VERSION, "reward": reward.identity()})


def verdict_key(prompt: Prompt, first: str, second: str) -> str:
    """The key of the verdict on two answers to one prompt."""
    return content_hash([prompt.prompt_id, [list(check) for check in prompt.checks], first, second])


def verdicts(bench: Workbench, reward: PairwiseReward, contests: Sequence[Contest]) -> tuple[Artifact, list[float]]:
    """For each contest 1 if the first answer is better, 0 if the second is, 1/2 for a tie."""
    store = verdicts_store(bench, reward)
    asked = {verdict_key(*contest): contest for contest in contests}

    def compute(missing: list[str], keep: Keep[Json]) -> None:
        with Progress("verdicts", len(missing), "pair") as progress:
            for at in range(0, len(missing), _PAIRS_PER_CALL):
                part = missing[at : at + _PAIRS_PER_CALL]
                prompts, first, second = zip(*(asked[key] for key in part), strict=True)
                keep(dict(zip(part, reward.compare(prompts, first, second), strict=True)))
                progress.advance(len(part))

    detail = f"{type(reward).__name__}, {len(asked)} pairs of answers"
    artifact = bench.fill("verdicts", store, list(asked), detail, "to compare", compute, rows_per_shard=_PAIRS_PER_CALL)
    found = store.get([verdict_key(*contest) for contest in contests])
    return artifact, [float(cast("float", verdict)) for verdict in found]
