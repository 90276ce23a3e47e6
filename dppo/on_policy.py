"""Training preferences from a model's own answers: they are made, ranked, and become pairs or groups."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, cast

from dppo.data.on_policy import (
    OnPolicy,
    best_and_worst,
    contests,
    ranked_group,
    shares_won,
    unique,
)
from dppo.errors import UserError
from dppo.rewards import Reward
from dppo.stages.generate import candidates
from dppo.stages.scores import Contest, pair_key, score_key, scores, scores_store, verdict_on, verdicts
from dppo.types import Artifact, Generation, Json, PreferenceExample, Prompt, Shape

if TYPE_CHECKING:
    from dppo.artifacts import Store
    from dppo.data.encoding import ChatEncoder
    from dppo.rewards import PairwiseReward
    from dppo.stages.workbench import Workbench

Texts = Mapping[str, Sequence[str]]
"""The different answers to each prompt, by prompt_id."""


@dataclass(frozen=True)
class Preferences:
    """What a round trains on.

    ``answered`` and ``ranked`` are the stores of the answers and of their scores or verdicts. ``counts``: ``n_prompts``
    that were answered, ``n_unanswerable`` that were not, being too long or refused by the chat template, ``n_examples``
    that came of them, prompts left out with ``n_one_answer`` different answer only and ``n_tied`` with equal scores,
    ``different_answers`` a prompt, the share ``cut`` of the model's answers that reached the token limit, and over the
    examples the mean scores ``best`` and ``worst``.
    """

    rows: dict[Shape, list[PreferenceExample]]
    answered: Artifact
    ranked: Artifact
    counts: dict[str, float | int]

    @property
    def parents(self) -> list[str]:
        return [self.answered.fingerprint, self.ranked.fingerprint]


def preferences(
    bench: Workbench,
    dataset: OnPolicy,
    reward: Reward | PairwiseReward,
    prompts: Sequence[Prompt],
    model: Artifact,
    encoder: ChatEncoder,
) -> Preferences:
    """Have ``model`` answer ``prompts`` and ``reward`` rank the answers.

    Raises UserError if no prompt is left with a better and a worse answer.
    """
    n_asked, prompts = len(prompts), answerable(prompts, dataset, encoder)
    answered, answers = candidates(bench, model, prompts, dataset.answers, encoder)
    texts = different(dataset, answers)
    ranked, found = _ranking(bench, reward, prompts, texts)
    rows, counts = examples(prompts, texts, found)
    cut = sum(one.stopped_by == "length" for given in answers.values() for one in given)
    counts["n_unanswerable"] = n_asked - len(prompts)
    counts["cut"] = cut / max(1, sum(map(len, answers.values())))
    bench.say(f"  {_told(counts)}")
    if not rows["pairs"]:
        raise UserError(
            f"dataset=on_policy: of {len(prompts):,} prompts none has a better and a worse answer "
            f"({counts['n_one_answer']} with one answer only, {counts['n_tied']} with equal scores); raise "
            "dataset.answers.temperature or n_answers, or choose another dataset.ranker"
        )
    return Preferences(rows, answered, ranked, counts)


def answerable(prompts: Sequence[Prompt], dataset: OnPolicy, encoder: ChatEncoder) -> list[Prompt]:
    """The prompts that leave room for an answer in the model's context, as far as the tokenizer knows it.

    Without those that the chat template refuses.
    """
    room = encoder.tokenizer.model_max_length - dataset.answers.max_new_tokens
    found = []
    for prompt in prompts:
        with suppress(UserError):
            if len(encoder.prompt_ids(prompt.messages)) <= room:
                found.append(prompt)
    return found


def different(dataset: OnPolicy, answers: Mapping[str, Sequence[Generation]]) -> dict[str, list[str]]:
    """The different texts among the model's answers and, if they are mixed in, the source's."""
    own = dataset.own_answers("train") if dataset.mix_in else {}
    return {key: unique([*(one.text for one in given), *own.get(key, ())]) for key, given in answers.items()}


def examples(
    prompts: Sequence[Prompt], texts: Texts, found: Mapping[str, Sequence[float]]
) -> tuple[dict[Shape, list[PreferenceExample]], dict[str, float | int]]:
    """Groups and pairs of all prompts whose best answer scores higher than the worst, and the counts.

    A pair also serves losses of labelled answers: the best is desirable, the worst is not.
    """
    groups = []
    n_one_answer = n_tied = 0
    for prompt in prompts:
        given, scored = texts[prompt.prompt_id], found[prompt.prompt_id]
        if len(given) < 2:
            n_one_answer += 1
        elif max(scored) == min(scored):
            n_tied += 1
        else:
            groups.append(ranked_group(prompt, given, scored))
    pairs = [best_and_worst(group) for group in groups]
    counts: dict[str, float | int] = {
        "n_prompts": len(prompts),
        "n_examples": len(groups),
        "n_one_answer": n_one_answer,
        "n_tied": n_tied,
        "different_answers": _mean([len(texts[prompt.prompt_id]) for prompt in prompts]),
    }
    for name, place in (("best", 0), ("worst", 1)):
        counts[name] = _mean([score for pair in pairs if (score := pair.responses[place].score) is not None])
    return {"pairs": pairs, "labelled": pairs, "ranked": groups}, counts


def in_slots(prompts: Sequence[Prompt], texts: Texts) -> Iterator[dict[str, Generation]]:
    """The texts as answers of several models, one answer a prompt each: the form in which answers are scored.

    Where a prompt has fewer texts than another, its first one stands in again; equal texts are scored once.
    """
    for slot in range(max((len(given) for given in texts.values()), default=0)):
        chosen = {key: given[slot] if slot < len(given) else given[0] for key, given in texts.items()}
        yield {key: Generation(key, chosen[key], (), "eos") for key in (prompt.prompt_id for prompt in prompts)}


def round_robin(prompts: Sequence[Prompt], texts: Texts) -> list[Contest]:
    """All contests between the answers to each prompt."""
    return [
        (prompt, texts[prompt.prompt_id][first], texts[prompt.prompt_id][second])
        for prompt in prompts
        for first, second in contests(len(texts[prompt.prompt_id]))
    ]


def ranking_keys(reward: Reward | PairwiseReward, prompts: Sequence[Prompt], texts: Texts) -> dict[str, list[str]]:
    """The keys by prompt_id of what the store of scores must have: one a text, or one a contest."""
    if isinstance(reward, Reward):
        return {one.prompt_id: [score_key(one, text) for text in texts[one.prompt_id]] for one in prompts}
    found: dict[str, list[str]] = {prompt.prompt_id: [] for prompt in prompts}
    for contest in round_robin(prompts, texts):
        key = pair_key(*contest)
        assert key is not None  # the texts of a prompt differ
        found[contest[0].prompt_id].append(key)
    return found


def stored_scores(
    reward: Reward | PairwiseReward, store: Store[Json], keys: Mapping[str, Sequence[str]], texts: Texts
) -> dict[str, list[float]]:
    """The score of each text by prompt_id: the reward's, or the share of its contests that it wins.

    ``keys`` are those of ``ranking_keys``. Raises MissingRows if there are holes.
    """
    rows = iter(store.get([key for own in keys.values() for key in own]))
    found = {}
    for prompt_id, own in keys.items():
        given, values = texts[prompt_id], [next(rows) for _ in own]
        if isinstance(reward, Reward):
            found[prompt_id] = [float(cast("float", value)) for value in values]
        else:
            met = zip(values, contests(len(given)), strict=True)
            found[prompt_id] = shares_won(
                len(given), [verdict_on(value, given[first], given[second]) for value, (first, second) in met]
            )
    return found


def _ranking(
    bench: Workbench, reward: Reward | PairwiseReward, prompts: Sequence[Prompt], texts: Texts
) -> tuple[Artifact, dict[str, list[float]]]:
    """The score of each text, by prompt_id."""
    if isinstance(reward, Reward):
        made, _ = scores(bench, reward, prompts, list(in_slots(prompts, texts)))
    else:
        made, _ = verdicts(bench, reward, round_robin(prompts, texts))
    store = scores_store(bench, reward)
    return made, stored_scores(reward, store, ranking_keys(reward, prompts, texts), texts)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def _told(counts: Mapping[str, Any]) -> str:
    one, tied = counts["n_one_answer"], counts["n_tied"]
    left_out = f" ({one:,} with one answer only, {tied:,} with equal scores)" if one or tied else ""
    return (
        f"{counts['n_examples']:,} of {counts['n_prompts']:,} prompts have a better and a worse answer{left_out}"
        f"; {counts['different_answers']:.1f} different answers a prompt, {counts['cut']:.1%} cut at the limit; "
        f"mean score of the best {counts['best']:.3f}, of the worst {counts['worst']:.3f}"
    )
