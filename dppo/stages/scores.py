"""Rewards of answers, once per prompt and text; shared by all models and runs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, cast

from dppo.data.ids import content_hash
from dppo.progress import Progress
from dppo.types import Artifact, Generation, Json, Prompt

if TYPE_CHECKING:
    from dppo.artifacts import Store
    from dppo.rewards import Reward
    from dppo.stages.workbench import Workbench

VERSION = 1
_ANSWERS_PER_CALL = 256


def scores(
    bench: Workbench, reward: Reward, prompts: Sequence[Prompt], models: Sequence[Mapping[str, Generation]]
) -> tuple[Artifact, list[list[float]]]:
    """For each model, the rewards of its answers to ``prompts``, in their order; equal texts are scored once."""
    store: Store[Json] = bench.cache.json_store("scores", {"version": VERSION, "reward": reward.identity()})
    keys = [[_key(prompt, answers[prompt.prompt_id].text) for prompt in prompts] for answers in models]
    texts = {
        key: (prompt, answers[prompt.prompt_id].text)
        for answers, own in zip(models, keys, strict=True)
        for key, prompt in zip(own, prompts, strict=True)
    }
    missing: list[str] = []
    with bench.alone() as main:
        if main:
            missing = store.missing(texts)
            detail = f"{type(reward).__name__}, {len(texts)} answers" + (
                f", {len(missing)} to score" if missing else ""
            )
            with bench.working("scores", store, reuse=not missing, detail=detail):
                if missing:
                    with store.lock(bench.say):
                        _fill(store, reward, {key: texts[key] for key in store.missing(texts)})
    found = [[float(cast("float", score)) for score in store.get(own)] for own in keys]
    return store.artifact(reused=not missing), found


def _key(prompt: Prompt, text: str) -> str:
    return content_hash([prompt.prompt_id, [list(check) for check in prompt.checks], text])


def _fill(store: Store[Json], reward: Reward, todo: Mapping[str, tuple[Prompt, str]]) -> None:
    keys = list(todo)
    with Progress("scores", len(keys), "answer") as progress:
        for at in range(0, len(keys), _ANSWERS_PER_CALL):
            part = keys[at : at + _ANSWERS_PER_CALL]
            found = reward.score([todo[key][0] for key in part], [todo[key][1] for key in part])
            store.append(dict(zip(part, found, strict=True)))
            progress.advance(len(part))
