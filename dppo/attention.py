"""Attention over the packed layout: every response sees its prompt and, causally, itself.

A flat row holds several examples, each a prompt once and its responses behind it. The attention function is
registered with transformers and gets the layout of the row from the scorer in ``dppo.logps``. Two kernels with the
same numbers: ``sdpa`` calls torch's scaled_dot_product_attention for parts of the row, ``flex`` runs FlexAttention
once over the whole row with a block mask.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dppo.types import Batch

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

Kernel = Literal["sdpa", "flex"]

SHARED_PROMPT = "dppo_shared_prompt"
# The same for compiled layers: it stays out of their code, which would be made anew for other lengths.
BESIDE_COMPILED = "dppo_shared_prompt_beside_compiled"
# Up to this length all examples of a row share one attention call, padded to the longest: one call for many short
# examples beats many small calls. Beyond it the padding costs more than the calls, and each response has its own.
_SHORT_EXAMPLE = 96
# FlexAttention skips blocks of so many queries and keys.
_BLOCK = 128

# What models pass to an attention function beside its tensors that does not change its result. Anything else is
# refused, so that a model with another kind of attention is noticed and not computed wrongly.
_HARMLESS = frozenset({"position_ids", "cache_position", "use_cache", "output_attentions", "output_hidden_states"})


@dataclass(frozen=True)
class SharedPromptLayout:
    """Where the examples of a flat row are, for the attention function: one for all layers, with their masks.

    ``examples`` has for each example, in the row's order, its prompt's length and those of the responses behind it.
    ``blocks`` is set for FlexAttention, ``grid`` where all examples are short enough to share one call of torch's own.
    ``windows`` collects the sizes of local attention that the layers ask for; None stands for full attention.
    """

    examples: tuple[tuple[int, tuple[int, ...]], ...]
    grid: Grid | None = None
    blocks: Blocks | None = None
    windows: set[int | None] = field(default_factory=set)
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    @staticmethod
    def of(batch: Batch, kernel: Kernel) -> SharedPromptLayout:
        responses: list[list[int]] = [[] for _ in range(batch.n_examples)]
        for owner, n_tokens in zip(batch.example.tolist(), batch.lengths.tolist(), strict=True):
            responses[owner].append(n_tokens)
        examples = tuple(zip(batch.prompt_length.tolist(), map(tuple, responses), strict=True))
        if kernel == "flex":
            return SharedPromptLayout(examples, blocks=Blocks.of(examples, batch.positions))
        sizes = [n_prompt + sum(own) for n_prompt, own in examples]
        longest = max(sizes)
        if longest > _SHORT_EXAMPLE:
            return SharedPromptLayout(examples)
        device = batch.token_ids.device
        size = torch.tensor(sizes, device=device)
        column = torch.arange(longest, device=device)
        inside = column < size[:, None]
        place = (batch.prompt_start[:, None] + column).masked_fill(~inside, 0)
        # Padding keeps 0 and is never read.
        segment = _owners(examples)[1].to(device)[place].masked_fill(~inside, 0)
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

    @property
    def segments(self) -> list[int]:
        """The lengths of the row's prompts and responses, one behind the other."""
        return [length for n_prompt, responses in self.examples for length in (n_prompt, *responses)]

    def mask(self, n_queries: int, n_keys: int, window: int | None, like: Tensor) -> Tensor | None:
        """(n_queries, n_keys) to be added to the scores of queries that are the last of the keys.

        Query i sees all keys before the queries' own and its own up to i; with ``window`` so many at most. None where
        that is what a causal call without a mask computes, or everything.
        """
        if window is not None and window >= n_keys:
            window = None
        if window is None and (n_queries == 1 or n_queries == n_keys):
            return None
        key = (n_queries, n_keys, window)
        if key not in self._masks:
            seen = torch.ones(n_queries, n_keys, dtype=torch.bool, device=like.device).tril(n_keys - n_queries)
            if window is not None:
                seen = seen.triu(n_keys - n_queries - window + 1)
            self._masks[key] = _added(seen, like)
        return self._masks[key]


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
    _masks: dict[int | None, Tensor] = field(default_factory=dict)  # by sliding window, made on first use

    def mask(self, window: int | None, like: Tensor) -> Tensor:
        """(M, 1, L, L) to be added to the scores; a token sees the last ``window`` positions, its own included."""
        if window not in self._masks:
            visible = self.visible
            if window is not None:
                visible = visible & (self.position[:, :, None] - self.position[:, None, :] < window)
            self._masks[window] = _added(visible[:, None], like)
        return self._masks[window]


def _owners(examples: tuple[tuple[int, tuple[int, ...]], ...]) -> Tensor:
    """(2, T): each token's example, and its segment of it: 0 is the prompt, 1, 2, ... are its responses."""
    owner: list[int] = []
    segment: list[int] = []
    lengths: list[int] = []
    for number, (n_prompt, responses) in enumerate(examples):
        owner += [number] * (1 + len(responses))
        segment += range(1 + len(responses))
        lengths += [n_prompt, *responses]
    told = torch.tensor([owner, segment], dtype=torch.int32)
    return told.repeat_interleave(torch.tensor(lengths), dim=1)


def _added(seen: Tensor, like: Tensor) -> Tensor:
    """0 where ``seen``, else minus infinity: torch would make it anew from a boolean mask in every call."""
    return torch.zeros(seen.shape, dtype=like.dtype, device=like.device).masked_fill_(~seen, -torch.inf)


@dataclass(frozen=True)
class Blocks:
    """What FlexAttention is told of a flat row: each token's example, segment of it and position, all (T,).

    Segment 0 is the prompt, 1, 2, ... are its responses.
    """

    example: Tensor
    segment: Tensor
    position: Tensor
    _masks: dict[int | None, BlockMask] = field(default_factory=dict)  # by sliding window, made on first use

    @staticmethod
    def of(examples: tuple[tuple[int, tuple[int, ...]], ...], position: Tensor) -> Blocks:
        whole = _owners(examples).to(position.device)
        return Blocks(whole[0], whole[1], position.to(torch.int32))

    def visible(self, window: int | None) -> Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]:
        """Whether a query sees a key, from their places in the row, as FlexAttention asks it."""
        example, segment, position = self.example, self.segment, self.position

        def seen(row: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
            own = (segment[key] == 0) | (segment[key] == segment[query])
            found = (example[key] == example[query]) & own & (key <= query)
            return found if window is None else found & (position[query] - position[key] < window)

        return seen

    def mask(self, window: int | None) -> BlockMask:
        """The blocks of the (T, T) scores that are computed; a token sees the last ``window`` positions.

        Made a stripe of queries at a time: torch's own way holds several (T, T) tensors.
        """
        if window not in self._masks:
            from torch.nn.attention.flex_attention import BlockMask

            size, n_tokens = _BLOCK, len(self.position)
            n_blocks = -(-n_tokens // size)
            visible, place = self.visible(window), torch.arange(n_tokens, device=self.position.device)
            counts = []
            for stripe in place.split(size):
                seen = visible(place, place, stripe[:, None], place[None, :]).sum(0, dtype=torch.int32)
                counts.append(F.pad(seen, (0, n_blocks * size - n_tokens)).view(n_blocks, size).sum(1))
            count = torch.stack(counts)
            full = count == size * size
            self._masks[window] = BlockMask.from_kv_blocks(
                *_listed((count > 0) & ~full),
                *_listed(full),
                BLOCK_SIZE=size,
                mask_mod=visible,
                seq_lengths=(n_tokens, n_tokens),
            )
        return self._masks[window]


def _listed(wanted: Tensor) -> tuple[Tensor, Tensor]:
    """How many blocks of each row (B, B) are wanted, (1, 1, B), and which, those first, (1, 1, B, B)."""
    number = wanted.sum(1, dtype=torch.int32)
    order = wanted.to(torch.int32).argsort(dim=1, descending=True, stable=True).to(torch.int32)
    return number[None, None], order[None, None].contiguous()


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
    dppo_layout.windows.add(sliding_window)
    if dppo_layout.blocks is not None and dropout:
        raise TypeError("FlexAttention has no dropout")
    options = {"scale": scaling, "dropout_p": dropout, "enable_gqa": query.shape[1] != key.shape[1]}
    # Under autocast the projections give bf16; a rotation in fp32 raises queries and keys again.
    dtype = value.dtype
    # On CPUs the backward pass of attention in bf16 takes three times that in fp32.
    computed = torch.float32 if dtype == torch.bfloat16 and query.device.type == "cpu" else dtype
    query, key, value = query.to(computed), key.to(computed), value.to(computed)
    with torch.autocast(query.device.type, enabled=False):
        if dppo_layout.blocks is not None:
            output = _attend_in_blocks(query, key, value, dppo_layout.blocks, sliding_window, scaling)
        elif dppo_layout.grid is not None:
            output = _attend_together(query, key, value, dppo_layout.grid, sliding_window, options)
        else:
            output = _attend_apart(query, key, value, dppo_layout, sliding_window, options)
    return output.to(dtype), None


def _attend_together(
    query: Tensor, key: Tensor, value: Tensor, grid: Grid, window: int | None, options: dict[str, Any]
) -> Tensor:
    """All examples in one call, padded to the longest."""

    def rows(flat: Tensor) -> Tensor:
        # (1, heads, T, head_dim) -> (M, heads, L, head_dim)
        # index_select: its backward pass is cheaper than that of indexing.
        taken = flat[0].transpose(0, 1).index_select(0, grid.place.flatten())
        return taken.view(*grid.place.shape, *taken.shape[1:]).transpose(1, 2)

    output = F.scaled_dot_product_attention(
        rows(query), rows(key), rows(value), attn_mask=grid.mask(window, query), **options
    )
    return output.transpose(1, 2).flatten(0, 1).index_select(0, grid.back)[None]


def _attend_apart(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SharedPromptLayout,
    window: int | None,
    options: dict[str, Any],
) -> Tensor:
    """One call for every prompt and every response: no padding at any length."""
    # One split: the backward pass of a slice fills a tensor as long as the whole row.
    queries, keys, values = (iter(flat.split(layout.segments, dim=2)) for flat in (query, key, value))
    parts: list[Tensor] = []

    def attend(own: Tensor, seen: Tensor, read: Tensor) -> None:
        mask = layout.mask(own.shape[2], seen.shape[2], window, own)
        causal = mask is None and own.shape[2] > 1
        found = F.scaled_dot_product_attention(own, seen, read, attn_mask=mask, is_causal=causal, **options)
        parts.append(found.transpose(1, 2))

    for _, responses in layout.examples:
        prompt_key, prompt_value = next(keys), next(values)
        attend(next(queries), prompt_key, prompt_value)
        for _ in responses:
            own_key, own_value = next(keys), next(values)
            attend(next(queries), torch.cat([prompt_key, own_key], 2), torch.cat([prompt_value, own_value], 2))
    return torch.cat(parts, dim=1)


def _attend_in_blocks(
    query: Tensor, key: Tensor, value: Tensor, blocks: Blocks, window: int | None, scaling: float | None
) -> Tensor:
    """One call for the whole row."""
    attend = _flex_attention(compiled=query.device.type == "cuda")
    grouped = query.shape[1] != key.shape[1]
    output = attend(query, key, value, block_mask=blocks.mask(window), scale=scaling, enable_gqa=grouped)
    return output.transpose(1, 2)


@cache
def _flex_attention(*, compiled: bool) -> Callable[..., Tensor]:
    from torch.nn.attention.flex_attention import flex_attention

    attend = cast("Callable[..., Tensor]", flex_attention)
    # Rows differ in length: one kernel for all lengths.
    return torch.compile(attend, dynamic=True) if compiled else attend


def register_shared_prompt_attention(*, beside_compiled: bool = False) -> None:
    """Make ``SHARED_PROMPT`` known to transformers as an attention implementation, or ``BESIDE_COMPILED``."""
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

    name, attend = SHARED_PROMPT, shared_prompt_attention
    if beside_compiled:
        name, attend = BESIDE_COMPILED, torch.compiler.disable(shared_prompt_attention)
    AttentionInterface.register(name, attend)
    AttentionMaskInterface.register(name, sdpa_mask)
