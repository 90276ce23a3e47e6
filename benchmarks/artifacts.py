"""What the cache costs: growing stores of 60,000 rows of about 200 tokens, and one artifact as large as a small model.

    python -m benchmarks.artifacts [--rows 60000] [--tokens 200] [--directory /tmp]

Prints seconds. Reading is measured in a new store object, as a new run would do it, with files in the page cache.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from dppo.artifacts import Build, Cache, Store

SHARD = 1024


@contextmanager
def timed(what: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    print(f"{what:<48} {time.perf_counter() - started:8.3f} s")


def measure_store(name: str, open_store: Callable[[], Store[Any]], rows: Mapping[str, Any]) -> None:
    keys = list(rows)
    with timed(f"{name}: append {len(rows)} rows in shards of {SHARD}"):
        store = open_store()
        for start in range(0, len(keys), SHARD):
            store.append({key: rows[key] for key in keys[start : start + SHARD]})
    with timed(f"{name}: open, hash all, look for missing rows"):
        store = open_store()
        assert store.missing(keys) == []
    with timed(f"{name}: get an eighth of the rows"):
        assert len(store.get(keys[::8])) == len(keys[::8])
    with timed(f"{name}: get all rows"):
        assert len(store.get(keys)) == len(keys)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=60_000)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--directory", type=Path, default=None)
    arguments = parser.parse_args()
    rng = np.random.default_rng(0)
    keys = [hashlib.sha256(str(number).encode()).hexdigest() for number in range(arguments.rows)]
    lengths = rng.integers(arguments.tokens // 2, arguments.tokens * 3 // 2, arguments.rows)
    root = Path(tempfile.mkdtemp(dir=arguments.directory))
    try:
        cache = Cache(root)
        logps = {key: -rng.random(length, np.float32) for key, length in zip(keys, lengths, strict=True)}
        measure_store("log-probs", lambda: cache.token_store("reference", {"version": 1}), logps)
        answers = {
            key: {"text": "word " * int(length), "token_ids": rng.integers(0, 50_000, length).tolist()}
            for key, length in zip(keys, lengths, strict=True)
        }
        measure_store("answers", lambda: cache.json_store("generate", {"version": 1}), answers)

        def write(build: Build) -> None:
            (build.directory / "model.safetensors").write_bytes(bytes(269_000_000))

        slot = cache.artifact("sft", {"version": 1})
        with timed("artifact of 269 MB: write"), slot.building() as build:
            write(build)
            wrote = time.perf_counter()
        print(f"{'  of which hashes, fsync, rename':<48} {time.perf_counter() - wrote:8.3f} s")
        with timed("artifact of 269 MB: reuse"):
            assert slot.complete()
        with timed("artifact of 269 MB: reuse, every byte verified"):
            assert Cache(root, verify=True).artifact("sft", {"version": 1}).complete()
    finally:
        shutil.rmtree(root)


if __name__ == "__main__":
    main()
