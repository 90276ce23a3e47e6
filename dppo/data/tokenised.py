"""Tokenised examples in the cache: what one process has tokenised the others of the machine map to memory.

Ids are stored whole, by the text they are made from: limits cut them when they are used, and the subsets, splits,
seeds and losses of a data set share one store. It can be made again at any time, so no run refers to it, and
``python -m dppo.cache gc`` drops it an hour after its last use.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dppo.artifacts import Cache, IdRow, MissingRows, ReadOnly, Store, short
from dppo.data.ids import ID_DIGITS
from dppo.progress import Progress
from dppo.types import Json, PreferenceExample

STAGE = "tokens"
# Fewer characters are tokenised faster than their ids are committed to a disk.
_LEAST = 2**15
# A shard holds the ids of so many, about ten million: what is in memory while it is made, and what a kill can cost.
_PER_SHARD = 2**25

Tokenise = Callable[[Sequence[PreferenceExample]], Sequence[IdRow]]

_log = logging.getLogger("dppo")


@dataclass(frozen=True)
class Tokenised:
    """The stores of one data set's tokenised examples, one for each tokenizer and template.

    ``dataset`` is the data set's identity: it keeps data sets apart, so that a run reads no more than its own.
    """

    cache: Cache
    dataset: Json

    def store(self, encoder: Json) -> Store[IdRow]:
        """The store of an encoder, by everything that decides what ids a text gets."""
        return self.cache.id_store(STAGE, {"encoder": encoder, "dataset": self.dataset})

    def rows(self, encoder: Json, examples: Sequence[PreferenceExample], tokenise: Tokenise) -> list[IdRow]:
        """The row of every example; those that the cache lacks are made by ``tokenise`` and kept, unless they are few.

        One of the processes that want the same rows makes them, the others wait. In a ``ReadOnly`` cache nothing is
        kept. Raises UserError if the disk is full or not writable.
        """
        store = self.store(encoder)
        keys = list(map(text_hash, examples))
        by_key = dict(zip(keys, examples, strict=True))
        missing = store.missing(keys)
        if sum(_n_characters(by_key[key]) for key in missing) >= _LEAST and not isinstance(self.cache, ReadOnly):
            with store.lock(_log.info):
                self._add(store, {key: by_key[key] for key in store.missing(keys)}, tokenise)
            missing = []
        there = [key for key in by_key if key not in set(missing)]
        try:
            found = dict(zip(there, store.get(there), strict=True))
            if there and not isinstance(self.cache, ReadOnly):
                store.artifact(reused=True)  # gc is told that it was used
        except (MissingRows, OSError):  # gc was faster
            found, missing = {}, list(by_key)
        if missing:
            found |= zip(missing, tokenise([by_key[key] for key in missing]), strict=True)
        return [found[key] for key in keys]

    def _add(self, store: Store[IdRow], examples: dict[str, PreferenceExample], tokenise: Tokenise) -> None:
        if not examples:  # another process made them in the meantime
            return
        _log.info("build %-10s %s  %s examples, once", STAGE, short(store.fingerprint), f"{len(examples):,}")
        with Progress(STAGE, len(examples), "example") as progress:
            for keys in _parts(examples):
                rows = tokenise([examples[key] for key in keys])
                store.append(dict(zip(keys, rows, strict=True)))
                progress.advance(len(keys))


def text_hash(example: PreferenceExample) -> str:
    """32 hexadecimal digits of what is tokenised: the turns of the prompt and the answers, each in its place."""
    digest = hashlib.sha256()
    parts = [part for turn in example.prompt.messages for part in (turn.role, turn.content)]
    for part in (*parts, "", *(response.text for response in example.responses)):
        text = part.encode("utf-8", "surrogatepass")
        digest.update(b"%d:" % len(text))
        digest.update(text)
    return digest.hexdigest()[:ID_DIGITS]


def _parts(examples: dict[str, PreferenceExample]) -> Iterator[list[str]]:
    """The keys, in lists of about ``_PER_SHARD`` characters."""
    before = itertools.accumulate(map(_n_characters, examples.values()), initial=0)
    for _, group in itertools.groupby(zip(examples, before, strict=False), lambda one: one[1] // _PER_SHARD):
        yield [key for key, _ in group]


def _n_characters(example: PreferenceExample) -> int:
    answers = sum(len(response.text) for response in example.responses)
    return answers + sum(len(turn.content) for turn in example.prompt.messages)
