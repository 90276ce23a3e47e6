"""Small batches of log-probs for the tests of the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dppo.types import LossContext, ResponseLogps, Role

Answers = Mapping[Role, Sequence[float]]  # token log-probs of the answers to one prompt

# Pair A: ranked wrongly. s_w = -1.5 (2 tokens), s_l = -1.0 (3 tokens), s_g = -1.0 (2 tokens): r = -0.5.
A: Answers = {"chosen": [-0.5, -1.0], "rejected": [-0.2, -0.3, -0.5], "generated": [-0.4, -0.6]}
# Its reference: s_w = -1.7, s_l = -1.5, s_g = -0.3, so that Delta = -0.5 - (-0.2) = -0.3.
A_REFERENCE: Answers = {"chosen": [-0.6, -1.1], "rejected": [-0.5, -0.5, -0.5], "generated": [-0.1, -0.2]}
# Pair B: ranked rightly. s_w = -0.1 (1 token), s_l = -3.0 (2 tokens), s_g = -0.3 (3 tokens, one certain): r = 2.9.
B: Answers = {"chosen": [-0.1], "rejected": [-1.0, -2.0], "generated": [-0.05, -0.25, 0.0]}
# Its reference: s_w = -0.05, s_l = -2.5, s_g = -0.6, so that Delta = 2.9 - 2.45 = 0.45.
B_REFERENCE: Answers = {"chosen": [-0.05], "rejected": [-1.5, -1.0], "generated": [-0.2, -0.2, -0.2]}


def logps(*examples: Answers, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> ResponseLogps:
    """One flat batch from the token log-probs of each example's answers."""
    answers = [(index, role, tokens) for index, example in enumerate(examples) for role, tokens in example.items()]
    return ResponseLogps(
        tokens=torch.tensor(
            [value for _, _, tokens in answers for value in tokens], dtype=dtype, requires_grad=requires_grad
        ),
        lengths=torch.tensor([len(tokens) for _, _, tokens in answers]),
        example=torch.tensor([index for index, _, _ in answers]),
        roles=tuple(role for _, role, _ in answers),
        n_examples=len(examples),
    )


def context(
    n_examples: int,
    *,
    mean_chosen_tokens: float = 1.5,
    shared_prefix: Sequence[int] | None = None,
    equal_to_chosen: Sequence[bool] | None = None,
    statistics: torch.Tensor | None = None,
) -> LossContext:
    """A context without anything special about its examples, unless said; pairs A and B have 1.5 chosen tokens."""
    return LossContext(
        scores=torch.full((3 * n_examples,), torch.nan),
        shared_prefix=torch.tensor(shared_prefix or [0] * n_examples),
        equal_to_chosen=torch.tensor(equal_to_chosen or [False] * n_examples),
        mean_chosen_tokens=mean_chosen_tokens,
        statistics=statistics,
    )


def gradients(values: torch.Tensor, given: ResponseLogps, role: Role) -> list[torch.Tensor]:
    """d sum(values) / d token log-probs, one tensor for each example's answer in ``role``."""
    (gradient,) = torch.autograd.grad(values.sum(), given.tokens, retain_graph=True)
    by_response = torch.split(gradient, [int(length) for length in given.lengths])
    return [part for part, found in zip(by_response, given.roles, strict=True) if found == role]
