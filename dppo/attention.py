"""Attention over the packed layout: every response sees its prompt and, causally, itself.

A flat row holds several examples, each a prompt once and its responses behind it. The attention function is
registered with transformers and gets the layout of the row from the scorer in ``dppo.logps``.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dppo.types import Batch

SHARED_PROMPT = "dppo_shared_prompt"
# Up to this length all examples of a row share one attention call, padded to the longest: one call for many short
# examples beats many small calls. Beyond it the padding costs more than the calls, and each response has its own.
_SHORT_EXAMPLE = 192

# What models pass to an attention function beside its tensors that does not change its result. Anything else is
# refused, so that a model with another kind of attention is noticed and not computed wrongly.
_HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"})


@dataclass(frozen=True)
class SharedPromptLayout:
    """Where the examples of a flat row begin, for the attention function.

    ``examples`` has for each example (prompt start, prompt length, ((response start, length), ...)). ``grid`` is set
    where all examples are short enough to share one attention call.
    """

    examples: tuple[tuple[int, int, tuple[tuple[int, int], ...]], ...]
    grid: Grid | None

    @staticmethod
    def of(batch: Batch) -> SharedPromptLayout:
        responses: list[list[tuple[int, int]]] = [[] for _ in range(batch.n_examples)]
        spans = zip(batch.example.tolist(), batch.response_start.tolist(), batch.lengths.tolist(), strict=True)
        for owner, start, n_tokens in spans:
            responses[owner].append((start, n_tokens))
        prompts = zip(batch.prompt_start.tolist(), batch.prompt_length.tolist(), responses, strict=True)
        examples = tuple((start, n_prompt, tuple(own)) for start, n_prompt, own in prompts)
        sizes = [n_prompt + sum(n_tokens for _, n_tokens in own) for _, n_prompt, own in examples]
        longest = max(sizes)
        if longest > _SHORT_EXAMPLE:
            return SharedPromptLayout(examples, None)
        device = batch.token_ids.device
        size = torch.tensor(sizes, device=device)
        column = torch.arange(longest, device=device)
        inside = column < size[:, None]
        place = (batch.prompt_start[:, None] + column).masked_fill(~inside, 0)
        # Segment 0 is the prompt, 1, 2, ... its responses; padding keeps 0 and is never read.
        flat: list[int] = []
        for _, n_prompt, own in examples:
            flat += [0] * n_prompt
            for number, (_, n_tokens) in enumerate(own, start=1):
                flat += [number] * n_tokens
        segment = torch.tensor(flat, device=device)[place].masked_fill(~inside, 0)
        visible = (segment[:, None, :] == 0) | (segment[:, :, None] == segment[:, None, :])
        return SharedPromptLayout(
            examples,
            Grid(
                place=place,
                back=torch.nonzero(inside.flatten()).squeeze(1),
                position=batch.positions[place],
                visible=visible & (column[None, :] <= column[:, None]),
            ),
        )


@dataclass(frozen=True)
class Grid:
    """A flat row's M examples as rows of L columns, L being the longest example.

    ``place`` (M, L) holds their tokens' places in the flat row, ``position`` (M, L) their position ids, ``visible``
    (M, L, L) says who sees whom; ``back`` (T,) finds each token of the flat row in the flattened (M * L) grid.
    """

    place: Tensor
    back: Tensor
    position: Tensor
    visible: Tensor
    masks: dict[int | None, Tensor] = field(default_factory=dict)  # by sliding window, made on first use

    def mask(self, window: int | None) -> Tensor:
        """(M, 1, L, L) who sees whom when a token sees the last ``window`` positions only, its own included."""
        if window not in self.masks:
            visible = self.visible
            if window is not None:
                visible = visible & (self.position[:, :, None] - self.position[:, None, :] < window)
            self.masks[window] = visible[:, None]
        return self.masks[window]


def shared_prompt_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    dppo_layout: SharedPromptLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Attention over a flat row, example by example; without a layout it is transformers' SDPA.

    query (1, heads, T, head_dim); key and value (1, key-value heads, T, head_dim); returns (1, T, heads, head_dim).
    The prompt attends to itself causally; each response to the prompt and, causally, to itself; a layer with a
    ``sliding_window`` to so many positions back. Raises TypeError if the model asks for anything else, for instance
    capped attention scores or a bias.
    """
    asked = [name for name, option in kwargs.items() if name not in _HARMLESS and option is not None]
    if asked:
        raise TypeError(f"the packed layout does not know attention with {', '.join(asked)}")
    if dppo_layout is None:
        from transformers.integrations.sdpa_attention import sdpa_attention_forward

        output, _ = sdpa_attention_forward(module, query, key, value, attention_mask, dropout=dropout, scaling=scaling)
        return output, None
    if attention_mask is None or attention_mask.shape != (1, 1, 1, 1):
        raise TypeError("the packed layout does not know attention with a mask of the model's own")
    if dppo_layout.grid is not None:
        return _attend_together(query, key, value, dppo_layout.grid, sliding_window, scaling, dropout), None
    return _attend_apart(query, key, value, dppo_layout, sliding_window, scaling, dropout), None


def _attend_together(
    query: Tensor, key: Tensor, value: Tensor, grid: Grid, window: int | None, scaling: float | None, dropout: float
) -> Tensor:
    """All examples in one call, padded to the longest."""

    def rows(flat: Tensor) -> Tensor:
        # (1, heads, T, head_dim) -> (M, heads, L, head_dim)
        # index_select: its backward pass is cheaper than that of indexing.
        taken = flat[0].transpose(0, 1).index_select(0, grid.place.flatten())
        return taken.view(*grid.place.shape, *taken.shape[1:]).transpose(1, 2)

    output = F.scaled_dot_product_attention(
        rows(query),
        rows(key),
        rows(value),
        attn_mask=grid.mask(window),
        scale=scaling,
        dropout_p=dropout,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    return output.transpose(1, 2).flatten(0, 1).index_select(0, grid.back)[None]


def _attend_apart(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SharedPromptLayout,
    window: int | None,
    scaling: float | None,
    dropout: float,
) -> Tensor:
    """One call for every prompt and every response: no padding at any length."""
    grouped = query.shape[1] != key.shape[1]

    def attend(own: slice, keys: Tensor, values: Tensor) -> Tensor:
        # The queries are the last of the keys: token i of n sees all before them and its own up to i.
        n_queries, n_keys = own.stop - own.start, keys.shape[2]
        local = window is not None and window < n_keys
        mask = None
        if local or 1 < n_queries < n_keys:
            mask = torch.ones(n_queries, n_keys, dtype=torch.bool, device=keys.device).tril(n_keys - n_queries)
            if window is not None and local:
                mask = mask.triu(n_keys - n_queries - window + 1)
        return F.scaled_dot_product_attention(
            query[:, :, own],
            keys,
            values,
            attn_mask=mask,
            is_causal=mask is None and n_queries > 1,
            scale=scaling,
            dropout_p=dropout,
            enable_gqa=grouped,
        )

    parts: list[Tensor] = []
    for start, length, responses in layout.examples:
        prompt = slice(start, start + length)
        prompt_key, prompt_value = key[:, :, prompt], value[:, :, prompt]
        parts.append(attend(prompt, prompt_key, prompt_value))
        for begin, n_tokens in responses:
            own = slice(begin, begin + n_tokens)
            parts.append(
                attend(
                    own,
                    torch.cat([prompt_key, key[:, :, own]], dim=2),
                    torch.cat([prompt_value, value[:, :, own]], dim=2),
                )
            )
    return torch.cat(parts, dim=2).transpose(1, 2).contiguous()


def register_shared_prompt_attention() -> None:
    """Make ``attn_implementation=dppo_shared_prompt`` known to transformers."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    AttentionInterface.register(SHARED_PROMPT, shared_prompt_attention)
    AttentionMaskInterface.register(SHARED_PROMPT, sdpa_mask)
