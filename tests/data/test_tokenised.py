"""Tokenised examples in the cache: what comes back is what was tokenised, whatever happened to the files."""

from __future__ import annotations

import logging
import mmap
import resource
import signal
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dppo import cache as cache_command
from dppo.artifacts import Cache, IdRow, ReadOnly
from dppo.artifacts.token_ids import TokenIds
from dppo.data import encoding
from dppo.data.encoding import ChatEncoder, EncodedSet, response_id
from dppo.data.kept import Kept
from dppo.data.tiny_tokenizer import build_tokenizer
from dppo.data.tokenised import STAGE, Tokenised, text_hash
from dppo.errors import UserError
from dppo.types import PreferenceExample
from tests.conftest import outside
from tests.data.chat_models import gemma, llama3
from tests.data.test_encoding import example, pair

DATASET = {"dataset": "test"}
WORDS = [
    "the",
    "red",
    "fox",
    "ran",
    "over",
    "a",
    "blue",
    "hill",
    "and",
    "saw",
    "many",
    "green",
    "trees",
    "near",
    "stone",
]


def pairs(n: int, first: int = 0) -> list[PreferenceExample]:
    """Pairs of about 400 characters whose lengths differ."""

    def text(seed: int, n_words: int) -> str:
        return " ".join(WORDS[(seed * 7 + place * place) % len(WORDS)] for place in range(n_words))

    return [
        pair(f"{at} {text(at, 20 + at % 9)}?", text(at + 1, 20 + at % 13), text(at + 2, 25 + at % 5) + ".")
        for at in range(first, first + n)
    ]


@pytest.fixture(autouse=True)
def _a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    forget(monkeypatch)


def forget(monkeypatch: pytest.MonkeyPatch) -> None:
    """What this process keeps of earlier calls is no part of these tests."""
    monkeypatch.setattr(encoding, "_encoded", Kept[EncodedSet](8))


def kept_in(root: Path, tokenizer: PreTrainedTokenizerFast | None = None) -> ChatEncoder:
    return ChatEncoder(tokenizer or build_tokenizer(), Tokenised(Cache(root), DATASET))


def shards(root: Path) -> list[Path]:
    return sorted(root.glob(f"{STAGE}/*/shards/*"))


def no_tokenising(examples: Sequence[PreferenceExample]) -> list[IdRow]:
    raise AssertionError(f"{len(examples)} examples are tokenised again")


# --- ids in files -----------------------------------------------------------------------------------------------------

IDS = st.lists(st.integers(0, 2**16 - 1), max_size=12)


@given(
    before=IDS,
    ids=IDS,
    after=IDS,
    start=st.integers(-15, 15),
    stop=st.integers(-15, 15),
    step=st.sampled_from([1, 2, -1]),
)
@settings(deadline=None)
def test_ids_of_a_file_are_like_a_tuple(
    before: list[int], ids: list[int], after: list[int], start: int, stop: int, step: int
) -> None:
    values = np.array([*before, *ids, *after], np.uint16)
    found, same = TokenIds(values, len(before), len(before) + len(ids)), tuple(ids)
    assert found == same and same == found
    assert found == TokenIds(np.array(ids, np.int64), 0, len(ids))
    assert hash(found) == hash(same) and repr(found) == repr(same)
    assert list(found) == ids and [type(one) for one in found] == [int] * len(ids)
    assert found[start:stop:step] == same[start:stop:step] and len(found[start:]) == len(same[start:])
    for place in range(-len(ids), len(ids)):
        assert found[place] == same[place]
    for place in (len(ids), -len(ids) - 1):
        with pytest.raises(IndexError):
            found[place]
    assert response_id(found) == response_id(same)
    assert found != (*same, 1) and found != list(same)
    assert found != TokenIds(np.array([*ids, 1], np.int64), 0, len(ids) + 1)


ROWS = st.lists(
    st.one_of(
        st.lists(st.lists(st.integers(0, 2**32 - 1), max_size=5), max_size=4).map(
            lambda found: IdRow(tuple(map(tuple, found)), tuple(map(response_id, found)))
        ),
        st.text(max_size=5).map(lambda said: IdRow((), (), said)),
    ),
    max_size=6,
)


@given(rows=ROWS)
@settings(deadline=None, max_examples=15)
def test_rows_come_back_as_they_were(rows: list[IdRow], tmp_path_factory: pytest.TempPathFactory) -> None:
    store = Cache(tmp_path_factory.mktemp("rows")).id_store(STAGE, {})
    keyed = {str(place): row for place, row in enumerate(rows)}
    store.append(keyed)
    for keys in (list(keyed), list(keyed)[::-2]):
        assert store.get(keys) == [keyed[key] for key in keys]


def test_a_large_shard_is_mapped_and_keeps_its_ids(tmp_path: Path) -> None:
    store = Cache(tmp_path).id_store(STAGE, {})
    long = tuple(place % 50_000 for place in range(200_000))
    store.append({"a": IdRow((long[:7], long), ("0" * 32, "1" * 32)), "b": IdRow(((1, 2),), ("2" * 32,))})
    (shard,) = (store.path / "shards").iterdir()
    assert shard.stat().st_size < 500_000  # two bytes an id
    first, second = store.get(["a", "b"])
    assert first.sequences == (long[:7], long) and second.sequences == ((1, 2),)
    base = np.array(first.sequences[1], copy=False).base
    assert base is not None and isinstance(getattr(base, "base", base), np.memmap | mmap.mmap)
    shard.unlink()  # as gc does: what is mapped stays
    assert first.sequences[1] == long


# --- what encode gives ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("limit", [None, "p95", 52])
def test_a_set_from_the_cache_equals_one_that_was_just_tokenised(
    limit: int | str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    examples = pairs(120)
    plain = ChatEncoder(build_tokenizer()).encode(examples, limit)
    for _ in range(2):
        forget(monkeypatch)
        found = kept_in(tmp_path).encode(examples, limit)
        assert found == plain and hash(found.examples) == hash(plain.examples)
    assert isinstance(found.examples[0].prompt_ids, TokenIds) and isinstance(plain.examples[0].prompt_ids, tuple)
    assert limit != 52 or (plain.n_dropped and plain.n_truncated)
    assert len(shards(tmp_path)) == 1


def test_refusals_come_back_with_their_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = pairs(120)
    examples[3:3] = [example("hello", ("chosen", "world"), system="Be brief.")]
    plain = ChatEncoder(gemma()).encode(examples, None)
    assert plain.dropped == {"refused by the chat template (System role not supported)": 1}
    for _ in range(2):
        forget(monkeypatch)
        kept = Tokenised(Cache(tmp_path), DATASET)
        encoder = ChatEncoder(gemma(), kept)
        assert encoder.encode(examples, None) == plain
    assert kept.rows(encoder._decides_ids, examples, no_tokenising)[3].refusal == "System role not supported"


def test_a_warm_cache_tokenises_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept_in(tmp_path).encode(pairs(120), 60)
    asked: list[int] = []
    encoder = kept_in(tmp_path)
    kept = Tokenised(Cache(tmp_path), DATASET)

    def recorded(examples: Sequence[PreferenceExample]) -> list[IdRow]:
        asked.append(len(examples))
        return encoder._tokenised(examples)

    kept.rows(encoder._decides_ids, pairs(120)[::-3], recorded)  # a subset in another order, and whatever the limit was
    assert asked == []
    more = kept.rows(encoder._decides_ids, pairs(220), recorded)
    assert asked == [100] and len(shards(tmp_path)) == 2
    assert more == kept.rows(encoder._decides_ids, pairs(220), no_tokenising)
    assert [row.sequences for row in more] == [row.sequences for row in encoder._tokenised(pairs(220))]


def test_few_texts_are_not_worth_a_file(tmp_path: Path) -> None:
    encoder = kept_in(tmp_path)
    assert encoder.encode(pairs(20), None) == ChatEncoder(build_tokenizer()).encode(pairs(20), None)
    assert list(tmp_path.iterdir()) == []


def test_other_words_of_the_template_or_tokenizer_are_another_store(tmp_path: Path) -> None:
    changed, with_token = build_tokenizer(), build_tokenizer()
    changed.chat_template = f"{changed.chat_template}{{# a remark #}}"
    with_token.add_tokens(["hippopotamus"])
    encoders = [ChatEncoder(tokenizer) for tokenizer in (build_tokenizer(), changed, with_token, gemma())]
    found = {Tokenised(Cache(tmp_path), DATASET).store(encoder._decides_ids).fingerprint for encoder in encoders}
    found.add(Tokenised(Cache(tmp_path), {"dataset": "other"}).store(encoders[0]._decides_ids).fingerprint)
    assert len(found) == 5


def test_the_key_is_the_text_and_where_it_stands() -> None:
    one = example("ab", ("chosen", "c"), ("rejected", "d"))
    others = [
        example("a", ("chosen", "bc"), ("rejected", "d")),
        example("ab", ("chosen", "cd")),
        example("ab", ("chosen", "d"), ("rejected", "c")),
        example("ab", ("chosen", "c"), ("rejected", "d"), system=""),
        example("c", ("chosen", "d"), system="ab"),
        example("ab", ("chosen", ""), ("rejected", "c"), ("ranked", "d")),
    ]
    assert len({text_hash(found) for found in (one, *others)}) == 7
    assert text_hash(one) == text_hash(example("ab", ("desirable", "c"), ("undesirable", "d")))


# --- damage, locks, disks ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["flipped", "cut", "emptied"])
def test_a_damaged_file_is_made_again(
    damage: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    examples = pairs(120)
    plain = kept_in(tmp_path).encode(examples, None)
    (shard,) = shards(tmp_path)
    whole = shard.read_bytes()
    middle = len(whole) // 2
    shard.write_bytes(
        {
            "flipped": whole[:middle] + bytes([whole[middle] ^ 1]) + whole[middle + 1 :],
            "cut": whole[:-2],
            "emptied": b"",
        }[damage]
    )
    forget(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert kept_in(tmp_path).encode(examples, None) == plain
    assert "a shard is damaged" in caplog.text
    assert [found.read_bytes() for found in shards(tmp_path)] == [whole]


def test_what_is_only_read_is_not_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    examples = pairs(120)

    def look() -> EncodedSet:
        forget(monkeypatch)
        return ChatEncoder(build_tokenizer(), Tokenised(ReadOnly(tmp_path), DATASET)).encode(examples, None)

    plain = look()
    assert list(tmp_path.iterdir()) == []
    kept_in(tmp_path).encode(examples, "p95")
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*")}
    assert look() == plain
    shard = shards(tmp_path)[0]
    before.pop(shard)
    shard.write_bytes(b"nothing")
    assert look() == plain
    assert {
        path: (path.stat().st_mtime_ns, path.stat().st_size) for path in tmp_path.rglob("*") if path != shard
    } == before


def test_a_full_disk_is_one_line(tmp_path: Path) -> None:
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limit[1]))
        with pytest.raises(UserError, match="cannot write: file too large; free some space"):
            kept_in(tmp_path).encode(pairs(120), None)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
        signal.signal(signal.SIGXFSZ, before)
    assert shards(tmp_path) == []


def test_of_two_processes_one_tokenises(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The other one has its own order of sets, and so of everything that is taken from one."""
    code = (
        "import logging, sys\n"
        "from pathlib import Path\n"
        "logging.basicConfig(level=logging.INFO)\n"
        "from tests.data.chat_models import llama3\n"
        "from tests.data.test_tokenised import kept_in, pairs\n"
        "encoder, examples = kept_in(Path(sys.argv[1]), llama3()), pairs(400)\n"
        "print('ready', flush=True)\n"
        "sys.stdin.readline()\n"
        "print(encoder.encode(examples, None).examples)\n"
    )
    encoder = kept_in(tmp_path, llama3())
    pipe = subprocess.PIPE
    with subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path)],
        env={**outside(), "PYTHONHASHSEED": "1"},
        cwd=Path(__file__).resolve().parents[2],
        stdin=pipe,
        stdout=pipe,
        stderr=pipe,
        text=True,
    ) as process:
        assert process.stdin is not None and process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.stdin.write("go\n")
        process.stdin.flush()
        with caplog.at_level(logging.INFO, logger="dppo"):
            found = encoder.encode(pairs(400), None).examples
        printed, said = process.communicate(timeout=60)
    assert printed == f"{found}\n"
    assert (said + caplog.text).count("build tokens") == 1
    assert len(shards(tmp_path)) == 1


# --- python -m dppo.cache ---------------------------------------------------------------------------------------------


def test_the_cache_command_knows_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    kept_in(tmp_path).encode(pairs(120), None)

    def command(*arguments: str) -> tuple[int, str]:
        status = cache_command.main([*arguments, "--dir", str(tmp_path)])
        return status, capsys.readouterr().out

    status, listed = command("ls")
    assert status == 0 and "tokens" in listed and "  token ids  120" in listed
    assert command("verify")[0] == 0
    shard = shards(tmp_path)[0]
    shard.write_bytes(shard.read_bytes()[:-1])
    assert command("verify")[0] == 1
    assert command("verify", "--remove")[0] == 1 and not shard.exists()
    assert "no run refers to it" not in command("gc")[1]  # used within the hour
    assert "no run refers to it" in command("gc", "--grace", "0")[1]
    assert not list(tmp_path.glob(f"{STAGE}/*"))
