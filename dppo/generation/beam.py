"""Beam search and diverse beam search: the answers that are most likely as a whole."""

from __future__ import annotations

import heapq
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch

from dppo.config import require
from dppo.errors import UserError
from dppo.generation.decoding import COMPACT_BELOW, Prompts, Rows, Several
from dppo.types import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel

VERSION = 1


@dataclass(frozen=True)
class Beam(Several):
    """The ``n_answers`` best answers that as many beams find, the best first.

    An answer's score is the sum of its tokens' log-probs (at ``temperature``) divided by
    (its tokens ** ``length_penalty``): above 0 long answers gain. A prompt is done when as many answers have ended as
    there are beams and no beam scores better than the worst of them, as it stands. Rules and scores are those of
    ``num_beams`` in transformers' ``generate``, at temperature 1.
    """

    length_penalty: float

    def identity(self) -> dict[str, Json]:
        return {
            "decoding": "beam",
            "version": VERSION,
            "n_answers": self.n_answers,
            "temperature": self.temperature,
            "length_penalty": self.length_penalty,
            "max_new_tokens": self.max_new_tokens,
            "precision": self.precision,
        }

    def write(self, model: PreTrainedModel, batch: Prompts, end_ids: frozenset[int]) -> list[list[int]]:
        found = self.search(model, [ids for _, ids in batch], end_ids)
        return [list(answer.token_ids) for answers in found for answer in answers]

    def search(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], end_ids: frozenset[int]
    ) -> list[list[Ended]]:
        """``n_answers`` answers with their scores for each prompt, the best of a group first."""
        return self._search(model, prompts, end_ids, n_groups=1, diversity_penalty=0.0)

    def _search(
        self,
        model: PreTrainedModel,
        prompts: Sequence[Sequence[int]],
        end_ids: frozenset[int],
        *,
        n_groups: int,
        diversity_penalty: float,
    ) -> list[list[Ended]]:
        size = self.n_answers // n_groups
        rows = Rows(model, prompts)
        searches = [[_Group(size) for _ in range(n_groups)] for _ in prompts]
        open_ = list(range(len(prompts)))  # the prompts in the batch, in the order of its rows
        logits = rows.logits()
        n_beams = 1  # rows of a group: at first all beams are the prompt itself
        for step in range(1, self.max_new_tokens + 1):
            log_probs = torch.log_softmax(logits / self.temperature, dim=-1)
            # (prompt, group, beam, vocabulary); before the first step every group looks at the same row.
            shape = (len(open_), n_groups if step > 1 else 1, n_beams, log_probs.shape[-1])
            log_probs = log_probs.reshape(shape).expand(-1, n_groups, -1, -1)
            n_best = size * max(2, 1 + len(end_ids))  # enough that as many go on as there are beams
            if n_best > n_beams * shape[-1]:
                raise UserError(f"{self.group}.n_answers={self.n_answers}: too many for {shape[-1]} tokens")
            taken = log_probs.new_zeros(len(open_), shape[-1])  # how often earlier groups took a token at this step
            parents: list[list[list[int]]] = [[] for _ in open_]
            for number in range(n_groups):
                groups = [searches[prompt][number] for prompt in open_]
                scores = torch.tensor([group.scores[:n_beams] for group in groups], device=log_probs.device)
                totals = log_probs[:, number] + scores[..., None] - diversity_penalty * taken[:, None]
                best, places = totals.flatten(1).topk(n_best, dim=-1)
                if diversity_penalty:
                    taken.scatter_add_(1, places[:, :size] % shape[-1], torch.ones_like(best[:, :size]))
                for at, group in enumerate(groups):
                    candidates = zip(best[at].tolist(), places[at].tolist(), strict=True)
                    steps = [(value, place // shape[-1], place % shape[-1]) for value, place in candidates]
                    parents[at].append(group.advance(steps, end_ids, step, self.length_penalty, self.max_new_tokens))
            going = [at for at, prompt in enumerate(open_) if not all(group.done for group in searches[prompt])]
            if not going:
                break
            if len(going) >= COMPACT_BELOW * len(open_):
                going = list(range(len(open_)))
            rows_before = n_beams * (n_groups if step > 1 else 1)
            places_ = [
                at * rows_before + (number * n_beams if step > 1 else 0) + parent
                for at in going
                for number, chosen in enumerate(parents[at])
                for parent in chosen
            ]
            open_ = [open_[at] for at in going]
            tokens = [beam[-1] for prompt in open_ for group in searches[prompt] for beam in group.beams]
            rows.keep(torch.tensor(places_, device=rows.device))
            rows.add(torch.tensor(tokens, device=rows.device))
            n_beams = size
            logits = rows.logits()
        return [[answer for group in groups for answer in group.best()] for groups in searches]


@dataclass(frozen=True)
class DiverseBeam(Beam):
    """Diverse beam search (Vijayakumar 2016, arXiv 1610.02424): ``n_groups`` beam searches that avoid one another.

    The beams are shared out evenly among the groups. At every step the groups choose one after another, and a token
    loses ``diversity_penalty`` for each time that an earlier group's beams took it at this step (Hamming diversity);
    the loss stays in the score of the answer. The answers of the first group, plain beam search, come first.
    """

    n_groups: int
    diversity_penalty: float

    def __post_init__(self) -> None:
        super().__post_init__()
        require(
            self.n_groups >= 2 and self.n_answers % self.n_groups == 0,
            "n_groups",
            self.n_groups,
            f"must be at least 2 and divide n_answers ({self.n_answers})",
        )
        require(self.diversity_penalty > 0, "diversity_penalty", self.diversity_penalty, "must be > 0")

    def identity(self) -> dict[str, Json]:
        own: dict[str, Json] = {"n_groups": self.n_groups, "diversity_penalty": self.diversity_penalty}
        return {**super().identity(), "decoding": "diverse beam", **own}

    def search(
        self, model: PreTrainedModel, prompts: Sequence[Sequence[int]], end_ids: frozenset[int]
    ) -> list[list[Ended]]:
        return self._search(model, prompts, end_ids, n_groups=self.n_groups, diversity_penalty=self.diversity_penalty)


@dataclass(frozen=True, order=True)
class Ended:
    """An answer that is complete, or as long as answers may be; the larger the score the better."""

    score: float
    token_ids: tuple[int, ...] = field(compare=False)


class _Group:
    """The beams of one search for one prompt, and the answers that it has found."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.beams: list[tuple[int, ...]] = [()] * size
        self.scores = [0.0] * size  # sums of log-probs
        self.done = False
        self._ended: list[Ended] = []  # a heap, the worst first

    def advance(
        self,
        steps: Sequence[tuple[float, int, int]],
        end_ids: frozenset[int],
        length: int,
        length_penalty: float,
        longest: int,
    ) -> list[int]:
        """Take the next token: ``steps`` are (sum of log-probs, beam, token), the best first.

        Returns the beam that each new beam goes on from. Of the first ``size`` steps those that end are answers.
        """
        beams: list[tuple[int, ...]] = []
        scores, parents = [], []
        for place, (score, parent, token) in enumerate(steps):
            ends = token in end_ids or length == longest
            if ends and place < self.size and not self.done:
                answer = Ended(score / length**length_penalty, (*self.beams[parent], token))
                keep = heapq.heappush if len(self._ended) < self.size else heapq.heappushpop
                keep(self._ended, answer)
            if token not in end_ids and len(beams) < self.size:
                beams.append((*self.beams[parent], token))
                scores.append(score)
                parents.append(parent)
        self.beams, self.scores = beams, scores
        full = len(self._ended) == self.size
        if length == longest or (full and scores[0] / length**length_penalty <= self._ended[0].score):
            self.done = True
        return parents

    def best(self) -> list[Ended]:
        """The answers found, the best first."""
        return sorted(self._ended, reverse=True)
