"""Small batches of log-probs for the tests of the losses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dppo.types import LossContext, ResponseLogps, Role

# Token log-probs of the answers to one prompt; as (role, tokens) where a role has several answers.
Answers = Mapping[Role, Sequence[float]]
Group = Sequence[tuple[Role, Sequence[float]]]

# Pair A: ranked wrongly. s_w = -1.5 (2 tokens), s_l = -1.0 (3 tokens), s_g = -1.0 (2 tokens): r = -0.5.
A: Answers = {"chosen": [-0.5, -1.0], "rejected": [-0.2, -0.3, -0.5], "generated": [-0.4, -0.6]}
# Its reference: s_w = -1.7, s_l = -1.5, s_g = -0.3, so that Delta = -0.5 - (-0.2) = -0.3.
A_REFERENCE: Answers = {"chosen": [-0.6, -1.1], "rejected": [-0.5, -0.5, -0.5], "generated": [-0.1, -0.2]}
# Pair B: ranked rightly. s_w = -0.1 (1 token), s_l = -3.0 (2 tokens), s_g = -0.3 (3 tokens, one certain): r = 2.9.
B: Answers = {"chosen": [-0.1], "rejected": [-1.0, -2.0], "generated": [-0.05, -0.25, 0.0]}
# Its reference: s_w = -0.05, s_l = -2.5, s_g = -0.6, so that Delta = 2.9 - 2.45 = 0.45.
B_REFERENCE: Answers = {"chosen": [-0.05], "rejected": [-1.5, -1.0], "generated": [-0.2, -0.2, -0.2]}


# Group C: m -0.3, -0.5, -0.1; s of the first is -0.6. Scores 3, 1, 2.
C: Group = [("ranked", [-0.2, -0.4]), ("ranked", [-0.5]), ("ranked", [-0.05, -0.1, -0.15])]
# Group D: m -1, -0.2, -0.3, -0.4; scores 2, 2, 0.5, 0.5.
D: Group = [("ranked", [-1.0]), ("ranked", [-0.2, -0.2]), ("ranked", [-0.3]), ("ranked", [-0.6, -0.2])]
# Answers to other prompts, for the pairs: s - s^r is 0.4 and 0.3 for A, -0.1 for B; their mean is 0.2.
A_OTHERS: Group = [("mismatched", [-0.5, -0.6]), ("mismatched", [-0.7])]
A_OTHERS_REFERENCE: Group = [("mismatched", [-0.7, -0.8]), ("mismatched", [-1.0])]
B_OTHERS: Group = [("mismatched", [-0.6])]
B_OTHERS_REFERENCE: Group = [("mismatched", [-0.5])]


def logps(*examples: Answers | Group, dtype: torch.dtype = torch.float64, requires_grad: bool = False) -> ResponseLogps:
    """One flat batch from the token log-probs of each example's answers."""
    answers = [(index, role, tokens) for index, example in enumerate(examples) for role, tokens in listed(example)]
    return ResponseLogps(
        tokens=torch.tensor(
            [value for _, _, tokens in answers for value in tokens], dtype=dtype, requires_grad=requires_grad
        ),
        lengths=torch.tensor([len(tokens) for _, _, tokens in answers]),
        example=torch.tensor([index for index, _, _ in answers]),
        roles=tuple(role for _, role, _ in answers),
        n_examples=len(examples),
    )


def listed(example: Answers | Group) -> Group:
    """The answers of an example as (role, tokens)."""
    return list(example.items()) if isinstance(example, Mapping) else example


def context(
    n_examples: int,
    *,
    mean_chosen_tokens: float = 1.5,
    shared_prefix: Sequence[int] | None = None,
    equal_to_chosen: Sequence[bool] | None = None,
    statistics: torch.Tensor | None = None,
    scores: Sequence[float] | None = None,
) -> LossContext:
    """A context without anything special about its examples, unless said; pairs A and B have 1.5 chosen tokens."""
    return LossContext(
        scores=torch.full((3 * n_examples,), torch.nan) if scores is None else torch.tensor(scores),
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
