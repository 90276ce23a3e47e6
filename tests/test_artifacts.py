"""Fingerprints, atomic commits, locks and stores: with real processes that are really killed."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import random
import signal
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dppo.artifacts import Build, Cache, MissingRows, Store, Tokens, fingerprint, require_rows, short
from dppo.artifacts.fingerprint import canonical, to_bytes
from dppo.artifacts.layout import identify
from dppo.errors import UserError
from tests import disks

CONTENT = {"version": 1, "train": {"lr": 1e-4, "steps": 300}}


@pytest.fixture
def cache(tmp_path: Path) -> Cache:
    return Cache(tmp_path / "cache")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    with disks.small_disk(tmp_path / "small") as mount:
        yield mount


def write(build: Build, text: str = "weights") -> None:
    (build.directory / "model").mkdir()
    (build.directory / "model" / "weights.bin").write_text(text)
    (build.directory / "notes.txt").write_text("notes")


def built(cache: Cache, content: Mapping[str, object] = CONTENT, stage: str = "sft") -> Path:
    """Build an artifact in which nothing else is of interest."""
    slot = cache.artifact(stage, content)
    with slot.building() as build:
        write(build)
    return slot.path


class Child:
    """A process that runs ``code`` with ``cache`` at hand and says on its output how far it is."""

    def __init__(self, cache: Cache, code: str) -> None:
        start = f"""
        import random, sys, time
        from pathlib import Path
        import numpy as np
        from dppo.artifacts import Cache
        cache = Cache(Path({str(cache.root)!r}))
        def say(text): print(text, flush=True)
        """
        program = textwrap.dedent(start) + textwrap.dedent(code)
        self.process = subprocess.Popen(
            [sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def hear(self) -> str:
        """The next line that the process says."""
        assert self.process.stdout is not None
        return self.process.stdout.readline().strip()

    def go(self) -> None:
        """Let the process pass the line `sys.stdin.readline()`."""
        assert self.process.stdin is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.end()

    def end(self) -> str:
        """Wait for the process; everything it still said."""
        said, _ = self.process.communicate(timeout=60)
        return said


# --- fingerprints ---------------------------------------------------------------------------------------------------

leaves: st.SearchStrategy[object] = (
    st.none() | st.booleans() | st.integers(-2, 2) | st.floats(allow_nan=False, allow_infinity=False)
)
leaves |= st.sampled_from([0.0, 1.0, -0.0, 2.0, "", "1", "true", "null"]) | st.text(max_size=3)
contents = st.recursive(
    leaves,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=6,
)


def typed(value: Any) -> Any:
    """``value`` in a form in which == also compares types, and the order of keys plays no part."""
    if isinstance(value, dict):
        return ("mapping", frozenset((key, typed(item)) for key, item in value.items()))
    if isinstance(value, list):
        return ("list", tuple(typed(item) for item in value))
    return (type(value).__name__, repr(value))


@given(contents, contents)
@settings(max_examples=200, deadline=None)
def test_equal_contents_and_only_they_share_a_fingerprint(first: Any, second: Any) -> None:
    assert (fingerprint(first) == fingerprint(second)) == (typed(first) == typed(second))


@given(st.dictionaries(st.text(max_size=4), contents, min_size=1, max_size=5), st.randoms())
@settings(max_examples=100, deadline=None)
def test_order_of_keys_plays_no_part_and_any_changed_value_does(content: dict[str, Any], rng: random.Random) -> None:
    shuffled = list(content.items())
    rng.shuffle(shuffled)
    assert fingerprint(dict(shuffled)) == fingerprint(content)
    key = rng.choice(list(content))
    assert fingerprint({**content, key: [content[key]]}) != fingerprint(content)
    assert fingerprint({other: content[other] for other in content if other != key}) != fingerprint(content)


def test_fingerprint_is_the_sha256_of_these_very_bytes() -> None:
    """Pinned, because a change would silently rebuild every cache: sorted keys, no spaces, ASCII, exact floats."""
    text = b'{"a":1,"b":[1.5,null,true,"\\u00e9"],"c":{"x":0.30000000000000004,"y":1e-05}}'
    content = {"c": {"y": 1e-5, "x": 0.1 + 0.2}, "b": (1.5, None, True, "é"), "a": 1}
    assert fingerprint(content) == hashlib.sha256(text).hexdigest()
    assert short(fingerprint(content)) == fingerprint(content)[:4]


def test_types_are_told_apart() -> None:
    assert len({fingerprint({"x": value}) for value in (1, 1.0, True, "1", [1], None, 0, 0.0, -0.0, False, "")}) == 11
    assert fingerprint((1, (2,))) == fingerprint([1, [2]])


@dataclass(frozen=True)
class Linear:
    pass


@dataclass(frozen=True)
class Quadratic:
    pass


@dataclass(frozen=True)
class Settings:
    lr: float
    penalty: object


def test_dataclasses_enter_with_class_and_fields() -> None:
    prints = [
        fingerprint({"train": value})
        for value in (
            Settings(1e-4, Linear()),
            Settings(1e-4, Quadratic()),
            Settings(2e-4, Linear()),
            {"lr": 1e-4, "penalty": {}},
        )
    ]
    assert len(set(prints)) == 4
    assert fingerprint({"train": Settings(1e-4, Linear())}) == prints[0]


@pytest.mark.parametrize(
    ("content", "error", "place"),
    [
        ({"train": {"lr": float("nan")}}, ValueError, r"content\.train\.lr is nan"),
        ({"clip": [1.0, float("-inf")]}, ValueError, r"content\.clip\[1\] is -inf"),
        ({"stages": {"sft"}}, TypeError, r"content\.stages is a set"),
        ({"path": Path("a")}, TypeError, r"content\.path is a PosixPath"),
        ({"raw": b"a"}, TypeError, r"content\.raw is a bytes"),
        ({"lr": np.float32(1)}, TypeError, r"content\.lr is a float32"),
        ({"phases": {1: "a"}}, TypeError, r"content\.phases has the key 1"),
        ({"loss": Linear}, TypeError, r"content\.loss is a type"),
    ],
)
def test_what_has_no_exact_json_is_refused_by_place(content: object, error: type[Exception], place: str) -> None:
    with pytest.raises(error, match=place):
        fingerprint(content)


def test_stage_inputs_and_parents_in_their_order_make_an_artifact(cache: Cache) -> None:
    a, b = "a" * 64, "b" * 64
    identities = [
        ("sft", {"v": 1}, ()),
        ("sft", {"v": 2}, ()),
        ("generate", {"v": 1}, ()),
        ("sft", {"v": 1}, (a,)),
        ("sft", {"v": 1}, (a, b)),
        ("sft", {"v": 1}, (b, a)),
    ]
    assert len({identify(*identity)[1] for identity in identities}) == len(identities)
    slot = cache.artifact("sft", {"v": 1}, [a])
    assert slot.path == cache.root / "sft" / slot.fingerprint
    assert slot.name == f"sft {slot.fingerprint[:4]}"


@pytest.mark.parametrize("stage", ["../sft", "sft/x", ".work", "", "SFT", "a" * 41])
def test_no_name_leads_out_of_the_cache(cache: Cache, stage: str) -> None:
    with pytest.raises(ValueError, match="stage"):
        cache.artifact(stage, CONTENT)
    with pytest.raises(ValueError, match="must be a fingerprint"):
        cache.artifact("sft", CONTENT, ["../../etc"])


# --- one artifact ---------------------------------------------------------------------------------------------------


def test_a_build_becomes_an_artifact_with_a_manifest(cache: Cache) -> None:
    slot = cache.artifact("sft", {"version": 1, "penalty": Linear()}, ["a" * 64])
    assert not slot.complete()
    with slot.building() as build:
        write(build)
        (build.work / "step-1").write_text("checkpoint")
        build.timings["train"] = 1.5
        build.extra["loss"] = [3.0, 2.0]
    assert slot.complete()
    assert (slot.path / "model" / "weights.bin").read_text() == "weights"
    manifest = slot.manifest()
    assert manifest.status == "complete"
    assert (manifest.stage, manifest.fingerprint, manifest.parents) == ("sft", slot.fingerprint, ("a" * 64,))
    assert manifest.inputs == canonical({"version": 1, "penalty": Linear()})
    assert manifest.timings["train"] == 1.5
    assert manifest.timings["total"] >= 0
    assert manifest.extra == {"loss": [3.0, 2.0]}
    assert manifest.versions["python"] == ".".join(map(str, sys.version_info[:3]))
    assert {"dppo", "torch", "transformers", "numpy"} <= manifest.versions.keys()
    assert manifest.threads >= 1
    assert manifest.processes == 1
    assert manifest.files["model/weights.bin"].sha256 == hashlib.sha256(b"weights").hexdigest()
    assert manifest.files["model/weights.bin"].bytes == len("weights")
    assert set(manifest.files) == {"model/weights.bin", "notes.txt"}
    assert not slot.work.exists()
    assert list((cache.root / ".work").iterdir()) == []
    assert list((cache.root / ".building").iterdir()) == []


def test_a_manifest_from_before_processes_were_counted_is_read(cache: Cache) -> None:
    slot = cache.artifact("sft", CONTENT)
    with slot.building() as build:
        write(build)
    path = slot.path / "manifest.json"
    body = json.loads(path.read_text())
    del body["processes"], body["checksum"]
    body["checksum"] = hashlib.sha256(to_bytes(body)).hexdigest()
    path.write_text(json.dumps(body))
    assert slot.complete()
    assert slot.manifest().processes == 1


def test_get_or_build_builds_once(cache: Cache) -> None:
    slot = cache.artifact("sft", CONTENT)
    first = slot.get_or_build(write)
    again = cache.artifact("sft", {"train": CONTENT["train"], "version": 1}).get_or_build(
        lambda _: pytest.fail("built")
    )
    assert (first.reused, again.reused) == (False, True)
    assert first.path == again.path == str(slot.path)
    assert (first.stage, first.fingerprint, first.parents) == ("sft", slot.fingerprint, ())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_a_failed_build_leaves_only_its_checkpoints(cache: Cache, error: type[BaseException]) -> None:
    slot = cache.artifact("sft", CONTENT)

    def fail(build: Build) -> None:
        write(build)
        (build.work / "step-7").write_text("checkpoint")
        raise error

    with pytest.raises(error):
        slot.get_or_build(fail)
    assert not slot.path.exists()
    assert list((cache.root / ".building").iterdir()) == []
    assert slot.reason() == "continues an unfinished build"
    with slot.building() as build:
        assert (build.work / "step-7").read_text() == "checkpoint"
        assert list(build.directory.iterdir()) == []
        write(build)
    assert slot.complete()
    assert not slot.work.exists()


def test_a_failed_build_without_checkpoints_leaves_nothing(cache: Cache) -> None:
    slot = cache.artifact("sft", CONTENT)
    with pytest.raises(RuntimeError), slot.building():
        raise RuntimeError
    assert [path for path in cache.root.rglob("*") if slot.fingerprint in path.name and path.suffix != ".lock"] == []


def test_links_and_a_foreign_manifest_are_refused(cache: Cache, tmp_path: Path) -> None:
    slot = cache.artifact("sft", CONTENT)
    with pytest.raises(ValueError, match="symbolic link"), slot.building() as build:
        (build.directory / "passwd").symlink_to("/etc/passwd")
    with pytest.raises(ValueError, match=r"manifest\.json is written by the cache"), slot.building() as build:
        (build.directory / "manifest.json").write_text("{}")
    with pytest.raises(ValueError, match="not JSON compliant"), slot.building() as build:
        build.extra["loss"] = float("nan")
    assert not slot.path.exists()


def test_other_users_can_read_an_artifact(cache: Cache) -> None:
    before = os.umask(0o022)
    slot = cache.artifact("sft", CONTENT)
    try:
        with slot.building() as build:
            write(build)
            (build.directory / "notes.txt").chmod(0o600)  # as safetensors does
    finally:
        os.umask(before)
    assert slot.path.stat().st_mode & 0o777 == 0o755
    for name in ("manifest.json", "notes.txt"):
        assert (slot.path / name).stat().st_mode & 0o777 == 0o644


def truncate(path: Path) -> None:
    (path / "model" / "weights.bin").write_text("weigh")


def lose(path: Path) -> None:
    (path / "notes.txt").unlink()


def spoil_manifest(path: Path) -> None:
    (path / "manifest.json").write_bytes((path / "manifest.json").read_bytes()[:-9])


def lose_manifest(path: Path) -> None:
    (path / "manifest.json").unlink()


@pytest.mark.parametrize("damage", [truncate, lose, spoil_manifest, lose_manifest])
def test_a_damaged_artifact_is_built_again(cache: Cache, caplog: pytest.LogCaptureFixture, damage: Any) -> None:
    path = built(cache)
    slot = cache.artifact("sft", CONTENT)
    damage(path)
    assert slot.reason().startswith("it is damaged: ")
    with caplog.at_level(logging.WARNING):
        assert not slot.get_or_build(lambda build: write(build, "new")).reused
    assert len(caplog.messages) == 1
    assert "damaged and will be built again" in caplog.messages[0]
    assert (path / "model" / "weights.bin").read_text() == "new"
    assert slot.complete()


def test_a_flipped_bit_is_found_by_the_hash_when_asked(cache: Cache) -> None:
    path = built(cache)
    (path / "model" / "weights.bin").write_text("Weights")
    assert cache.artifact("sft", CONTENT).complete()
    careful = Cache(cache.root, verify=True).artifact("sft", CONTENT)
    assert not careful.complete()
    assert careful.reason() == "it is damaged: model/weights.bin does not match its sha256"
    assert not careful.get_or_build(write).reused
    assert (path / "model" / "weights.bin").read_text() == "weights"


def test_any_flipped_bit_of_a_manifest_is_found(cache: Cache) -> None:
    path = built(cache) / "manifest.json"
    slot = cache.artifact("sft", CONTENT)
    good = path.read_bytes()
    for place in range(0, len(good), 3):
        path.write_bytes(good[:place] + bytes([good[place] ^ 1]) + good[place + 1 :])
        assert not slot.complete(), place
    path.write_bytes(good)
    assert slot.complete()


def test_a_manifest_in_the_wrong_place_is_found(cache: Cache) -> None:
    path = built(cache)
    other = cache.artifact("sft", {"version": 2})
    path.rename(other.path)
    assert not other.complete()
    assert "belongs to another artifact" in other.reason()


def test_the_first_of_two_builds_wins(cache: Cache) -> None:
    slot = cache.artifact("sft", CONTENT)
    with slot.building() as build:
        write(build, "first")
    with slot.building() as build:
        write(build, "second")
    assert (slot.path / "model" / "weights.bin").read_text() == "first"


def test_reason_names_what_differs_from_the_nearest_artifact(cache: Cache) -> None:
    parent, other = "a" * 64, "b" * 64
    content = {"version": 1, "train": {"lr": 1e-4, "steps": 300}}
    assert cache.artifact("sft", content, [parent]).reason() == "the first sft"
    for lr, steps in ((1e-4, 300), (9e-4, 900)):
        slot = cache.artifact("sft", {"version": 1, "train": {"lr": lr, "steps": steps}}, [parent])
        with slot.building() as build:
            write(build)
    near = cache.artifact("sft", content, [parent]).fingerprint[:4]
    changed = {"version": 1, "train": {"lr": 5e-5, "steps": 300, "clip": 1.0}}
    reason = cache.artifact("sft", changed, [parent]).reason()
    assert reason == f"differs from {near} in train.clip (new), train.lr (5e-05, was 0.0001)"
    assert cache.artifact("sft", content, [other]).reason() == f"differs from {near} in a parent (bbbb, was aaaa)"
    many = {"version": 2, "a": 1, "b": 1, "c": 1, "train": {"lr": 1e-4, "steps": 300}}
    assert cache.artifact("sft", many, [parent]).reason().endswith("and 1 more")


# --- several processes ----------------------------------------------------------------------------------------------

BUILD_SLOWLY = """
slot = cache.artifact("sft", {"version": 1, "train": {"lr": 1e-4, "steps": 300}})
with slot.building(on_wait=say) as build:
    (build.directory / "half").write_text("half")
    (build.work / "step-1").write_text("checkpoint")
    say("building")
    time.sleep(60)
"""


def test_a_killed_writer_leaves_no_artifact_and_the_next_one_builds_it(cache: Cache) -> None:
    child = Child(cache, BUILD_SLOWLY)
    assert child.hear() == "building"
    child.kill()
    slot = cache.artifact("sft", CONTENT)
    assert not slot.path.exists()
    assert len(list((cache.root / ".building").iterdir())) == 1
    started = time.monotonic()
    with slot.building() as build:
        assert (build.work / "step-1").read_text() == "checkpoint"
        assert list((cache.root / ".building").iterdir()) == [build.directory]
        write(build)
    assert time.monotonic() - started < 5
    assert slot.complete()
    assert set(slot.manifest().files) == {"model/weights.bin", "notes.txt"}


def test_two_processes_race_for_one_slot_and_exactly_one_builds(cache: Cache, tmp_path: Path) -> None:
    log = tmp_path / "builds.txt"
    code = f"""
    slot = cache.artifact("sft", {{"version": 1}})
    say("ready")
    sys.stdin.readline()
    with slot.lock():
        if not slot.complete():
            with slot.building() as build:
                with open({str(log)!r}, "a") as file: file.write("built\\n")
                time.sleep(0.5)
                (build.directory / "weights.bin").write_text("weights")
    say(slot.complete())
    """
    children = [Child(cache, code) for _ in range(2)]
    assert [child.hear() for child in children] == ["ready", "ready"]
    for child in children:
        child.go()
    said = [child.end().strip() for child in children]
    assert log.read_text() == "built\n"
    assert said == ["True", "True"]


def test_callers_that_race_for_one_slot_share_what_exactly_one_builds(cache: Cache) -> None:
    def build(it: Build) -> None:
        builds.append(it)
        time.sleep(0.2)
        write(it)

    def call(_: int) -> bool:
        return cache.artifact("sft", CONTENT).get_or_build(build).reused

    builds: list[Build] = []
    with ThreadPoolExecutor(4) as pool:
        assert sorted(pool.map(call, range(4))) == [False, True, True, True]
    assert len(builds) == 1


def test_a_waiter_is_told_whom_it_waits_for_and_takes_over_when_the_holder_is_killed(cache: Cache) -> None:
    holder = Child(cache, BUILD_SLOWLY)
    assert holder.hear() == "building"
    waiter = Child(cache, BUILD_SLOWLY.replace("time.sleep(60)", "(build.directory / 'done').write_text('done')"))
    notice = waiter.hear()
    assert notice.startswith(f"waiting for {cache.artifact('sft', CONTENT).name}: process {holder.process.pid} on ")
    assert "has held it since 20" in notice
    time.sleep(0.5)
    assert not cache.artifact("sft", CONTENT).complete()
    holder.kill()
    assert waiter.hear() == "building"
    assert waiter.end() == ""  # the notice came once
    assert waiter.process.returncode == 0
    assert "done" in cache.artifact("sft", CONTENT).manifest().files


def hear_some(child: Child, rng: random.Random) -> None:
    """Let a process that says when it begins each piece of work do at least one, and be somewhere in another."""
    for _ in range(rng.randint(2, 8)):
        assert child.hear()
    time.sleep(rng.uniform(0, 0.01))


def test_kills_at_random_moments_leave_only_whole_artifacts(cache: Cache) -> None:
    code = """
    for number in range(10_000):
        slot = cache.artifact("sft", {"number": number})
        with slot.lock():
            if slot.complete():
                continue
            say(number)
            with slot.building() as build:
                for name in range(5):
                    (build.directory / str(name)).write_text(f"{number} {name} " * 500)
                (build.work / "step-1").write_text("checkpoint")
    """
    rng = random.Random(0)
    number = 0
    for _ in range(6):
        child = Child(cache, code)
        hear_some(child, rng)
        child.kill()
        for number in range(10_000):
            slot = Cache(cache.root, verify=True).artifact("sft", {"number": number})
            if not slot.path.exists():
                break
            assert slot.complete()
            assert len(slot.manifest().files) == 5
        assert len(list((cache.root / "sft").iterdir())) == number
    assert number >= 6


def test_a_lock_can_be_taken_again_by_its_thread_but_not_by_another(cache: Cache) -> None:
    slot, same = cache.artifact("sft", CONTENT), cache.artifact("sft", CONTENT)
    entered = threading.Event()

    def other() -> None:
        with cache.artifact("sft", CONTENT).lock():
            entered.set()

    thread = threading.Thread(target=other)
    with slot.lock():
        with same.lock():
            thread.start()
        assert not entered.wait(0.3)
    thread.join(timeout=10)
    assert entered.is_set()


# --- stores ---------------------------------------------------------------------------------------------------------


def tokens(*values: float) -> Tokens:
    return np.array(values, np.float32)


def token_store(cache: Cache) -> Store[Tokens]:
    return cache.token_store("reference", {"version": 1}, ["a" * 64])


def json_store(cache: Cache) -> Store[Any]:
    return cache.json_store("generate", {"version": 1}, ["a" * 64])


def test_missing_keys_come_in_order_and_once(cache: Cache) -> None:
    store = json_store(cache)
    assert store.missing(["c", "a", "b", "a"]) == ["c", "a", "b"]
    store.append({"a": 1})
    assert store.missing(["c", "a", "b", "c"]) == ["c", "b"]
    assert json_store(cache).missing(["a"]) == []


def test_holes_are_named_with_their_number(cache: Cache) -> None:
    store = token_store(cache)
    store.append({"a": tokens(-1.0)})
    with pytest.raises(MissingRows, match=rf"^{store.name}: 5 rows are missing: p, q, r, \.\.\.$"):
        store.get(["p", "q", "a", "r", "s", "t", "p"])
    require_rows(["a", "b"], ["b", "a", "c"], "scores")
    with pytest.raises(MissingRows, match=r"^scores: 1 rows are missing: b$"):
        require_rows(["a", "b"], ["a"], "scores")


def test_rows_are_joined_by_key_across_shards_in_any_order(cache: Cache) -> None:
    store = token_store(cache)
    rows = {f"{number}:x": tokens(*(-number - step / 8 for step in range(number % 7))) for number in range(100)}
    keys = list(rows)
    random.Random(0).shuffle(keys)
    for start in range(0, 100, 13):
        store.append({key: rows[key] for key in keys[start : start + 13]})
    random.Random(1).shuffle(keys)
    asked = [*keys, keys[3]]
    for opened in (store, token_store(cache)):
        for key, row in zip(asked, opened.get(asked), strict=True):
            assert row.dtype == np.float32
            np.testing.assert_array_equal(row, rows[key])


awkward = st.text(max_size=6) | st.sampled_from(['","row":', '\\","row":1', "\n", "\r\n", "\u2028", "{", '"', "\\", ""])


@given(st.dictionaries(awkward, contents | awkward, min_size=1, max_size=6))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_json_rows_come_back_as_they_were(tmp_path_factory: pytest.TempPathFactory, rows: dict[str, Any]) -> None:
    cache = Cache(tmp_path_factory.mktemp("cache"))
    json_store(cache).append(rows)
    found = json_store(cache).get(list(rows))
    assert [typed(row) for row in found] == [typed(row) for row in rows.values()]


def test_surrogates_survive(cache: Cache) -> None:
    json_store(cache).append({"\ud800": {"text": "a\udfffb"}})
    assert json_store(cache).get(["\ud800"]) == [{"text": "a\udfffb"}]


@given(
    st.dictionaries(
        awkward, st.lists(st.floats(allow_nan=False, allow_infinity=False, width=32), max_size=9), min_size=1
    )
)
@settings(max_examples=40, deadline=None)
def test_token_rows_come_back_bit_for_bit(
    tmp_path_factory: pytest.TempPathFactory, rows: dict[str, list[float]]
) -> None:
    cache = Cache(tmp_path_factory.mktemp("cache"))
    token_store(cache).append({key: tokens(*row) for key, row in rows.items()})
    for row, expected in zip(token_store(cache).get(list(rows)), rows.values(), strict=True):
        assert row.tobytes() == tokens(*expected).tobytes()


def test_the_first_row_of_a_key_stays(cache: Cache) -> None:
    store = json_store(cache)
    store.append({"a": "first"})
    store.append({"a": "second", "b": "b"})
    store.append({"a": "third"})
    assert json_store(cache).get(["a", "b"]) == ["first", "b"]
    assert len(list(store.shards.iterdir())) == 2


def test_reason_of_a_store_that_has_rows(cache: Cache) -> None:
    assert json_store(cache).reason() == "the first generate"
    json_store(cache).append({"a": 1, "b": 2})
    store = json_store(cache)
    assert store.missing(["a", "c"]) == ["c"]
    assert store.reason() == "adds to 2 rows"


def test_rows_of_other_processes_appear_without_opening_again(cache: Cache) -> None:
    store, other = json_store(cache), json_store(cache)
    assert store.missing(["a"]) == ["a"]
    other.append({"a": 1})
    assert store.missing(["a"]) == []
    assert store.get(["a"]) == [1]


@pytest.mark.parametrize(
    ("row", "error"),
    [
        (np.array([1.0]), "'b': must be float32 of shape"),
        (np.zeros((2, 2), np.float32), "'b': must be float32 of shape"),
        (tokens(float("nan")), "'b': holds NaN"),
        (tokens(0.0, float("-inf")), "'b': holds NaN or infinity"),
    ],
)
def test_token_rows_that_poison_a_store_are_refused(cache: Cache, row: Tokens, error: str) -> None:
    store = token_store(cache)
    with pytest.raises((TypeError, ValueError), match=error):
        store.append({"a": tokens(0.0), "b": row})
    assert store.missing(["a", "b"]) == ["a", "b"]


def test_json_rows_that_are_no_json_are_refused(cache: Cache) -> None:
    store = json_store(cache)
    with pytest.raises(ValueError, match="row 'b'"):
        store.append({"a": 1.0, "b": float("nan")})
    with pytest.raises(TypeError, match="row 'b'"):
        store.append({"b": {1, 2}})
    assert store.missing(["a", "b"]) == ["a", "b"]


def flip(shard: Path) -> Path:
    data = bytearray(shard.read_bytes())
    data[len(data) // 2] ^= 4
    shard.write_bytes(data)
    return shard


def cut(shard: Path) -> Path:
    shard.write_bytes(shard.read_bytes()[:-5])
    return shard


def empty(shard: Path) -> Path:
    shard.write_bytes(b"")
    return shard


def lie(shard: Path) -> Path:
    return shard.rename(shard.with_name(shard.name.replace("000002-", "000003-")))


def rename(shard: Path) -> Path:
    return shard.rename(shard.with_name(f"shard.{shard.suffix}"))


@pytest.mark.parametrize("damage", [flip, cut, empty, lie, rename])
@pytest.mark.parametrize("kind", ["json", "tokens"])
def test_a_damaged_shard_is_set_aside_and_its_rows_are_missing(
    cache: Cache, caplog: pytest.LogCaptureFixture, damage: Any, kind: str
) -> None:
    store: Store[Any] = json_store(cache) if kind == "json" else token_store(cache)
    rows: dict[str, Any] = {key: tokens(-1.0, -2.0) if kind == "tokens" else {"text": key} for key in "abcd"}
    store.append({"a": rows["a"], "b": rows["b"]})
    (shard,) = store.shards.iterdir()
    store.append({"c": rows["c"], "d": rows["d"]})
    spoiled = damage(shard)

    fresh: Store[Any] = json_store(cache) if kind == "json" else token_store(cache)
    with caplog.at_level(logging.WARNING):
        assert fresh.missing("abcd") == ["a", "b"]
    assert len(caplog.messages) == 1
    assert f"{fresh.name}: a shard is damaged, its rows will be computed again" in caplog.messages[0]
    assert not spoiled.exists()
    fresh.append({"a": rows["a"], "b": rows["b"]})
    again: Store[Any] = json_store(cache) if kind == "json" else token_store(cache)
    for opened in (fresh, again):
        assert opened.missing("abcd") == []
        assert len(opened.get("abcd")) == 4


def test_rows_of_a_shard_that_was_deleted_meanwhile_are_missing(cache: Cache) -> None:
    store = json_store(cache)
    store.append({"a": 1})
    store.append({"b": 2})
    for shard in store.shards.iterdir():
        if b'"a"' in shard.read_bytes():
            shard.unlink()
    with pytest.raises(MissingRows, match="1 rows are missing: a"):
        store.get(["a", "b"])
    store.append({"a": 1})
    assert store.get(["b", "a"]) == [2, 1]


def test_leftovers_of_a_killed_writer_are_not_rows_and_vanish(cache: Cache) -> None:
    store = json_store(cache)
    store.append({"a": 1})
    torn = store.shards / ".000001-abc.jsonl.0123.tmp"
    torn.write_text('{"key":"b","ro')
    assert json_store(cache).missing(["a", "b"]) == ["b"]
    store.append({"b": 2})
    assert not torn.exists()


def test_a_store_has_a_manifest_that_mends(cache: Cache) -> None:
    store = token_store(cache)
    store.append({"a": tokens(-1.0)})
    manifest = json.loads((store.path / "manifest.json").read_text())
    assert (manifest["status"], manifest["kind"], manifest["parents"]) == ("growing", "token rows", ["a" * 64])
    (store.path / "manifest.json").write_text("{")
    assert store.artifact(reused=True).path == str(store.path)
    assert json.loads((store.path / "manifest.json").read_text())["kind"] == "token rows"


def test_processes_that_append_the_same_keys_agree(cache: Cache) -> None:
    code = """
    store = cache.json_store("generate", {"version": 1}, ["a" * 64])
    me = int(time.time_ns())
    say("ready")
    sys.stdin.readline()
    for start in range(0, 200, 10):
        store.append({str(key): me for key in range(start, start + 20)})
    say(hash(tuple(store.get([str(key) for key in range(210)]))))
    """
    children = [Child(cache, code) for _ in range(3)]
    assert {child.hear() for child in children} == {"ready"}
    for child in children:
        child.go()
    said = {child.end().strip() for child in children}
    assert [child.process.returncode for child in children] == [0, 0, 0]
    assert len(said) == 1
    keys = [
        json.loads(line)["key"]
        for shard in json_store(cache).shards.iterdir()
        for line in shard.read_text().splitlines()
    ]
    assert sorted(keys, key=int) == [str(key) for key in range(210)]


def test_kills_at_random_moments_leave_only_whole_shards(cache: Cache) -> None:
    code = """
    store = cache.token_store("reference", {"version": 1}, ["a" * 64])
    for start in range(0, 100_000, 50):
        keys = store.missing([str(key) for key in range(start, start + 50)])
        if keys: say(start)
        store.append({key: np.full(int(key) % 300, -float(key), np.float32) for key in keys})
    """
    rng = random.Random(0)
    keys = [str(key) for key in range(100_000)]
    found = 0
    for _ in range(5):
        child = Child(cache, code)
        hear_some(child, rng)
        child.kill()
        store = token_store(cache)
        before, found = found, keys.index(store.missing(keys)[0])
        assert found >= before
        assert found % 50 == 0
        for key, row in zip(keys[:found], store.get(keys[:found]), strict=True):
            np.testing.assert_array_equal(row, np.full(int(key) % 300, -float(key), np.float32))
    assert found >= 250
    assert list((cache.root / ".trash").glob("*")) == []


# --- disks ----------------------------------------------------------------------------------------------------------


def test_a_full_disk_is_a_user_error_and_nothing_is_half_written(small_disk: Path) -> None:
    cache = Cache(small_disk / "cache")
    slot = cache.artifact("sft", CONTENT)
    with pytest.raises(UserError, match=r"cache/\.building/sft-.*: cannot write: no space left on device"):
        slot.get_or_build(lambda build: write(build, "w" * 2_000_000))
    assert not slot.complete()
    assert not slot.path.exists()
    assert list((cache.root / ".building").iterdir()) == []
    slot.get_or_build(write)
    assert slot.complete()


def test_a_disk_that_fills_up_under_safetensors_is_a_user_error(small_disk: Path) -> None:
    from safetensors.numpy import save_file

    slot = Cache(small_disk / "cache").artifact("sft", CONTENT)
    with pytest.raises(UserError, match="cannot write: no space left on device"), slot.building() as build:
        save_file({"w": np.zeros(600_000, np.float32)}, build.directory / "model.safetensors")
    assert not slot.path.exists()


def test_a_disk_that_fills_up_at_the_manifest_is_a_user_error(small_disk: Path) -> None:
    cache = Cache(small_disk / "cache")
    slot = cache.artifact("sft", CONTENT)
    with pytest.raises(UserError, match="cannot write: no space left on device"), slot.building() as build:
        write(build)
        disks.fill(small_disk / "ballast")
    assert not slot.path.exists()
    assert list((cache.root / ".building").iterdir()) == []
    (small_disk / "ballast").unlink()
    assert not slot.get_or_build(write).reused


def test_a_disk_that_fills_up_keeps_the_shards_before(small_disk: Path) -> None:
    cache = Cache(small_disk / "cache")
    store = token_store(cache)
    store.append({"a": tokens(-1.0)})
    with pytest.raises(UserError, match="cannot write: no space left on device; free some space"):
        store.append({"b": np.zeros(600_000, np.float32)})
    assert store.missing("ab") == token_store(cache).missing("ab") == ["b"]
    assert len(list(store.shards.iterdir())) == 1
    store.append({"b": tokens(-2.0)})
    assert token_store(cache).missing("ab") == []


def test_a_size_limit_of_the_process_is_a_user_error(cache: Cache) -> None:
    """The same without mounting anything: the system refuses files above one megabyte to this process."""
    code = """
    import resource
    from dppo.errors import UserError
    resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, 1_000_000))
    slot = cache.artifact("sft", {"version": 1})
    try:
        with slot.building() as build:
            (build.directory / "weights.bin").write_bytes(bytes(2_000_000))
    except UserError as error:
        say(error)
    store = cache.token_store("reference", {"version": 1})
    try:
        store.append({"a": np.zeros(500_000, np.float32)})
    except UserError as error:
        say(error)
    say([slot.path.exists(), store.missing(["a"]), len(list(store.shards.iterdir()))])
    """
    build, append, state = Child(cache, code).end().splitlines()
    assert "cannot write: file too large" in build
    assert f"{cache.root}: cannot write: file too large" in append
    assert state == "[False, ['a'], 0]"


def test_a_cache_below_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    cache = Cache(tmp_path / "file" / "cache")
    message = (
        rf"^{tmp_path}/file/cache: cannot write: not a directory; make it writable, or choose another place \(cache"
    )
    with pytest.raises(UserError, match=message):
        cache.check_writable()
    with pytest.raises(UserError, match=message):
        cache.artifact("sft", CONTENT).get_or_build(lambda _: pytest.fail("built"))
    assert token_store(cache).missing(["a"]) == ["a"]
    with pytest.raises(UserError, match=message):
        token_store(cache).append({"a": tokens(-1.0)})


def test_a_file_in_place_of_the_cache_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    with pytest.raises(UserError, match="cannot write: "):
        Cache(tmp_path / "file").check_writable()


def test_a_read_only_cache_can_be_used_but_not_filled(small_disk: Path, caplog: pytest.LogCaptureFixture) -> None:
    cache = Cache(small_disk / "cache")
    path = built(cache)
    token_store(cache).append({"a": tokens(-1.0)})
    token_store(cache).append({"b": tokens(-2.0)})
    flip(next(shard for shard in token_store(cache).shards.iterdir()))
    disks.make_read_only(small_disk)
    assert cache.artifact("sft", CONTENT).get_or_build(write).path == str(path)
    store = token_store(cache)
    assert len(store.missing("ab")) == len(store.missing("ab")) == 1
    assert len([message for message in caplog.messages if "a shard is damaged" in message]) == 1
    assert store.artifact(reused=True).reused
    with pytest.raises(UserError, match="cannot write: read-only file system"):
        cache.artifact("sft", {"version": 2}).get_or_build(write)
    with pytest.raises(UserError, match="read-only file system"):
        store.append({"c": tokens(-1.0)})
    with pytest.raises(UserError, match="read-only file system"):
        cache.check_writable()


def test_an_error_of_the_stage_itself_is_passed_on(cache: Cache) -> None:
    with pytest.raises(FileNotFoundError, match="prompts"), cache.artifact("sft", CONTENT).building():
        Path("/no/prompts.jsonl").read_text()


def test_check_writable_leaves_nothing(cache: Cache) -> None:
    cache.check_writable()
    assert list((cache.root / ".building").iterdir()) == []
