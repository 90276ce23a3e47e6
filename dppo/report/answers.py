"""Answers side by side: for the most telling prompts what the SFT model and several configurations said."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from dppo.evaluation.runs import sample_rows
from dppo.report.evidence import SFT, Entry, Group
from dppo.report.text import cut, visible

_MOST_MODELS, _MOST_PROMPTS = 10, 160
_EACH_WAY, _AT_RANDOM = 12, 40
_LONGEST = 4000  # characters of an answer
_MOST_BYTES = 3_000_000


@dataclass(frozen=True)
class Answers:
    """``prompts`` hold the prompt and, by model, (answer, reward), or None where a model has none."""

    models: tuple[str, ...]
    prompts: tuple[dict[str, Any], ...]
    n_prompts: int  # of which these are some

    def note(self) -> str:
        if not self.prompts:
            return "No run of this report has answers."
        return (
            f"{len(self.prompts):,} of {self.n_prompts:,} prompts: the biggest wins and losses against SFT and between "
            f"configurations, and {min(_AT_RANDOM, self.n_prompts)} at random. Each configuration answers with its "
            "first seed; all answers are in samples.jsonl of the runs."
        )


def choose(group: Group) -> Answers:
    """The best, the baseline, then the others from the best to the worst."""
    entries = list(dict.fromkeys([group.best, group.baseline, *group.entries]))
    entries = [entry for entry in entries if entry.measured and not entry.is_sft][:_MOST_MODELS]
    rows = [_rows(entry) for entry in entries]
    kept = [(entry, found) for entry, found in zip(entries, rows, strict=True) if found]
    if not kept:
        return Answers((SFT,), (), 0)
    models = (SFT, *(visible(entry.label) for entry, _ in kept))
    texts = [found for _, found in kept]
    rewards = np.array(
        [
            [found[prompt]["reference_reward"] for prompt in group.prompts] if place < 0 else
            [texts[place][prompt]["policy_reward"] for prompt in group.prompts]
            for place, found in [(-1, texts[0]), *enumerate(texts)]
        ]
    )  # fmt: skip
    prompts = []
    size = 0
    for at in _telling(rewards):
        prompt = group.prompts[at]
        first = texts[0][prompt]
        answers = [
            [_shown(first["reference_answer"]), first["reference_reward"]],
            *([_shown(found[prompt]["policy_answer"]), found[prompt]["policy_reward"]] for found in texts),
        ]
        row = {"prompt": _shown(first["prompt"]), "answers": answers}
        size += len(json.dumps(row))
        if size > _MOST_BYTES:
            break
        prompts.append(row)
    return Answers(models, tuple(prompts), len(group.prompts))


def _rows(entry: Entry) -> dict[str, dict[str, Any]]:
    seed = next(iter(entry.measured))
    return sample_rows(entry.configuration.runs[seed])


def _shown(text: str) -> str:
    return visible(cut(text, _LONGEST))


def _telling(rewards: Any) -> Sequence[int]:
    """Places of prompts: where (M, P) rewards of the first models differ most, and some at random, the former first."""
    n = rewards.shape[1]
    found: dict[int, None] = {}
    pairs = [(0, other) for other in range(1, len(rewards))]
    pairs += [(1, other) for other in range(2, min(len(rewards), 4))]
    for one, other in pairs:
        order = np.argsort(rewards[other] - rewards[one], kind="stable")
        found |= dict.fromkeys(int(at) for at in (*order[::-1][:_EACH_WAY], *order[:_EACH_WAY]))
    random = [int(at) for at in np.random.default_rng(0).permutation(n) if int(at) not in found]
    return [*list(found)[: _MOST_PROMPTS - _AT_RANDOM], *random[:_AT_RANDOM]]
