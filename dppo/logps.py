"""From a model and a batch to the log-prob of every response token.

``ResponseScorer`` is the one module that DDP, FSDP and compile wrap: it runs the model's body, then the LM head at
the places that predict response tokens only, in chunks, with log-softmax in fp32.

Two layouts with the same numbers. ``packed``: the batch's flat row as it is; every example's prompt is computed once
and all its responses attend to it and to themselves. ``padded``: every response behind its own copy of the prompt,
one per row; slower, works with any causal LM, and is what the packed layout is tested against.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dppo.types import Batch, ResponseLogps

if TYPE_CHECKING:
    from transformers import PreTrainedModel

SHARED_PROMPT = "dppo_shared_prompt"
# Logits of one head chunk take tokens * vocabulary * 4 bytes; 2^24 of them are 64 MiB in fp32.
_LOGITS_PER_CHUNK = 1 << 24


# Up to this length all examples of a row share one attention call, padded to the longest: one call for many short
# examples beats many small calls. Beyond it the padding costs more than the calls, and each response has its own.
_SHORT_EXAMPLE = 192


@dataclass(frozen=True)
class SharedPromptLayout:
    """Where the examples of a flat row begin, for the attention function.

    ``examples`` has for each example (prompt start, prompt length, ((response start, length), ...)). For short
    examples ``place`` (M, L) holds their tokens' places in the row, L being the longest example; ``mask``
    (M, 1, L, L) says who sees whom; ``back`` (T,) finds each token of the row in the flattened (M * L) grid.
    """

    examples: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]
    place: Tensor | None
    mask: Tensor | None
    back: Tensor | None

    @staticmethod
    def of(batch: Batch) -> SharedPromptLayout:
        responses: list[list[tuple[int, int]]] = [[] for _ in range(batch.n_examples)]
        spans = zip(batch.example.tolist(), batch.response_start.tolist(), batch.lengths.tolist(), strict=True)
        for owner, start, length in spans:
            responses[owner].append((start, length))
        prompts = zip(batch.prompt_start.tolist(), batch.prompt_length.tolist(), responses, strict=True)
        examples = tuple((start, length, tuple(spans)) for start, length, spans in prompts)
        sizes = [length + sum(n_tokens for _, n_tokens in spans) for _, length, spans in examples]
        longest = max(sizes)
        if longest > _SHORT_EXAMPLE:
            return SharedPromptLayout(examples, None, None, None)
        device = batch.token_ids.device
        size = torch.tensor(sizes, device=device)
        column = torch.arange(longest, device=device)
        inside = column < size[:, None]
        place = (batch.prompt_start[:, None] + column).masked_fill(~inside, 0)
        back = torch.nonzero(inside.flatten()).squeeze(1)
        # Segment 0 is the prompt, 1, 2, ... its responses; padding keeps 0 and is never read.
        segment = torch.zeros(len(examples), longest, dtype=torch.int64, device=device)
        for row, (start, _, spans) in enumerate(examples):
            for number, (begin, n_tokens) in enumerate(spans, start=1):
                segment[row, begin - start : begin - start + n_tokens] = number
        visible = (segment[:, None, :] == 0) | (segment[:, :, None] == segment[:, None, :])
        mask = visible & (column[None, :] <= column[:, None])
        return SharedPromptLayout(examples, place, mask[:, None], back)


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    dppo_layout: SharedPromptLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a flat row, example by example; without a layout it is transformers' SDPA.

    query (1, heads, T, head_dim); key and value (1, key-value heads, T, head_dim); returns (1, T, heads, head_dim).
    The prompt attends to itself causally; each response to the prompt and, causally, to itself.
    """
    if dppo_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **kwargs
        )
        return output, None
    if dppo_layout.place is not None:
        return _attend_together(query, key, value, dppo_layout, scaling, dropout), None
    return _attend_apart(query, key, value, dppo_layout, scaling, dropout), None


def _attend_together(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPromptLayout, scaling: float | None, dropout: float
) -> Tensor:
    """All examples in one call, padded to the longest."""
    assert layout.place is not None and layout.back is not None

    def grid(rows: Tensor) -> Tensor:
        # (1, heads, T, head_dim) -> (M, heads, L, head_dim)
        return rows[0].transpose(0, 1)[layout.place].transpose(1, 2)

    output = F.scaled_dot_product_attention(
        grid(query),
        grid(key),
        grid(value),
        attn_mask=layout.mask,
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).flatten(0, 1)[layout.back][None]


def _attend_apart(
    query: Tensor, key: Tensor, value: Tensor, layout: SharedPromptLayout, scaling: float | None, dropout: float
) -> Tensor:
    """One call for every prompt and every response: no padding at any length."""
    grouped = query.shape[1] != key.shape[1]
    parts: list[Tensor] = []
    for start, length, responses in layout.examples:
        prompt = slice(start, start + length)
        prompt_key, prompt_value = key[:, :, prompt], value[:, :, prompt]
        parts.append(
            F.scaled_dot_product_attention(
                query[:, :, prompt],
                prompt_key,
                prompt_value,
                is_causal=length > 1,
                scale=scaling,
                dropout_p=dropout,
                enable_gqa=grouped,
            )
        )
        for begin, n_tokens in responses:
            own = slice(begin, begin + n_tokens)
            # Lower-right causal: token i of the response sees the whole prompt and its own tokens up to i.
            mask = torch.ones(n_tokens, length + n_tokens, dtype=torch.bool, device=query.device).tril(length)
            parts.append(
                F.scaled_dot_product_attention(
                    query[:, :, own],
                    torch.cat([prompt_key, key[:, :, own]], dim=2),
                    torch.cat([prompt_value, value[:, :, own]], dim=2),
                    attn_mask=mask,
                    scale=scaling,
                    dropout_p=dropout,
                    enable_gqa=grouped,
                )
            )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def register_shared_prompt_attention() -> None:
    """Make ``attn_implementation=dppo_shared_prompt`` known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)
    AttentionMaskInterface.register(SHARED_PROMPT, sdpa_mask)


class ResponseScorer(nn.Module):
    """A causal LM that returns the log-prob of every response token of a ``Batch``."""

    def __init__(self, model: PreTrainedModel, packing: Literal["packed", "padded"]) -> None:
        super().__init__()
        self.model = model
        self.packing = packing
        if packing == "packed":
            register_shared_prompt_attention()
            self._base.set_attn_implementation(SHARED_PROMPT)

    @property
    def _base(self) -> PreTrainedModel:
        """The causal LM itself; adapters of PEFT live inside its layers."""
        peft = getattr(self.model, "get_base_model", None)
        base: PreTrainedModel = self.model if peft is None else peft()
        return base

    @property
    def head(self) -> nn.Linear:
        """The LM head (vocabulary, hidden)."""
        head = self._base.get_output_embeddings()
        if head is None:
            raise TypeError(f"{type(self._base).__name__} has no LM head")
        return cast("nn.Linear", head)

    @property
    def logit_cap(self) -> float | None:
        """Gemma 2 squashes its logits to cap * tanh(logits / cap)."""
        return getattr(self._base.config, "final_logit_softcapping", None)

    def forward(self, batch: Batch) -> ResponseLogps:
        """Token log-probs (N,) in fp32 for a batch on the model's device."""
        return ResponseLogps(
            tokens=self._log_probs(self.hidden(batch), batch.targets),
            lengths=batch.lengths,
            example=batch.example,
            roles=batch.roles,
            n_examples=batch.n_examples,
        )

    def hidden(self, batch: Batch) -> Tensor:
        """(N, hidden) final states at the places that predict the response tokens."""
        return self._packed(batch) if self.packing == "packed" else self._padded(batch)

    def _body(self, **inputs: Any) -> Tensor:
        hidden: Tensor = self._base.base_model(**inputs, use_cache=False).last_hidden_state
        return hidden

    def _packed(self, batch: Batch) -> Tensor:
        """(N, hidden) states that predict the response tokens, every prompt computed once."""
        # A 4-D mask is handed through as it is: it spares building a (T, T) mask that the layout makes needless.
        unused_mask = torch.zeros(1, 1, 1, 1, device=batch.token_ids.device)
        hidden = self._body(
            input_ids=batch.token_ids[None],
            position_ids=batch.positions[None],
            attention_mask=unused_mask,
            dppo_layout=SharedPromptLayout.of(batch),
        )
        return hidden[0, batch.predict_from]

    def _padded(self, batch: Batch) -> Tensor:
        """(N, hidden) states that predict the response tokens, one row per response, padded on the right."""
        rows = []
        for owner, start, length in zip(
            batch.example.tolist(), batch.response_start.tolist(), batch.lengths.tolist(), strict=True
        ):
            begin, n_prompt = int(batch.prompt_start[owner]), int(batch.prompt_length[owner])
            rows.append((batch.token_ids[begin : begin + n_prompt], batch.token_ids[start : start + length]))
        width = max(len(prompt) + len(response) for prompt, response in rows)
        token_ids = batch.token_ids.new_zeros(len(rows), width)
        mask = batch.token_ids.new_zeros(len(rows), width)
        take_row: list[int] = []
        take_place: list[int] = []
        for row, (prompt, response) in enumerate(rows):
            n_tokens = len(prompt) + len(response)
            token_ids[row, :n_tokens] = torch.cat([prompt, response])
            mask[row, :n_tokens] = 1
            take_row += [row] * len(response)
            take_place += range(len(prompt) - 1, n_tokens - 1)
        hidden = self._body(input_ids=token_ids, attention_mask=mask)
        return hidden[take_row, take_place]

    def _log_probs(self, hidden: Tensor, targets: Tensor) -> Tensor:
        """(N,) log-probs of ``targets`` (N,) from hidden states (N, hidden), never all logits at once."""
        head, cap = self.head, self.logit_cap
        chunk = max(1, _LOGITS_PER_CHUNK // head.weight.shape[0])
        if hidden.shape[0] <= chunk:
            return _token_log_probs(hidden, targets, head, cap)
        # Recomputing a chunk's logits in the backward pass costs one more head forward and saves the (N, V) tensor.
        parts = [
            checkpoint(_token_log_probs, part, wanted, head, cap, use_reentrant=False)
            for part, wanted in zip(hidden.split(chunk), targets.split(chunk), strict=True)
        ]
        return torch.cat(parts)


def _logits(hidden: Tensor, head: nn.Module, cap: float | None) -> Tensor:
    """(n, vocabulary) logits in fp32, or fp64 for a model in fp64."""
    logits: Tensor = head(hidden)
    if logits.dtype != torch.float64:
        logits = logits.float()
    return logits if cap is None else torch.tanh(logits / cap) * cap


def _token_log_probs(hidden: Tensor, targets: Tensor, head: nn.Module, cap: float | None) -> Tensor:
    logits = _logits(hidden, head, cap)
    picked = logits.gather(-1, targets[:, None]).squeeze(-1)
    return picked - torch.logsumexp(logits, dim=-1)


def response_log_softmax(scorer: ResponseScorer, batch: Batch) -> Iterator[Tensor]:
    """fp32 log-probs of the whole vocabulary at every response position, a chunk (positions, vocabulary) at a time."""
    hidden = scorer.hidden(batch)
    head = scorer.head
    for part in hidden.split(max(1, _LOGITS_PER_CHUNK // head.weight.shape[0])):
        yield torch.log_softmax(_logits(part, head, scorer.logit_cap), dim=-1)
