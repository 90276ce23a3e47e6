"""How the answers that are compared are decoded: greedily, or sampled once."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import ClassVar, overload

from dppo.config import SamplingSettings
from dppo.generation.greedy import Greedy
from dppo.generation.sampled import Sampled
from dppo.generation.vllm import VLLM, VLLMSampledOnce


@dataclass(frozen=True)
class SampledOnce(Sampled):
    """One sampled answer a prompt, as long and as precise as ``generation`` says.

    Two models answer a prompt with the same random numbers: equal models agree, as greedy ones do.
    """

    group: ClassVar[str] = "generation"


OwnAnswer = Greedy | SampledOnce
OneAnswer = OwnAnswer | VLLM


@overload
def decoding_of(settings: Greedy, sampling: SamplingSettings | None) -> OwnAnswer: ...
@overload
def decoding_of(settings: Greedy | VLLM, sampling: SamplingSettings | None) -> OneAnswer: ...
def decoding_of(settings: Greedy | VLLM, sampling: SamplingSettings | None) -> OneAnswer:
    """How the answers that are compared are decoded."""
    if not isinstance(settings, VLLM):
        return decoding_in_training(settings, sampling)
    if sampling is None:
        return settings
    return VLLMSampledOnce(**dataclasses.asdict(settings), **dataclasses.asdict(sampling))


def decoding_in_training(settings: Greedy | VLLM, sampling: SamplingSettings | None) -> OwnAnswer:
    """How a model answers whose weights are in this process, and changing: never by an engine of its own."""
    if isinstance(settings, VLLM):
        settings = settings.in_training
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
