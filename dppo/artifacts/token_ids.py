"""Token ids of tokenised texts in the cache, read from files that are mapped to memory.

The processes of a machine share the pages of such a file, and a process has in memory what it looks at.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from dppo.artifacts import manifest as manifests
from dppo.artifacts.stores import SafetensorsRows, packed

# A smaller file is read: a mapping holds an open file, of which a process may have a thousand.
_MAPPED_FROM = 2**18  # bytes
_HASH_DIGITS = 32
_DTYPES = {"U8": "u1", "U16": "<u2", "U32": "<u4", "I64": "<i8"}


class TokenIds(Sequence[int]):
    """A part of a long row of token ids; like a tuple of ints in all that can be asked of it, equality and hash too."""

    __slots__ = ("_start", "_stop", "_values")

    def __init__(self, values: npt.NDArray[Any], start: int, stop: int) -> None:
        self._values, self._start, self._stop = values, start, stop

    def __len__(self) -> int:
        return self._stop - self._start

    @overload
    def __getitem__(self, place: int) -> int: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[int]: ...

    def __getitem__(self, place: int | slice) -> int | Sequence[int]:
        if isinstance(place, slice):
            start, stop, step = place.indices(len(self))
            if step != 1:
                return tuple(self)[place]
            return TokenIds(self._values, self._start + start, self._start + max(start, stop))
        if not -len(self) <= place < len(self):
            raise IndexError(f"{place} is not a place of {len(self)} token ids")
        return int(self._values[self._start + place if place >= 0 else self._stop + place])

    def __iter__(self) -> Iterator[int]:
        return iter(self._values[self._start : self._stop].tolist())

    def __eq__(self, other: object) -> bool:
        if isinstance(other, TokenIds):
            return bool(np.array_equal(self.__array__(), other.__array__()))
        return tuple(self) == other if isinstance(other, tuple) else NotImplemented

    def __hash__(self) -> int:
        return hash(tuple(self))

    def __repr__(self) -> str:
        return repr(tuple(self))

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        return np.array(self._values[self._start : self._stop], dtype=dtype, copy=copy)


@dataclass(frozen=True, slots=True)
class IdRow:
    """The ids of a prompt and of the answers to it, or why there are none.

    ``sequences`` are the prompt and behind it the answers, ``hashes`` as many times 32 hexadecimal digits. With a
    ``refusal`` both are empty.
    """

    sequences: tuple[Sequence[int], ...]
    hashes: tuple[str, ...]
    refusal: str | None = None


class IdRows(SafetensorsRows):
    """One ``IdRow`` a row: all sequences end to end in safetensors, with their lengths and hashes."""

    kind: manifests.Kind = "token ids"

    def encode(self, rows: Mapping[str, IdRow]) -> bytes:
        from safetensors.numpy import save

        sequences = [sequence for row in rows.values() for sequence in row.sequences]
        values = np.fromiter(itertools.chain.from_iterable(sequences), np.int64, count=sum(map(len, sequences)))
        if len(values) and not 0 <= values.min() <= values.max() < 2**32:
            raise ValueError("token ids must be at least 0 and below 2**32")
        return save(
            {
                "keys": packed(list(rows)),
                "refusals": packed({key: row.refusal for key, row in rows.items() if row.refusal is not None}),
                "counts": np.array([len(row.sequences) for row in rows.values()], np.int64),
                "lengths": np.array([len(sequence) for sequence in sequences], np.int64),
                "hashes": np.frombuffer(
                    bytes.fromhex("".join(one for row in rows.values() for one in row.hashes)), "u1"
                ),
                "values": values.astype(np.uint16 if not len(values) or values.max() < 2**16 else np.uint32),
            }
        )

    def rows(self, path: Path, indices: Sequence[int]) -> list[IdRow]:
        tensors = _tensors(path)
        values, hashes = tensors["values"], tensors["hashes"].tobytes().hex()
        keys: list[str] = json.loads(tensors["keys"].tobytes())
        refusals: dict[str, str] = json.loads(tensors["refusals"].tobytes())
        bounds = [0, *np.cumsum(tensors["lengths"]).tolist()]
        places = [0, *np.cumsum(tensors["counts"]).tolist()]
        return [
            IdRow(
                tuple(TokenIds(values, bounds[at], bounds[at + 1]) for at in range(places[index], places[index + 1])),
                tuple(
                    hashes[at : at + _HASH_DIGITS]
                    for at in range(places[index] * _HASH_DIGITS, places[index + 1] * _HASH_DIGITS, _HASH_DIGITS)
                ),
                refusals.get(keys[index]) if places[index] == places[index + 1] else None,
            )
            for index in indices
        ]


def _tensors(path: Path) -> dict[str, npt.NDArray[Any]]:
    """The tensors of a safetensors file, mapped to memory; safetensors' own reader copies what it gives to numpy.

    The file is 8 bytes with the size of the header, the header in JSON, and the bytes of the tensors.
    """
    small = path.stat().st_size < _MAPPED_FROM
    whole: npt.NDArray[np.uint8] = np.fromfile(path, np.uint8) if small else np.memmap(path, np.uint8, mode="r")
    after = 8 + int(whole[:8].view("<u8")[0])
    header = json.loads(whole[8:after].tobytes())
    # Views of an ordinary array are cheaper than of a memmap, and keep the mapping alive just as well.
    plain = whole.view(np.ndarray)
    return {
        name: plain[after + found["data_offsets"][0] : after + found["data_offsets"][1]].view(_DTYPES[found["dtype"]])
        for name, found in header.items()
        if name != "__metadata__"
    }
