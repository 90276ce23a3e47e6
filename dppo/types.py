"""The data that flows between the parts of dppo. Needs torch and the standard library only.

Log-probs are natural logarithms (nats) in fp32. Shapes use these letters: M examples in a (micro-)batch,
R responses of those examples, N response tokens, T tokens of prompts and responses together.
Response tokens include the end-of-turn token.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

Role = Literal["chosen", "rejected", "generated", "ranked", "desirable", "undesirable", "mismatched"]
Split = Literal["train", "validation", "test"]
Shape = Literal["pairs", "ranked", "labelled"]
Json = None | bool | int | float | str | Sequence["Json"] | Mapping[str, "Json"]


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: Literal["system", "user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that ends with a user turn, and what a programmatic reward may check in an answer.

    ``prompt_id`` is a content hash of the messages. ``checks`` holds (kind, argument) pairs, for instance
    ``("mention", "apple")``; data sets without programmatic checks leave it empty.
    """

    prompt_id: str
    messages: tuple[Message, ...]
    checks: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Response:
    """One answer to a prompt, as text; ``score`` is a rating from the data set where there is one."""

    role: Role
    text: str
    score: float | None = None


@dataclass(frozen=True, slots=True)
class PreferenceExample:
    """A prompt and its answers: a pair, K ranked answers, one labelled answer, or one ``chosen`` demonstration.

    ``example_id`` is a content hash of prompt and responses.
    """

    example_id: str
    prompt: Prompt
    responses: tuple[Response, ...]


@dataclass(frozen=True, slots=True)
class EncodedResponse:
    """A response as token ids, end-of-turn token included unless it was cut at a limit.

    ``response_id`` is a hash of the token ids; with the prompt's id it is the key of stored log-probs. ``token_ids``
    are a tuple, or equal to one where they lie in a file of the cache.
    """

    response_id: str
    role: Role
    token_ids: Sequence[int]
    score: float | None = None


@dataclass(frozen=True, slots=True)
class EncodedExample:
    """A tokenised example: the prompt once, and every response that continues it."""

    example_id: str
    prompt_id: str
    prompt_ids: Sequence[int]
    responses: tuple[EncodedResponse, ...]

    @property
    def n_tokens(self) -> int:
        return len(self.prompt_ids) + sum(len(response.token_ids) for response in self.responses)

    def response(self, role: Role) -> EncodedResponse | None:
        """The first response in this role, or None."""
        return next((response for response in self.responses if response.role == role), None)


@dataclass(frozen=True, slots=True)
class Generation:
    """A model's answer to a prompt; ``token_ids`` end with the end-of-turn token if ``stopped_by`` is eos."""

    prompt_id: str
    text: str
    token_ids: tuple[int, ...]
    stopped_by: Literal["eos", "length"]


@dataclass(frozen=True)
class Batch:
    """Examples laid out flat: for each example its prompt once, followed by its responses one after another.

    Positions restart at the prompt's end for every response, so that a response sees the position ids it would
    have alone behind the prompt. ``predict_from`` is the one shift-by-one of the package: the place in the flat
    row whose hidden state predicts each response token (the prompt's last token for a response's first token).
    """

    token_ids: Tensor  # (T,) int64
    positions: Tensor  # (T,) int64
    prompt_start: Tensor  # (M,) int64, where an example begins in the flat row
    prompt_length: Tensor  # (M,) int64, >= 1
    response_start: Tensor  # (R,) int64
    lengths: Tensor  # (R,) int64, >= 1, tokens of each response
    example: Tensor  # (R,) int64, the example (0..M-1) of each response; non-decreasing
    roles: tuple[Role, ...]  # R
    predict_from: Tensor  # (N,) int64
    targets: Tensor  # (N,) int64, the response tokens
    example_ids: tuple[str, ...]  # M
    response_keys: tuple[tuple[str, str], ...]  # R times (prompt_id, response_id)
    scores: Tensor  # (R,) fp32, NaN where a response has no score
    shared_prefix: Tensor  # (M,) int64, leading tokens that `generated` shares with `chosen` (0 without either)
    equal_to_chosen: Tensor  # (M,) bool, `generated` has exactly the tokens of `chosen`

    @property
    def n_examples(self) -> int:
        return len(self.example_ids)

    def to(self, device: torch.device) -> Batch:
        """The same batch with its tensors on ``device``."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)


@dataclass(frozen=True)
class ResponseLogps:
    """Token log-probs of R responses as one ragged list: once for the policy, once for the reference."""

    tokens: Tensor  # (N,) log p of each response token, fp32 (fp64 in tests)
    lengths: Tensor  # (R,) int64, tokens of each response
    example: Tensor  # (R,) int64, the example of each response
    roles: tuple[Role, ...]  # R
    n_examples: int

    @cached_property
    def owner(self) -> Tensor:
        """(N,) the response to which each token belongs."""
        return torch.repeat_interleave(torch.arange(len(self.roles), device=self.lengths.device), self.lengths)

    def reduce(self, fn: Callable[[Tensor], Tensor]) -> Tensor:
        """(R,) the sum over each response's tokens of ``fn`` of their log-probs; ``fn`` maps (N,) to (N,)."""
        values = fn(self.tokens)
        return values.new_zeros(len(self.roles)).index_add(0, self.owner, values)

    @cached_property
    def sum(self) -> Tensor:
        """(R,) log p(y | x): s_y."""
        return self.reduce(lambda tokens: tokens)

    @cached_property
    def mean(self) -> Tensor:
        """(R,) log p(y | x) / |y|: m_y; 0 for a response without tokens."""
        return self.sum / self.lengths.clamp(min=1)

    def select(self, role: Role) -> ResponseLogps:
        """The one response in ``role`` of every example, in the order of the examples: M responses.

        Raises ValueError where an example has no response in this role, or more than one.
        """
        picked = [index for index, found in enumerate(self.roles) if found == role]
        owners = [int(index) for index in self.example[picked].tolist()]
        if sorted(owners) != list(range(self.n_examples)):
            raise ValueError(
                f"every one of the {self.n_examples} examples needs exactly one {role!r} response, "
                f"found them for examples {owners}"
            )
        picked = [index for _, index in sorted(zip(owners, picked, strict=True))]
        starts = torch.cumsum(self.lengths, 0) - self.lengths
        where = torch.cat(
            [
                torch.arange(int(starts[index]), int(starts[index] + self.lengths[index]), device=self.tokens.device)
                for index in picked
            ]
            or [torch.zeros(0, dtype=torch.int64, device=self.tokens.device)]
        )
        return ResponseLogps(
            tokens=self.tokens[where],
            lengths=self.lengths[picked],
            example=torch.arange(self.n_examples, device=self.example.device),
            roles=(role,) * self.n_examples,
            n_examples=self.n_examples,
        )

    @cached_property
    def chosen(self) -> ResponseLogps:
        return self.select("chosen")

    @cached_property
    def rejected(self) -> ResponseLogps:
        return self.select("rejected")

    @cached_property
    def generated(self) -> ResponseLogps:
        return self.select("generated")

    def mean_by_example(self, values: Tensor, roles: Collection[Role]) -> Tensor:
        """(M,) the mean of ``values`` (R,) over each example's responses in ``roles``; NaN where it has none."""
        picked = torch.tensor([role in roles for role in self.roles], dtype=torch.bool, device=self.example.device)
        owner, values = self.example[picked], values[picked]
        zeros = values.new_zeros(self.n_examples)
        return zeros.index_add(0, owner, values) / zeros.index_add(0, owner, torch.ones_like(values))

    def without_prefix(self, skip: Tensor) -> ResponseLogps:
        """The same responses without their first ``skip`` (R,) int64 tokens; lengths may become 0."""
        starts = torch.cumsum(self.lengths, 0) - self.lengths
        place = torch.arange(self.tokens.shape[0], device=self.tokens.device) - starts[self.owner]
        return dataclasses.replace(
            self,
            tokens=self.tokens[place >= skip[self.owner]],
            lengths=(self.lengths - skip).clamp(min=0),
        )


@dataclass(frozen=True)
class ResponseRewards(ResponseLogps):
    """Rewards of R responses from a model with a scalar head: one value each in the place of token log-probs.

    So ``tokens`` (R,) are the rewards, unbounded, fp32; ``lengths`` are 1 and ``sum`` is the reward of a response.
    """


@dataclass(frozen=True)
class LossContext:
    """What a loss may need beyond log-probs, computed by the loop.

    ``mean_chosen_tokens`` is the mean number of chosen tokens per example over the whole optimiser batch and all
    ranks. ``statistics`` is the state (S,) that a loss with ``uses_statistics`` keeps across optimiser steps.
    """

    scores: Tensor  # (R,) fp32, NaN where a response has no score
    shared_prefix: Tensor  # (M,) int64
    equal_to_chosen: Tensor  # (M,) bool
    mean_chosen_tokens: float
    statistics: Tensor | None = None


@dataclass(frozen=True)
class LossTerms:
    """What a loss returns for a micro-batch of M examples.

    The loss of an optimiser batch is ``sum(value * weight) / sum(weight)`` over all its micro-batches and ranks;
    it is minimised. ``metrics`` are detached per-example values of which the loop logs the mean,
    ``distributions`` those of which it also logs the 95th percentile; NaN stands for an example that has none.
    """

    value: Tensor  # (M,), differentiable
    weight: Tensor  # (M,), 1 for a pair, the number of tokens for a token mean; no gradient
    rewards: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)  # "chosen", "rejected": (M,) detached
    metrics: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)  # (M,) detached
    distributions: Mapping[str, Tensor] = dataclasses.field(default_factory=dict)  # (M,) detached


@runtime_checkable
class Objective(Protocol):
    """A loss: a frozen dataclass whose fields are its hyperparameters. Pure: no state, no randomness."""

    @property
    def name(self) -> str:
        """The word a user types after ``loss=``."""

    @property
    def uses_reference(self) -> bool:
        """Whether ``reference`` must be given."""

    @property
    def uses_roles(self) -> tuple[Role, ...]:
        """The responses that every example must have, one of each."""

    @property
    def trains_on(self) -> Shape:
        """What an example holds: a pair, K ranked answers, or labelled ones; a pair is a case of the other two."""

    @property
    def uses_statistics(self) -> bool:
        """Whether the loop must make a no-gradient pass over the optimiser batch first (``Statistics``)."""

    def __call__(self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext) -> LossTerms: ...


@runtime_checkable
class StatisticsObjective(Objective, Protocol):
    """An objective that needs statistics of the whole optimiser batch (KTO's z, AlphaDPO's running moments)."""

    @property
    def statistics_scope(self) -> Literal["optimiser_batch", "micro_batch"]:
        """Over which examples the statistics are taken, those of all ranks included, and so how often they change."""

    @property
    def statistics_roles(self) -> tuple[Role, ...]:
        """The responses that ``partial_statistics`` looks at: with the whole optimiser batch only they are computed."""

    def initial_statistics(self) -> Tensor:
        """(S,) fp64, the state before the first optimiser step; saved in checkpoints."""

    def partial_statistics(
        self, policy: ResponseLogps, reference: ResponseLogps | None, context: LossContext
    ) -> Tensor:
        """(P,) fp64 sums over one micro-batch; the loop adds them up over micro-batches and ranks."""

    def update_statistics(self, state: Tensor, totals: Tensor) -> Tensor:
        """(S,) the new state from the old one and the totals (P,) of this optimiser batch."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A finished stage in the cache."""

    stage: str
    fingerprint: str
    path: str
    parents: tuple[str, ...]
    reused: bool


@dataclass(frozen=True, slots=True)
class WinRate:
    """Share of prompts on which the policy's answer has the higher reward, with 95 % intervals.

    ``value`` counts ties one half, ``strict`` counts them as lost.
    """

    value: float
    ci_low: float
    ci_high: float
    strict: float
    strict_ci_low: float
    strict_ci_high: float
    n: int
    wins: int
    ties: int
