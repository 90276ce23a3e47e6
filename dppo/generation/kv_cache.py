"""Keys and values of what was read and written, in buffers with room for what comes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PretrainedConfig
from transformers.cache_utils import DynamicLayer

# Room for so many tokens more when a buffer is full: a longer buffer is copied once in so many steps.
_ROOM = 64


def roomy_cache(config: PretrainedConfig) -> DynamicCache:
    """The cache that a model decodes with; layers that keep everything do not copy it for every token."""
    cache = DynamicCache(config=config)
    # Layers that keep a window only, or states of another kind, stay as they are.
    make: Callable[[], DynamicLayer] = RoomyLayer
    cache.layers = [make() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def can_be_joined(cache: DynamicCache) -> bool:
    """Whether all layers keep everything; one that keeps a window only, or another state, cannot be moved."""
    return all(type(layer) is RoomyLayer for layer in cache.layers)


def joined(caches: Sequence[DynamicCache], places: Tensor) -> DynamicCache:
    """One cache of the rows of several, each padded on the left to the longest; row i becomes row ``places[i]``."""
    whole = caches[0]
    for layer, *others in zip(*(cache.layers for cache in caches), strict=True):
        layer.join(others, places)
    return whole


class RoomyLayer(DynamicLayer):
    """Keys and values (rows, heads, tokens, head_dim), views of buffers that have room for more tokens.

    Under autocast they are kept in its precision, into which attention would cast all of them in every step.
    """

    _buffers: tuple[Tensor, ...] | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Write (rows, heads, new tokens, head_dim) behind what is there, and return everything."""
        device = key_states.device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            key_states, value_states = key_states.to(dtype), value_states.to(dtype)
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        n_old = self.get_seq_length()
        n_all = n_old + key_states.shape[2]
        if self._buffers is None or n_all > self._buffers[0].shape[2]:
            longer = tuple(_roomy(new, len(new), new.shape[1], n_all) for new in (key_states, value_states))
            if n_old and self._buffers is not None:
                for buffer, old in zip(longer, self._buffers, strict=True):
                    buffer[:, :, :n_old] = old[:, :, :n_old]
            self._buffers = longer
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[:, :, n_old:n_all] = new
        return self._show(n_all)

    def batch_select_indices(self, indices: Tensor) -> None:
        """Go on with these rows, in this order."""
        if self._buffers is None:
            return
        n_tokens = self.get_seq_length()
        selected = tuple(_roomy(old, len(indices), old.shape[1], n_tokens) for old in self._buffers)
        for buffer, old in zip(selected, self._buffers, strict=True):
            buffer[:, :, :n_tokens] = old[indices, :, :n_tokens]
        self._buffers = selected
        self._show(n_tokens)

    def join(self, others: Sequence[RoomyLayer], places: Tensor) -> None:
        """Go on with its own rows and those of other layers behind them, each at its place of these."""
        parts = [(layer.get_seq_length(), layer._buffers) for layer in (self, *others)]
        if self._buffers is None:  # a layer that uses the states of another one
            return
        n_tokens = max(n_own for n_own, _ in parts)
        whole = tuple(_roomy(old, len(places), old.shape[1], n_tokens) for old in self._buffers)
        first = 0
        for n_own, buffers in parts:
            assert buffers is not None  # the same layer of the same model
            n_rows = len(buffers[0])
            into = places[first : first + n_rows]
            for buffer, old in zip(whole, buffers, strict=True):
                buffer[into, :, n_tokens - n_own : n_tokens] = old[:, :, :n_own]
                # No attention is paid to padding, but nothing times what is not a number is not a number.
                buffer[into, :, : n_tokens - n_own] = 0
            first += n_rows
        self._buffers = whole
        self._show(n_tokens)

    def _show(self, n_tokens: int) -> tuple[Tensor, Tensor]:
        assert self._buffers is not None
        keys, values = (buffer[:, :, :n_tokens] for buffer in self._buffers)
        self.keys, self.values = keys, values
        return keys, values


def _roomy(like: Tensor, n_rows: int, n_heads: int, n_tokens: int) -> Tensor:
    """An empty buffer for states such as these and some tokens more than ``n_tokens``."""
    return like.new_empty(n_rows, n_heads, n_tokens + _ROOM, like.shape[-1])
