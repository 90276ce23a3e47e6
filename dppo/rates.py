"""What a dry run reckons with: what this cache has measured, or the rates of a machine that is elsewhere."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dppo.config import require

if TYPE_CHECKING:
    from dppo.types import EncodedExample

# Operations for each weight and token: a multiplication and an addition, forwards; twice that backwards, half of it for
# the gradients of weights, which adapters spare; the forward pass once more with activation checkpointing.
_FORWARD, _BACKWARD, _BACKWARD_OF_ADAPTERS = 2.0, 4.0, 2.0
# What a row of a growing store takes beside its tokens, and a token of an answer (its text and its id) or its log-prob.
_BYTES_PER_ROW, _BYTES_PER_ANSWER_TOKEN, _BYTES_PER_LOGP = 128, 12, 4


@dataclass(frozen=True)
class Measured:
    """Times and sizes of similar stages in the same cache; unknown where nothing similar has run."""


@dataclass(frozen=True)
class Assumed:
    """Rates of a machine on which nothing was run. Work is taken to spread evenly over ``n_devices``.

    ``teraflops`` is the peak of one device for dense matrix products, in 10^12 operations a second, of which training
    and scoring reach the share ``utilisation``. ``decoded_tokens_per_second`` is what one device writes with a model of
    10^9 weights; with another it is in inverse proportion to the weights. ``tokens_per_answer`` is the mean length of
    an answer that is not there yet. The reward scores ``responses_per_second`` on ``reward_devices`` of its own.
    """

    n_devices: int
    teraflops: float
    utilisation: float
    decoded_tokens_per_second: float
    tokens_per_answer: int
    responses_per_second: float
    reward_devices: int

    def __post_init__(self) -> None:
        for key in ("n_devices", "tokens_per_answer"):
            require(getattr(self, key) >= 1, key, getattr(self, key), "must be at least 1")
        for key in ("teraflops", "decoded_tokens_per_second", "responses_per_second"):
            require(getattr(self, key) > 0, key, getattr(self, key), "must be > 0")
        require(0 < self.utilisation <= 1, "utilisation", self.utilisation, "must be in (0, 1]")
        require(self.reward_devices >= 0, "reward_devices", self.reward_devices, "must be at least 0")

    def training(self, n_weights: int, n_tokens: float, *, adapters: bool, checkpointing: bool) -> float:
        """Seconds of forward and backward passes over ``n_tokens``."""
        backward = _BACKWARD_OF_ADAPTERS if adapters else _BACKWARD
        return self._computing(n_weights * n_tokens * (_FORWARD * (1 + checkpointing) + backward))

    def scoring(self, n_weights: int, n_tokens: float) -> float:
        """Seconds of forward passes over ``n_tokens``."""
        return self._computing(n_weights * n_tokens * _FORWARD)

    def decoding(self, n_weights: int, n_answers: int) -> float:
        """Seconds of writing ``n_answers``."""
        rate = self.decoded_tokens_per_second * 1e9 / n_weights
        return n_answers * self.tokens_per_answer / (rate * self.n_devices)

    def rewards(self, n_responses: int) -> float:
        """Seconds of scoring ``n_responses`` by the reward."""
        return n_responses / self.responses_per_second

    def answer_bytes(self, n_answers: int) -> float:
        """What the cache keeps of answers."""
        return n_answers * (_BYTES_PER_ROW + _BYTES_PER_ANSWER_TOKEN * self.tokens_per_answer)

    def logp_bytes(self, n_responses: int, n_tokens: float) -> float:
        """What the cache keeps of log-probs of ``n_tokens`` in ``n_responses``."""
        return n_responses * _BYTES_PER_ROW + n_tokens * _BYTES_PER_LOGP

    def score_bytes(self, n_responses: int) -> float:
        """What the cache keeps of rewards."""
        return float(n_responses * _BYTES_PER_ROW)

    def _computing(self, operations: float) -> float:
        return operations / (self.n_devices * self.teraflops * 1e12 * self.utilisation)

    def __str__(self) -> str:
        devices = f"{self.n_devices} device{'s' if self.n_devices > 1 else ''}"
        return f"{devices}, {self.teraflops:g} TFLOP/s at {self.utilisation:.0%}"


Rates = Measured | Assumed


def computed_tokens(example: EncodedExample, *, packed: bool, unwritten: int = 0) -> int:
    """Tokens that a forward pass computes of an example; ``unwritten``: of an answer that is not there yet."""
    n_prompt, answers = len(example.prompt_ids), [len(one.token_ids) for one in example.responses]
    answers += [unwritten] if unwritten else []
    return sum(answers) + n_prompt * (1 if packed else len(answers))


def mean(values: Iterable[int]) -> float:
    """0 of nothing."""
    found = list(values)
    return sum(found) / len(found) if found else 0.0
