"""Rewards of answers, once per prompt and text; shared by all models and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from dppo.data.ids import content_hash
from dppo.progress import Progress
from dppo.stages.workbench import Keep, Workbench
from dppo.types import Artifact, Generation, Json, Prompt

if TYPE_CHECKING:
    from dppo.artifacts import Store
    from dppo.rewards import Reward

VERSION = 1
_ANSWERS_PER_CALL = 256


def scores_store(bench: Workbench, reward: Reward) -> Store[Json]:
    """Where the rewards of this kind lie, by ``score_key``."""
    return bench.cache.json_store("scores", {"version": VERSION, "reward": reward.identity()})


def score_key(prompt: Prompt, text: str) -> str:
    """The key of the reward of one answer to one prompt."""
    return content_hash([prompt.prompt_id, [list(check) for check in prompt.checks], text])


def scores(
    bench: Workbench, reward: Reward, prompts: Sequence[Prompt], models: Sequence[Mapping[str, Generation]]
) -> tuple[Artifact, list[list[float]]]:
    """For each model, the rewards of its answers to ``prompts``, in their order; equal texts are scored once."""
    store = scores_store(bench, reward)
    keys = [[score_key(prompt, answers[prompt.prompt_id].text) for prompt in prompts] for answers in models]
    texts = {
        key: (prompt, answers[prompt.prompt_id].text)
        for answers, own in zip(models, keys, strict=True)
        for key, prompt in zip(own, prompts, strict=True)
    }

    def compute(missing: list[str], keep: Keep[Json]) -> None:
        with Progress("scores", len(missing), "answer") as progress:
            for at in range(0, len(missing), _ANSWERS_PER_CALL):
                part = missing[at : at + _ANSWERS_PER_CALL]
                found = reward.score([texts[key][0] for key in part], [texts[key][1] for key in part])
                keep(dict(zip(part, found, strict=True)))
                progress.advance(len(part))

    detail = f"{type(reward).__name__}, {len(texts)} answers"
    artifact = bench.fill("scores", store, list(texts), detail, "to score", compute, rows_per_shard=_ANSWERS_PER_CALL)
    return artifact, [[float(cast("float", score)) for score in store.get(own)] for own in keys]
