"""The win rate of a model that is still being trained, on a few fixed prompts."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from dppo.config import TrainSettings
from dppo.evaluation.drift import exact_kl
from dppo.evaluation.win_rates import crossed_mean, crossed_rate, outcomes
from dppo.logps import ResponseScorer
from dppo.loop import Metrics
from dppo.processes import gather
from dppo.stages.training import autocast, saved_policy, scorer_like
from dppo.types import Artifact, Generation, Prompt

if TYPE_CHECKING:
    from dppo.data.encoding import ChatEncoder
    from dppo.generation import OwnAnswer
    from dppo.stages.workbench import Workbench


_RESAMPLES = 10_000


def interim_win_rate(
    bench: Workbench,
    reference: Artifact,
    prompts: Sequence[Prompt],
    rewards: Callable[[Mapping[str, Generation]], tuple[list[float], list[float]]],
    settings: OwnAnswer,
    encoder: ChatEncoder,
    train: TrainSettings,
    *,
    kl: bool,
) -> Callable[[ResponseScorer], Metrics]:
    """A measurement of a policy in training; ``rewards`` gives those of its answers to ``prompts`` and the reference's.

    Every process enters it and writes its share of the answers; the main one has the result, the others nothing:
    ``win_rate`` (ties 1/2), ``n_prompts``, mean ``reward`` and ``tokens`` of an answer. With ``kl`` also
    ``kl_nats_per_token`` and ``kl_nats_per_answer``: KL(policy || reference) on the policy's answers, for which the
    reference is loaded each time, because between two steps there is room where the gradients were; ``gain``, the mean
    reward above the reference's; and 95 % intervals of ``gain`` and ``win_rate`` over prompts.
    """
    asked = [(prompt.prompt_id, encoder.prompt_ids(prompt.messages)) for prompt in prompts]
    queue = sorted(asked, key=lambda prompt: (len(prompt[1]), prompt[0]))

    def measure(policy: ResponseScorer) -> Metrics:
        written: list[Generation] = []
        if mine := bench.share(queue):
            with policy.own_attention():
                for part in settings.generate(policy.model, mine, encoder.end_of_turn_ids, encoder.decode):
                    written += part
        answers = {answer.prompt_id: answer for own in gather(bench.accelerator, written) for answer in own}
        if not bench.is_main:
            return {}
        own, baseline = rewards(answers)
        found: Metrics = {
            "win_rate": float(outcomes(own, baseline).mean()),
            "n_prompts": len(prompts),
            "reward": float(np.mean(own)),
            "tokens": float(np.mean([len(answer.token_ids) for answer in answers.values()])),
        }
        if kl:
            with autocast(bench, train.precision):
                moved = exact_kl(
                    policy,
                    scorer_like(bench, saved_policy(bench, reference), train),
                    encoder.answers(prompts, answers),
                    train.tokens_per_micro_batch,
                )
            gain = crossed_mean(np.subtract(own, baseline)[None], n_bootstrap=_RESAMPLES, seed=0)
            rate = crossed_rate(outcomes(own, baseline)[None], n_bootstrap=_RESAMPLES, seed=0)
            found |= {
                "kl_nats_per_token": moved.nats_per_token,
                "kl_nats_per_answer": moved.nats_per_answer,
                "gain": gain.value,
                **{f"gain_ci_{end}": float(getattr(gain, end)) for end in ("low", "high")},
                **{f"win_rate_ci_{end}": float(getattr(rate, end)) for end in ("low", "high")},
            }
        return found

    return measure
