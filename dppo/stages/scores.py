"""Rewards of answers, and verdicts on pairs of them: once per prompt and text, shared by all models and runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, cast

from dppo.data.ids import content_hash
from dppo.progress import Progress
from dppo.rewards import GradualReward, JudgingReward, Reward, SpreadReward, Verdict
from dppo.stages.workbench import Keep, Workbench, shards
from dppo.types import Artifact, Generation, Json, Prompt

if TYPE_CHECKING:
    from dppo.artifacts import Store
    from dppo.rewards import PairwiseReward

VERSION = 1
_ANSWERS_PER_CALL = 256
# Of rewards that come one by one: what a kill can cost, besides what is under way.
_ANSWERS_PER_SHARD = 8

Contest = tuple[Prompt, str, str]
"""A prompt and two answers to it."""
Answers = Mapping[str, Generation]


def scores_store(bench: Workbench, reward: Reward | PairwiseReward) -> Store[Json]:
    """Where the rewards of this kind lie, by ``score_key`` or ``pair_key``."""
    return bench.cache.json_store("scores", {"version": VERSION, "reward": reward.identity()})


def score_key(prompt: Prompt, text: str) -> str:
    """The key of the reward of one answer to one prompt."""
    return content_hash([prompt.prompt_id, [list(check) for check in prompt.checks], text])


def pair_key(prompt: Prompt, one: str, other: str) -> str | None:
    """The key of the verdict on two answers, in whichever order they are given; None for equal ones, always a tie."""
    if one == other:
        return None
    return content_hash([prompt.prompt_id, [list(check) for check in prompt.checks], sorted((one, other))])


def scores(
    bench: Workbench, reward: Reward | PairwiseReward, prompts: Sequence[Prompt], models: Sequence[Answers]
) -> tuple[Artifact, list[list[float]]]:
    """For each model, the rewards of its answers to ``prompts``, in their order; equal texts are scored once.

    A pairwise reward compares two models: the first one's rewards are the verdicts on its answers, in [0, 1], the
    second one's what is left to 1.
    """
    if not isinstance(reward, Reward):
        artifact, own = verdicts(bench, reward, _contests(prompts, *models))
        return artifact, [own, [1 - value for value in own]]
    store = scores_store(bench, reward)
    keys = [[score_key(prompt, answers[prompt.prompt_id].text) for prompt in prompts] for answers in models]
    texts = {
        key: (prompt, answers[prompt.prompt_id].text)
        for answers, own in zip(models, keys, strict=True)
        for key, prompt in zip(own, prompts, strict=True)
    }

    alone = _asked_by_one(reward)

    def compute(missing: list[str], keep: Keep[Json]) -> None:
        mine = missing if alone else bench.share(sorted(missing, key=lambda key: (len(texts[key][1]), key)))
        if mine:
            _score(reward, {key: texts[key] for key in mine}, keep, of=len(missing))

    detail = f"{type(reward).__name__}, {len(texts)} answers"
    size = _rows_per_shard(reward)
    artifact = bench.fill("scores", store, list(texts), detail, "to score", compute, rows_per_shard=size, alone=alone)
    return artifact, [[float(cast("float", score)) for score in store.get(own)] for own in keys]


def verdicts(bench: Workbench, reward: PairwiseReward, contests: Sequence[Contest]) -> tuple[Artifact, list[float]]:
    """For each contest how far its first answer is better: 1 better, 0 worse, 1/2 a tie.

    Two answers are compared once, in whichever order they come. Raises UserError if a judge could not be read often.
    """
    store = scores_store(bench, reward)
    asked = _asked(contests)

    def compute(missing: list[str], keep: Keep[Json]) -> None:
        _compare(reward, {key: asked[key] for key in missing}, keep)

    detail = f"{type(reward).__name__}, {len(asked)} pairs"
    size = _rows_per_shard(reward)
    # A judge waits for its server, and asks for many pairs at a time.
    artifact = bench.fill("scores", store, list(asked), detail, "to compare", compute, rows_per_shard=size, alone=True)
    if isinstance(reward, JudgingReward):
        reward.accept([_verdict(row) for row in store.get(list(asked))])
    return artifact, _stored(store, contests)


def verdict_on(row: Json, first: str, second: str) -> float:
    """How far the first of two different answers is better, by the row of their ``pair_key``."""
    value = _verdict(row).value if isinstance(row, list) else float(cast("float", row))
    return value if first < second else 1 - value


def judging(
    bench: Workbench, reward: Reward | PairwiseReward, prompts: Sequence[Prompt], models: Sequence[Answers]
) -> dict[str, Json]:
    """How a judge came to what ``scores`` has given for the same models; empty for other rewards.

    ``judge``: ``n_pairs`` that it was asked about and ``n_equal`` that needed no asking; ``position_consistency``, the
    share of pairs on which both orders agree, among the ``n_read`` of which both could be read; ``first_place_share``
    of verdicts for the answer shown first among the ``n_decided`` that are no tie; ``unparsable_share`` of all replies.
    None where there is nothing to take a share of.
    """
    if not isinstance(reward, JudgingReward):
        return {}
    contests = _contests(prompts, *models)
    keys = list(_asked(contests))
    orders = [_verdict(row).orders for row in scores_store(bench, reward).get(keys)]
    read = [(first, second) for first, second in orders if first is not None and second is not None]
    decided = [value for first, second in read for value in (first, 1 - second) if value != 0.5]
    unread = sum(value is None for pair in orders for value in pair)
    return {
        "judge": {
            "n_pairs": len(keys),
            "n_equal": sum(first == second for _, first, second in contests),
            "n_read": len(read),
            "n_decided": len(decided),
            "position_consistency": _share(sum(first == second for first, second in read), len(read)),
            "first_place_share": _share(sum(value == 1 for value in decided), len(decided)),
            "unparsable_share": _share(unread, 2 * len(keys)),
        }
    }


def interim_rewards(
    bench: Workbench, reward: Reward | PairwiseReward, prompts: Sequence[Prompt], baseline: Answers
) -> tuple[str, Callable[[Answers], tuple[list[float], list[float]]]]:
    """(what the rewards are known by, a function from a model's answers to its rewards and the baseline's).

    The function may be called by one process alone. Rewards that cost nothing are computed, others are looked up.
    """
    if isinstance(reward, Reward):
        scored, (other,) = scores(bench, reward, prompts, [baseline])
        if not isinstance(reward, GradualReward):

            def compute(answers: Answers) -> tuple[list[float], list[float]]:
                return reward.score(prompts, [answers[prompt.prompt_id].text for prompt in prompts]), other

            return scored.fingerprint, compute

        def look_up(answers: Answers) -> tuple[list[float], list[float]]:
            store = scores_store(bench, reward)
            texts = [(prompt, answers[prompt.prompt_id].text) for prompt in prompts]
            keys = [score_key(prompt, text) for prompt, text in texts]
            asked = dict(zip(keys, texts, strict=True))
            with shards(store, _ANSWERS_PER_SHARD) as keep:
                missing = store.missing(keys)
                _score(reward, {key: asked[key] for key in missing}, keep, of=len(missing))
            return [float(cast("float", score)) for score in store.get(keys)], other

        return scored.fingerprint, look_up

    def judge(answers: Answers) -> tuple[list[float], list[float]]:
        store = scores_store(bench, reward)
        contests = _contests(prompts, answers, baseline)
        asked = _asked(contests)
        with shards(store, _rows_per_shard(reward)) as keep:
            _compare(reward, {key: asked[key] for key in store.missing(list(asked))}, keep)
        own = _stored(store, contests)
        return own, [1 - value for value in own]

    return scores_store(bench, reward).fingerprint, judge


def _rows_per_shard(reward: Reward | PairwiseReward) -> int:
    return _ANSWERS_PER_SHARD if isinstance(reward, (GradualReward, JudgingReward)) else _ANSWERS_PER_CALL


def _asked_by_one(reward: Reward) -> bool:
    """Whether several processes are no faster than one: scores that come from a server, or a model on all GPUs."""
    return isinstance(reward, GradualReward) or (isinstance(reward, SpreadReward) and reward.spread)


def _score(reward: Reward, asked: Mapping[str, tuple[Prompt, str]], keep: Keep[Json], *, of: int) -> None:
    """Have answers scored, by key; all processes together score ``of``."""
    keys = list(asked)
    with Progress("scores", len(keys), "answer", of=of) as progress:
        if isinstance(reward, GradualReward):
            prompts, texts = [asked[key][0] for key in keys], [asked[key][1] for key in keys]
            for place, score in reward.scores(prompts, texts):
                keep({keys[place]: score})
                progress.advance()
            return
        for at in range(0, len(keys), _ANSWERS_PER_CALL):
            part = keys[at : at + _ANSWERS_PER_CALL]
            found = reward.score([asked[key][0] for key in part], [asked[key][1] for key in part])
            keep(dict(zip(part, found, strict=True)))
            progress.advance(len(part))


def _compare(reward: PairwiseReward, asked: Mapping[str, Contest], keep: Keep[Json]) -> None:
    """Have pairs compared, by key; the rows are verdicts on the answer that comes first in the alphabet."""
    keys = list(asked)
    with Progress("scores", len(keys), "pair") as progress:
        if isinstance(reward, JudgingReward):
            prompts, first, second = ([asked[key][at] for key in keys] for at in range(3))
            verdicts = reward.verdicts(
                cast("list[Prompt]", prompts), cast("list[str]", first), cast("list[str]", second)
            )
            for place, verdict in verdicts:
                keep({keys[place]: list(verdict.orders)})
                progress.advance()
            return
        for at in range(0, len(keys), _ANSWERS_PER_CALL):
            part = [asked[key] for key in keys[at : at + _ANSWERS_PER_CALL]]
            found = reward.compare(
                [one for one, _, _ in part], [one for _, one, _ in part], [one for _, _, one in part]
            )
            keep(dict(zip(keys[at : at + _ANSWERS_PER_CALL], found, strict=True)))
            progress.advance(len(part))


def _contests(prompts: Sequence[Prompt], first: Answers, second: Answers) -> list[Contest]:
    return [(prompt, first[prompt.prompt_id].text, second[prompt.prompt_id].text) for prompt in prompts]


def _asked(contests: Sequence[Contest]) -> dict[str, Contest]:
    """The contests that need asking, each once by its key, its answers in the order of the alphabet."""
    found = {}
    for prompt, first, second in contests:
        if (key := pair_key(prompt, first, second)) is not None:
            found[key] = (prompt, min(first, second), max(first, second))
    return found


def _stored(store: Store[Json], contests: Sequence[Contest]) -> list[float]:
    """How far the first answer of each is better, by the verdicts in the store."""
    keys = [pair_key(*contest) for contest in contests]
    rows = iter(store.get([key for key in keys if key is not None]))
    return [
        0.5 if key is None else verdict_on(next(rows), first, second)
        for key, (_, first, second) in zip(keys, contests, strict=True)
    ]


def _verdict(row: Json) -> Verdict:
    first, second = cast("list[float | None]", row)
    return Verdict((first, second))


def _share(part: int, whole: int) -> float | None:
    return part / whole if whole else None
