"""Faults that befall whole runs: one line each, nothing half-written, and the same command then ends as ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from dppo import cache as cache_command
from dppo.artifacts.manifest import Manifest
from dppo.data.encoding import ChatEncoder
from dppo.stopping import Stopped, on_request
from tests import disks
from tests.answered import answered, settings, write_model
from tests.chaos.outcomes import cached, differences, directory, unsound
from tests.chaos.runs import Case, Ended, forking, run
from tests.conftest import once, small
from tests.searches import start
from tests.test_artifacts import flip
from tests.test_command_line import is_one_line, typed

WORDS = [*small("loss=unll", "alpha=0.1", "device=cpu", "sft.train.checkpoint_every=1", "train.checkpoint_every=2")]
_FAKETIME = next(map(str, sorted(Path("/usr/lib").glob("*/faketime/libfaketime.so.1"))), "")
_TRAINING = "cache/.work/preference-*/step-*.safetensors"


def here(folder: Path) -> list[str]:
    return [*WORDS, f"cache.dir={folder / 'cache'}", f"hydra.run.dir={folder / 'run'}"]


def outcome(folder: Path) -> dict[str, Any]:
    return cached(folder / "cache") | directory("run", folder / "run")


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run and its cache."""

    def build(root: Path) -> None:
        with pytest.MonkeyPatch.context() as patch:
            assert typed(patch, root, *here(root)) == 0

    return once(tmp_path_factory, "faults", build)


@pytest.fixture
def copy(undisturbed: Path, tmp_path: Path) -> Path:
    """The same, to be changed."""
    subprocess.run(["cp", "-r", f"{undisturbed}/cache", f"{undisturbed}/run", str(tmp_path)], check=True)
    return tmp_path


def is_whole(folder: Path, undisturbed: Path) -> None:
    assert differences(outcome(undisturbed), outcome(folder)) == []
    assert unsound(folder) == []


# --- disks -----------------------------------------------------------------------------------------------------------


def often(one: Any, *others: Any) -> list[Any]:
    """One case for every day, and the others for the slow tests."""
    slow = [case if isinstance(case, tuple) else (case,) for case in others]
    return [one, *(pytest.param(*case, marks=pytest.mark.slow) for case in slow)]


@pytest.mark.parametrize(("kibibytes", "stage"), often((230, "sft"), (0, None), (16, None), (500, "preference")))
def test_a_disk_that_fills_up_costs_the_step_in_progress(
    kibibytes: int,
    stage: str | None,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    with disks.small_disk(tmp_path / "disk", 4096) as disk:
        disks.fill(disk / "ballast", but=kibibytes)
        status, said = typed(monkeypatch, tmp_path, *here(disk)), capfd.readouterr()
        is_one_line(status, said.err.lower(), said.out, ["no space left on device"])
        assert stage is None or said.out.rpartition("\nbuild ")[2].startswith(stage)
        assert not (disk / "run" / "result.json").exists()
        (disk / "ballast").unlink()
        assert typed(monkeypatch, tmp_path, *here(disk)) == 0
        assert ("continues an unfinished build" in capfd.readouterr().out) == (stage is not None)
        is_whole(disk, undisturbed)


@pytest.mark.parametrize("key", ["cache.dir", "hydra.run.dir"])
def test_a_read_only_place_is_one_line(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    with disks.small_disk(tmp_path / "disk") as disk:
        disks.make_read_only(disk)
        words = [word for word in here(tmp_path) if not word.startswith(f"{key}=")]
        status = typed(monkeypatch, tmp_path, *words, f"{key}={disk}/place")
        said = capfd.readouterr()
        is_one_line(status, said.err, said.out, [f"{disk}/place", "ead-only file system"])
    assert not list(tmp_path.glob("cache/[a-z]*"))


# --- damage ----------------------------------------------------------------------------------------------------------


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


@pytest.mark.parametrize("damage", often(flip, truncate, empty))
def test_a_cache_that_is_damaged_everywhere_is_built_again(
    damage: Callable[[Path], None],
    copy: Path,
    undisturbed: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Every file of every artifact and every shard; what is shorter is seen at once, a flipped bit when asked."""
    files = [path for path in (copy / "cache").glob("[a-z]*/*/**/*") if path.is_file() and path.stat().st_size]
    assert len(files) > 20
    for path in files:
        damage(path)
    assert cache_command.main(["verify", "--dir", str(copy / "cache")]) == 1
    assert typed(monkeypatch, copy, *here(copy), "cache.verify=true") == 0
    said = capfd.readouterr()
    assert "is damaged" in said.err + said.out and "Traceback" not in said.err + said.out
    assert "reuse sft" not in said.out
    is_whole(copy, undisturbed)


def stopped_in_training(folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals) -> int:
    """Run until there is a checkpoint of the preference phase, and stop by a signal; the exit status."""
    over = threading.Event()

    def stop() -> None:
        while not over.is_set() and not list(folder.glob(_TRAINING)):
            time.sleep(0.001)
        if not over.is_set():
            os.kill(os.getpid(), number)

    thread = threading.Thread(target=stop)
    thread.start()
    try:
        return typed(monkeypatch, folder, *here(folder))
    finally:
        over.set()
        thread.join()


@pytest.mark.parametrize(
    ("damage", "older"), often((flip, True), (flip, False), (truncate, False), (empty, False), (empty, True))
)
def test_slurms_warning_leaves_a_checkpoint_and_a_damaged_one_is_told_and_never_used(
    damage: Callable[[Path], None],
    older: bool,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    """Slurm's warning ends training with a status of its own, at the next step."""
    assert stopped_in_training(tmp_path, monkeypatch, signal.SIGUSR1) == 75
    said = capfd.readouterr()
    assert "interrupted: main stopped after step" in said.err and "Traceback" not in said.err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"
    (newest,) = tmp_path.glob(_TRAINING)
    if older:  # as after a kill between writing the newest and deleting the one before
        step, _, digest = newest.stem.removeprefix("step-").partition("-")
        later = newest.with_name(f"step-{int(step) + 1:09d}-{digest}.safetensors")
        later.write_bytes(newest.read_bytes())
        newest = later
    damage(newest)
    assert typed(monkeypatch, tmp_path, *here(tmp_path)) == 0
    said = capfd.readouterr()
    assert f"{newest.name} is damaged and deleted" in said.err + said.out
    assert "Traceback" not in said.err + said.out
    told = "main: continues after step" in said.out
    assert told == older
    is_whole(tmp_path, undisturbed)


# --- locks, clocks, users --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("year", often(2090, 1980))
def test_files_of_another_time_and_locks_of_the_dead_hold_nobody_up(
    year: int, copy: Path, undisturbed: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The clock was set back or forward since, and whoever held the locks is gone."""
    when = (year - 1970) * 365.25 * 86400
    gone = subprocess.Popen(["true"])
    gone.wait()
    for path in sorted((copy / "cache").rglob("*"), reverse=True):
        os.utime(path, (when, when))
    locks = list((copy / "cache" / ".locks").glob("*.lock"))
    assert locks
    for lock in locks:
        record = {"pid": gone.pid, "host": "elsewhere", "since": f"{year}-01-01T00:00:00+00:00"}
        lock.with_suffix(".holder.json").write_text(json.dumps(record))
    for kept in (["--grace", "0", "--work", "0"], []):
        assert cache_command.main(["gc", "--dir", str(copy / "cache"), "--runs", str(copy), *kept]) == 0
        assert cache_command.main(["ls", "--dir", str(copy / "cache"), "--runs", str(copy)]) == 0
    started = time.monotonic()
    capfd.readouterr()
    assert typed(monkeypatch, copy, *here(copy)) == 0
    assert "build " not in capfd.readouterr().out
    is_whole(copy, undisturbed)
    assert typed(monkeypatch, copy, *here(copy), "seed=1") == 0
    assert time.monotonic() - started < 60
    assert json.loads((copy / "run" / "result.json").read_text())["timings"]["total_seconds"] > 0


@pytest.mark.skipif(not _FAKETIME, reason="needs apt-get install faketime")
def test_a_clock_that_jumps_while_a_run_goes_on_changes_nothing(undisturbed: Path, tmp_path: Path) -> None:
    """A year back in SFT, ten years forward in the preference phase, and back again: whoever asks gets that time."""
    clock = tmp_path / "clock"
    clock.write_text("+0d\n")
    jumps = {"build sft": "-365d", "build preference": "+3650d", "build answers": "-1d"}
    faked = {
        "LD_PRELOAD": _FAKETIME,
        "FAKETIME_TIMESTAMP_FILE": str(clock),
        "FAKETIME_NO_CACHE": "1",
        "FAKETIME_DONT_FAKE_MONOTONIC": "1",  # nor does a real jump move it
        "PYTHONUNBUFFERED": "1",
    }
    said = []
    with start(tmp_path, *here(tmp_path), **faked) as process:
        assert process.stdout is not None
        for line in process.stdout:
            said.append(line)
            for stage in [stage for stage in jumps if line.startswith(stage)]:
                clock.write_text(jumps.pop(stage) + "\n")
    assert process.returncode == 0 and not jumps, "".join(said)
    assert "Traceback" not in "".join(said)
    years = {Manifest.read(path.parent).created[:4] for path in tmp_path.glob("cache/[a-z]*/*/manifest.json")}
    assert len(years) >= 2, "it did jump"
    assert all(value >= 0 for value in seconds(json.loads((tmp_path / "run" / "result.json").read_text())["timings"]))
    is_whole(tmp_path, undisturbed)


def seconds(timings: Any) -> Iterator[float]:
    """Every duration, at any depth."""
    if isinstance(timings, dict):
        for key, value in timings.items():
            if "seconds" in key and isinstance(value, int | float):
                yield value
            yield from seconds(value)
    elif isinstance(timings, list):
        for value in timings:
            yield from seconds(value)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach; pytest's are its own user's."""
    with tempfile.TemporaryDirectory() as place:
        Path(place).chmod(0o755)
        yield Path(place)


@pytest.mark.slow
@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two other users")
def test_two_users_share_a_cache_if_their_group_may_write_and_else_are_told(open_folder: Path) -> None:
    root = open_folder
    cache = root / "cache"
    cache.mkdir()
    os.chown(cache, 1001, 5000)
    cache.chmod(0o2775)

    def run_as(user: int, umask: int, *words: str, where: Path = cache) -> Ended:
        home = root / f"home-{user}"
        home.mkdir(exist_ok=True)
        os.chown(home, user, 5000)
        given = (*WORDS, f"cache.dir={where}", f"hydra.run.dir=run-{len(list(home.iterdir()))}", *words)
        return run(starter, Case("users", given), home, None, 2048, user=(user, 5000, umask))

    with forking(warm=True) as starter:
        first = run_as(1001, 0o002)
        assert first.status == 0, first.log
        again = run_as(1002, 0o002)
        assert again.status == 0 and again.lines == [], again.log
        other = run_as(1002, 0o002, "seed=1")  # from the first one's model, and with rows added to its stores
        assert other.status == 0 and "build preference" in other.lines and "build sft" not in other.lines, other.log

        for path in (cache, *cache.rglob("*")):
            path.chmod(path.stat().st_mode & ~0o022)  # as most umasks have it
        refused = run_as(1002, 0o022, "seed=2")
        is_one_line(refused.status, refused.log, "", [f"{cache}: cannot write: permission denied", "cache.dir="])


# --- signals ---------------------------------------------------------------------------------------------------------


class Signalled(ChatEncoder):
    """Gets a signal while it decodes its ninth answer."""

    n_decoded = 0

    def decode(self, token_ids: Sequence[int]) -> str:
        if self.n_decoded == 8:
            signal.raise_signal(signal.SIGTERM)
        self.n_decoded += 1
        return super().decode(token_ids)


def test_a_signal_during_generation_costs_no_answer(tmp_path: Path) -> None:
    """No shard is full yet: the eight answers before are committed, and the next run makes the other four."""
    write_model(tmp_path / "model")
    with pytest.raises(Stopped), on_request():
        answered(tmp_path / "cache", tmp_path / "model", settings("none"), Signalled)
    (shard,) = tmp_path.glob("cache/generate/*/shards/*")
    assert shard.name.startswith("000008-")
    bench, found = answered(tmp_path / "cache", tmp_path / "model", settings("none"))
    assert bench.records[0].rows == 4
    assert answered(tmp_path / "apart", tmp_path / "model", settings("none"))[1] == found
