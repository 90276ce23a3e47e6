"""How far the policy has moved from the reference: exact KL on its own answers, likelihoods of held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dppo.batches import collate, micro_batches
from dppo.logps import ResponseScorer, response_log_softmax
from dppo.types import EncodedExample


@dataclass(frozen=True, slots=True)
class Kl:
    """KL(policy || reference), summed over the vocabulary at each position of the policy's own answers, in nats.

    Both figures are >= 0. ``nats_per_token`` pools all positions, ``nats_per_answer`` is the mean of the sums.
    ``log_ratios`` are the answers' own log pi(y | x) - log pi_ref(y | x): their mean estimates the same, without bias,
    if the answers were drawn from the policy's distribution, and says nothing about KL if they were not.
    """

    nats_per_token: float
    nats_per_answer: float
    n_answers: int
    n_tokens: int
    log_ratios: tuple[float, ...]


@torch.inference_mode()
def exact_kl(
    policy: ResponseScorer, reference: ResponseScorer, answers: Sequence[EncodedExample], tokens_per_batch: int
) -> Kl:
    """KL of two models on the same device over answers with one response each; raises ValueError for none."""
    if not answers:
        raise ValueError("there are no answers to compare the models on")
    device = next(policy.parameters()).device
    policy.eval()
    reference.eval()
    total, n_tokens = 0.0, 0
    log_ratios: list[float] = []
    for part in micro_batches(answers, tokens_per_batch):
        batch = collate(part).to(device)
        own, other = response_log_softmax(policy, batch), response_log_softmax(reference, batch)
        at, written = 0, []
        for left, right in zip(own, other, strict=True):
            total += float((left.exp() * (left - right)).sum(dtype=torch.float64))
            tokens = batch.targets[at : at + len(left), None]
            written.append((left.gather(-1, tokens) - right.gather(-1, tokens))[:, 0])
            at += len(left)
        n_tokens += at
        log_ratios += [float(one.sum(dtype=torch.float64)) for one in torch.cat(written).split(batch.lengths.tolist())]
    # Rounding may leave a tiny negative sum when the two models are the same.
    total = max(total, 0.0)
    return Kl(total / n_tokens, total / len(answers), len(answers), n_tokens, tuple(log_ratios))
