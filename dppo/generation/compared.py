"""How the answers that are compared are decoded: greedily, or sampled once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from dppo.config import SamplingSettings
from dppo.generation.greedy import Greedy
from dppo.generation.sampled import Sampled


@dataclass(frozen=True)
class SampledOnce(Sampled):
    """One sampled answer a prompt, as long and as precise as ``generation`` says.

    Two models answer a prompt with the same random numbers: equal models agree, as greedy ones do.
    """

    group: ClassVar[str] = "generation"


OneAnswer = Greedy | SampledOnce


def decoding_of(settings: Greedy, sampling: SamplingSettings | None) -> OneAnswer:
    """How the answers that are compared are decoded."""
    if sampling is None:
        return settings
    return SampledOnce(
        max_new_tokens=settings.max_new_tokens,
        tokens_per_batch=settings.tokens_per_batch,
        precision=settings.precision,
        n_answers=1,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
    )
