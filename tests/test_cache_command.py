"""`python -m dppo.cache`: what it lists, what it finds damaged, what it removes and what it never removes."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from dppo.artifacts import Cache, Slot, Store, maintenance
from dppo.artifacts.stores import Tokens
from dppo.cache import age, main, size

HOUR, DAY = 3600.0, 86400.0


class World:
    """An outputs folder: sft -> reference -> preference with one run, a second preference without, work, leftovers."""

    def __init__(self, outputs: Path) -> None:
        self.outputs = outputs
        self.cache = Cache(outputs / "cache")
        self.sft = self.build("sft", 1)
        self.reference: Store[Tokens] = self.cache.token_store("reference", {"v": 1}, [self.sft.fingerprint])
        self.reference.append({"a": np.zeros(3, np.float32), "b": np.zeros(5, np.float32)})
        self.reference.append({"c": np.zeros(2, np.float32)})
        self.used = self.build("preference", 1, [self.reference.fingerprint])
        self.unused = self.build("preference", 2, [self.reference.fingerprint])
        self.run = outputs / "runs" / "first"
        self.run.mkdir(parents=True)
        self.cache.record_run(self.run, [("preference", self.used.fingerprint)])

    def build(self, stage: str, number: int, parents: Sequence[str] = ()) -> Slot:
        slot = self.cache.artifact(stage, {"number": number}, parents)
        with slot.building() as build:
            (build.directory / "weights.bin").write_bytes(bytes(1000))
        return slot

    def abandon(self, number: int, parents: Sequence[str] = ()) -> Slot:
        """A build that was interrupted after its first checkpoint."""
        slot = self.cache.artifact("preference", {"number": number}, parents)
        with pytest.raises(KeyboardInterrupt), slot.building() as build:
            (build.work / "step-1").write_bytes(bytes(500))
            raise KeyboardInterrupt
        return slot

    def command(self, *arguments: str) -> int:
        return main([*arguments, "--dir", str(self.cache.root)])

    def gc(self, *arguments: str) -> int:
        return self.command("gc", "--grace", "0", *arguments)

    def files(self) -> set[Path]:
        return {path for path in self.cache.root.rglob("*") if path.suffix != ".lock"}


@contextmanager
def held_elsewhere(slot: Slot) -> Iterator[None]:
    """Another process holds the lock of a slot."""
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from dppo.artifacts.locks import hold\n"
        f"with hold(Path({str(slot.layout.lock_path(slot.stage, slot.fingerprint))!r}), 'it'):\n"
        "    print('held', flush=True)\n"
        "    sys.stdin.readline()\n"
    )
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", code], stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield
        process.communicate("done\n", timeout=30)


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "outputs")


def set_age(path: Path, seconds: float) -> None:
    for found in [*path.rglob("*"), path]:
        os.utime(found, (time.time() - seconds,) * 2)


# --- ls -------------------------------------------------------------------------------------------------------------


def test_ls_is_a_table_of_what_is_there_and_who_uses_it(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    unfinished = world.abandon(3)
    set_age(world.sft.path, 2 * HOUR + 60)
    assert world.command("ls") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["stage", "id", "kind", "rows", "size", "last", "used", "parents", "used", "by"]
    rows = {(cells[0], cells[1]): cells for cells in (re.split(r"\s{2,}", line) for line in lines[:-1])}
    sft, reference = rows["sft", world.sft.fingerprint[:8]], rows["reference", world.reference.fingerprint[:8]]
    assert sft[2:4] == ["artifact", "-"]
    assert sft[4].endswith(" kB")
    assert sft[5:] == ["2 h ago", "-", "runs/first"]
    assert reference[2:4] == ["token rows", "3"]
    assert reference[6:] == [world.sft.fingerprint[:4], "runs/first"]
    assert rows["preference", world.used.fingerprint[:8]][6:] == [world.reference.fingerprint[:4], "runs/first"]
    assert rows["preference", world.unused.fingerprint[:8]][6:] == [world.reference.fingerprint[:4], "-"]
    assert rows["preference", unfinished.fingerprint[:8]][2] == "unfinished"
    assert lines[-1].startswith(f"5 in {world.cache.root}, ")


def test_ls_shortens_many_runs_and_shows_damage(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("second", "third", "fourth"):
        (world.outputs / "runs" / name).mkdir()
        world.cache.record_run(world.outputs / "runs" / name, [("preference", world.used.fingerprint)])
    (world.unused.path / "manifest.json").write_text("{")
    assert world.command("ls") == 0
    out = capsys.readouterr().out
    assert "runs/first, runs/fourth (+2)" in out
    assert [line.split()[2] for line in out.splitlines() if world.unused.fingerprint[:8] in line] == ["damaged"]


def test_no_cache_yet_is_no_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("ls", "verify", "gc"):
        assert main([command, "--dir", str(tmp_path / "none")]) == 0
    assert "0 in " in capsys.readouterr().out
    assert not (tmp_path / "none").exists()


def test_sizes_and_ages_are_for_people() -> None:
    assert [size(n) for n in (0, 999, 1000, 12_345_678, 5e9, 7.25e13)] == [
        "0 B",
        "999 B",
        "1.0 kB",
        "12.3 MB",
        "5.0 GB",
        "72.5 TB",
    ]
    assert [age(s) for s in (-5, 0, 59, 60, 3599, 3600, 2 * DAY)] == [
        "0 s",
        "0 s",
        "59 s",
        "1 min",
        "59 min",
        "1 h",
        "2 d",
    ]


# --- verify ---------------------------------------------------------------------------------------------------------


def test_verify_is_content_with_a_sound_cache(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    assert world.command("verify") == 0
    assert capsys.readouterr().out.endswith(": nothing damaged\n")


def test_verify_finds_flipped_bits_and_removes_them_when_told(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    weights = world.used.path / "weights.bin"
    weights.write_bytes(bytes(999) + b"\1")
    shard = min(world.reference.shards.iterdir())
    data = shard.read_bytes()
    shard.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    stray = world.reference.shards / "notes.txt"
    stray.write_text("x")
    before = world.files()
    assert world.command("verify") == 1
    assert world.files() == before
    out = capsys.readouterr().out
    assert f"damaged: {world.used.path}: weights.bin does not match its sha256\n" in out
    assert f"damaged: {shard}: " in out
    assert f"damaged: {stray}: notes.txt is not the name of a shard" in out
    assert "3 damaged" in out

    assert world.command("verify", "--remove") == 1
    assert capsys.readouterr().out.count(" - removed\n") == 3
    assert not world.used.path.exists()
    assert not shard.exists()
    assert world.reference.missing("abc") == ["c"]
    assert world.sft.complete()
    assert world.command("verify") == 0


def test_verify_keeps_the_rows_of_a_store_with_a_damaged_manifest(world: World) -> None:
    (world.reference.path / "manifest.json").write_text("{}")
    assert world.command("verify", "--remove") == 1
    assert world.reference.missing("abc") == []
    world.reference.artifact(reused=True)
    assert world.command("verify") == 0


def test_verify_does_not_remove_what_is_being_built(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    (world.unused.path / "weights.bin").write_bytes(b"")
    with held_elsewhere(world.unused):
        assert world.command("verify", "--remove") == 1
        assert " - in use, not removed" in capsys.readouterr().out
        assert world.unused.path.exists()


# --- gc -------------------------------------------------------------------------------------------------------------


def test_gc_removes_only_what_no_run_needs(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    before = world.files()
    assert world.gc("--dry-run") == 0
    assert world.files() == before
    dry = capsys.readouterr().out
    assert world.gc() == 0
    out = capsys.readouterr().out
    assert dry.replace("would remove", "removed") == out
    assert out.splitlines()[0].startswith(f"removed preference {world.unused.fingerprint[:8]} (")
    assert out.splitlines()[0].endswith(f": no run refers to it [{world.unused.path}]")
    assert out.splitlines()[1].startswith("removed 1, ")
    assert out.splitlines()[1].endswith(f"; 3 stay in {world.cache.root}")
    assert not world.unused.path.exists()
    assert world.used.complete()
    assert world.sft.complete()
    assert world.reference.missing("abc") == []
    assert list((world.cache.root / ".trash").iterdir()) == []


def test_gc_keeps_what_was_used_a_moment_ago(world: World) -> None:
    set_age(world.unused.path, HOUR - 60)
    assert world.command("gc") == 0
    assert world.unused.path.exists()
    set_age(world.unused.path, 2 * HOUR)
    world.unused.artifact(reused=True)  # a run uses it and has not said so yet
    assert world.command("gc") == 0
    assert world.unused.path.exists()
    set_age(world.unused.path, 2 * HOUR)
    assert world.command("gc") == 0
    assert not world.unused.path.exists()


def test_gc_keeps_what_a_run_begins_to_use_while_it_works(world: World) -> None:
    other = world.build("preference", 4)
    set_age(world.unused.path, DAY)
    set_age(other.path, 2 * DAY)
    removals = maintenance.collect(world.cache, [world.outputs], grace=HOUR, work_age=DAY)
    assert next(removals).path == other.path
    world.unused.artifact(reused=True)
    assert list(removals) == []
    assert world.unused.complete()


def test_gc_forgets_a_run_whose_directory_is_gone(world: World) -> None:
    (world.run / "parents.json").unlink()
    assert world.gc() == 0
    assert {path.parent.name for path in world.cache.root.glob("*/*") if len(path.name) == 64} == set()
    assert list((world.cache.root / ".runs").iterdir()) == []


def test_gc_knows_runs_outside_of_the_outputs_folder(world: World, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere" / "run"
    elsewhere.mkdir(parents=True)
    world.cache.record_run(elsewhere, [("preference", world.unused.fingerprint)])
    assert world.gc() == 0
    assert world.unused.complete()


def test_gc_finds_runs_that_were_copied_here(world: World, tmp_path: Path) -> None:
    for note in (world.cache.root / ".runs").iterdir():
        note.unlink()
    assert world.gc() == 0
    assert world.used.complete()
    world.run.rename(tmp_path / "moved")
    assert world.gc("--runs", str(tmp_path)) == 0
    assert world.used.complete()
    assert world.gc() == 0
    assert not world.used.path.exists()


def test_gc_all_removes_also_what_runs_refer_to(world: World) -> None:
    world.abandon(3)
    assert world.gc("--all", "--dry-run") == 0
    assert world.used.complete()
    assert world.gc("--all") == 0
    assert maintenance.contents(world.cache) == []


def test_gc_never_removes_what_a_process_holds_or_what_that_is_made_from(world: World) -> None:
    (world.run / "parents.json").unlink()
    unfinished = world.abandon(3, [world.reference.fingerprint])
    with held_elsewhere(unfinished):
        assert world.gc("--all", "--work", "0") == 0
        assert unfinished.work.exists()
        assert world.reference.missing("abc") == []
        assert world.sft.complete()
        assert not world.used.path.exists()
    assert world.gc("--all") == 0
    assert maintenance.contents(world.cache) == []


def test_gc_keeps_young_checkpoints_and_what_they_are_made_from(world: World) -> None:
    (world.run / "parents.json").unlink()
    unfinished = world.abandon(3, [world.reference.fingerprint])
    set_age(unfinished.work, 6 * DAY)
    assert world.gc() == 0
    assert (unfinished.work / "step-1").exists()
    assert world.reference.missing("abc") == []
    assert world.sft.complete()
    set_age(unfinished.work, 8 * DAY)
    assert world.gc() == 0
    assert maintenance.contents(world.cache) == []
    assert list((world.cache.root / ".work").iterdir()) == []


def test_gc_keeps_old_checkpoints_of_a_run(world: World) -> None:
    unfinished = world.abandon(3)
    world.cache.record_run(world.run, [("preference", unfinished.fingerprint)])
    set_age(unfinished.work, 80 * DAY)
    assert world.gc() == 0
    assert (unfinished.work / "step-1").exists()


def test_gc_removes_checkpoints_of_a_complete_build(world: World, capsys: pytest.CaptureFixture[str]) -> None:
    world.used.work.mkdir()
    (world.used.work / "step-1").write_text("x")
    assert world.gc() == 0
    assert "its build is complete" in capsys.readouterr().out
    assert not world.used.work.exists()
    assert world.used.complete()


def test_gc_removes_leftovers_but_not_what_is_being_written(world: World) -> None:
    building, trash = world.cache.root / ".building", world.cache.root / ".trash"
    trash.mkdir(exist_ok=True)
    (trash / "weights").write_text("x")
    dead = building / f"{world.unused.slug}-0123"
    dead.mkdir()
    live_slot = world.cache.artifact("sft", {"number": 9})
    live = building / f"{live_slot.slug}-0123"
    live.mkdir()
    old, young = world.reference.shards / ".a.tmp", world.reference.shards / ".b.tmp"
    for path in (old, young):
        path.write_text("x")
    set_age(old, 2 * DAY)
    before = world.files()
    assert world.gc("--dry-run") == 0
    assert world.files() == before
    with held_elsewhere(live_slot):
        assert world.gc() == 0
    assert not (trash / "weights").exists()
    assert not dead.exists()
    assert live.exists()
    assert not old.exists()
    assert young.exists()


# --- the user's errors ----------------------------------------------------------------------------------------------


def test_other_directories_are_never_touched(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    precious = tmp_path / "sft" / ("a" * 64)
    precious.mkdir(parents=True)
    for command in (["ls"], ["verify", "--remove"], ["gc", "--all", "--grace", "0"]):
        assert main([*command, "--dir", str(tmp_path)]) == 2
        assert capsys.readouterr().err.startswith(f"error: {tmp_path}: is no cache of dppo")
    assert precious.exists()


def test_foreign_files_in_the_cache_stay(world: World) -> None:
    foreign = [world.cache.root / "README", world.cache.root / "sft" / "mine", world.cache.root / "Data" / ("a" * 64)]
    for path in foreign:
        path.mkdir(parents=True)
    assert world.gc("--all") == 0
    assert all(path.exists() for path in foreign)


def test_a_file_of_an_artifact_is_no_run(world: World) -> None:
    slot = world.cache.artifact("sft", {"number": 5})
    with slot.building() as build:
        (build.directory / "parents.json").write_text("no list")
    assert world.command("ls") == 0


@pytest.mark.parametrize("text", ["{", "{}", '{"a": 1}', '[{"stage": "sft"}]', '[{"fingerprint": "../.."}]', "[1]"])
def test_gc_stops_at_a_run_that_it_cannot_read(world: World, capsys: pytest.CaptureFixture[str], text: str) -> None:
    (world.run / "parents.json").write_text(text)
    before = world.files()
    assert world.gc() == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {world.run}/parents.json: must be a list of")
    assert error.count("\n") == 1
    assert world.files() == before


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: ls|verify|gc"),
        (["rm"], "invalid choice: 'rm'"),
        (["gc", "--drop"], "unrecognized arguments: --drop"),
        (["gc", "--grace", "-1"], "argument --grace: '-1' is not a number >= 0"),
        (["gc", "--work", "week"], "argument --work: 'week' is not a number >= 0"),
    ],
)
def test_a_wrong_command_line_is_one_line(
    capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert message in captured.err
    assert captured.err.count("\n") == 1
    assert captured.err.endswith("--help\n")


def test_the_module_is_a_command_without_torch(world: World) -> None:
    (world.used.path / "weights.bin").write_bytes(b"")
    code = (
        "import runpy, sys\n"
        "try: runpy.run_module('dppo.cache', run_name='__main__')\n"
        "finally: print({'torch', 'transformers', 'hydra'} & set(sys.modules))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "verify", "--dir", str(world.cache.root)], capture_output=True, text=True
    )
    assert done.returncode == 1
    assert done.stdout.splitlines()[-1] == "set()"
    assert done.stderr == ""


def test_parents_json_is_what_the_documentation_says(world: World) -> None:
    text = (world.run / "parents.json").read_text()
    assert json.loads(text) == [{"stage": "preference", "fingerprint": world.used.fingerprint}]
