"""Faults that befall whole runs: one line each, nothing half-written, and the same command then ends as ever."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from dppo import cache as cache_command
from tests import disks
from tests.answered import write_model
from tests.chaos.outcomes import cached, differences, directory, unsound
from tests.conftest import once, outside, small
from tests.test_artifacts import flip
from tests.test_command_line import is_one_line, typed

WORDS = [*small("loss=unll", "alpha=0.1", "device=cpu", "sft.train.checkpoint_every=1", "train.checkpoint_every=2")]
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


def stopped_in_training(folder: Path, monkeypatch: pytest.MonkeyPatch, number: signal.Signals = signal.SIGTERM) -> int:
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
def test_a_damaged_checkpoint_is_told_and_never_used(
    damage: Callable[[Path], None],
    older: bool,
    undisturbed: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    assert stopped_in_training(tmp_path, monkeypatch) == 130
    (newest,) = tmp_path.glob(_TRAINING)
    if older:  # as after a kill between writing the newest and deleting the one before
        step, _, digest = newest.stem.removeprefix("step-").partition("-")
        later = newest.with_name(f"step-{int(step) + 1:09d}-{digest}.safetensors")
        later.write_bytes(newest.read_bytes())
        newest = later
    damage(newest)
    capfd.readouterr()
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


@contextmanager
def as_user(user: int, umask: int) -> Iterator[None]:
    """In a forked child: be somebody else, of the group 5000."""
    os.setgroups([5000])
    os.setgid(5000)
    os.setuid(user)
    os.umask(umask)
    yield


def of_user(user: int, umask: int, root: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> tuple[int, str]:
    """A run of another user's, as a fork: its modules are imported. The exit status and what was said."""
    home = root / f"home-{user}"
    home.mkdir(exist_ok=True)
    os.chown(home, user, 5000)
    log = root / "log"
    log.unlink(missing_ok=True)
    pid = os.fork()
    if pid == 0:
        status = 99
        try:
            output = os.open(log, os.O_CREAT | os.O_WRONLY)
            os.dup2(output, 1)
            os.dup2(output, 2)
            sys.stdout, sys.stderr = open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
            with as_user(user, umask):
                status = typed(monkeypatch, home, *WORDS, f"cache.dir={root / 'cache'}", "hydra.run.dir=run", *words)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), log.read_text()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can be two other users")
def test_two_users_share_a_cache_if_their_group_may_write_and_else_are_told(
    undisturbed: Path, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path_factory.mktemp("users")
    for path in (root, *root.parents[: root.parts.index("tmp")]):
        path.chmod(path.stat().st_mode | 0o055) if path != Path("/tmp") and path.stat().st_uid == 0 else None
    (root / "cache").mkdir()
    os.chown(root / "cache", 1001, 5000)
    (root / "cache").chmod(0o2775)
    status, said = of_user(1001, 0o002, root, monkeypatch)
    assert status == 0, said
    status, said = of_user(1002, 0o002, root, monkeypatch)
    assert status == 0 and "build " not in said, said
    status, said = of_user(1002, 0o002, root, monkeypatch, "seed=1")  # reads the first one's model and adds to stores
    assert status == 0 and "build preference" in said and "build sft" not in said, said

    (root / "cache").chmod(0o755)
    for path in (root / "cache").rglob("*"):
        path.chmod(path.stat().st_mode & ~0o022)  # as the umask of most would have it
    status, said = of_user(1002, 0o022, root, monkeypatch, "seed=2")
    is_one_line(status, said, "", [f"{root / 'cache'}: cannot write: permission denied", "cache.dir="])


# --- signals ---------------------------------------------------------------------------------------------------------


def test_slurms_warning_is_a_checkpoint_and_a_status_of_its_own(
    undisturbed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert stopped_in_training(tmp_path, monkeypatch, signal.SIGUSR1) == 75
    assert "interrupted: main stopped after step" in capfd.readouterr().err
    assert json.loads((tmp_path / "run" / "result.json").read_text())["status"] == "interrupted"
    assert list(tmp_path.glob(_TRAINING))
    assert typed(monkeypatch, tmp_path, *here(tmp_path)) == 0
    assert "main: continues after step" in capfd.readouterr().out
    is_whole(tmp_path, undisturbed)


def test_a_signal_during_generation_costs_no_answer(tmp_path: Path) -> None:
    """SIGTERM arrives in the ninth answer, when no shard is full yet: the eight before are committed."""
    write_model(tmp_path / "model")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.answered", str(tmp_path / "cache"), str(tmp_path / "model"), "none", "2048"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=outside(),
    )
    assert process.stdout is not None and process.stdout.readline() == "stuck\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=30)
    assert "Stopped" in said
    (shard,) = tmp_path.glob("cache/generate/*/shards/*")
    assert shard.name.startswith("000008-")
