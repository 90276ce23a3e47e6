"""Searches through other launchers and storages, and through several sweepers at once."""

from __future__ import annotations

import copy
import os
import signal
from pathlib import Path

import psutil
import pytest

from dppo.config import Unused
from dppo.errors import UserError
from dppo.search.storage import open_storage, shown
from tests.conftest import Run
from tests.searches import files_with, free_port, grpc_server, pruning, start, states, until
from tests.test_command_line import is_one_line, typed

SECRET = "planted-Secret-7"
STORAGE = "hydra.sweeper.storage=${oc.env:DPPO_STORAGE}"


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A cache for several tests: the SFT model is a good part of a small search."""
    return f"cache.dir={tmp_path_factory.mktemp('shared')}"


@pytest.mark.slow
def test_joblib_and_a_journal(dppo: Run, tmp_path: Path, shared: str) -> None:
    words = pruning(3, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", shared)
    words += ["hydra.sweeper.storage=journal:///trials.log"]
    done = dppo(*words)
    assert done.returncode == 0, done.stderr
    assert states(tmp_path) == ["complete", "pruned", "pruned"], done.stdout + done.stderr
    assert (tmp_path / "trials.log").stat().st_size


@pytest.mark.slow
def test_submitit_and_a_server(dppo: Run, tmp_path: Path, shared: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with grpc_server(tmp_path) as url:
        monkeypatch.setenv("DPPO_STORAGE", url)
        done = dppo(*pruning(3, "hydra/launcher=submitit_local", STORAGE, shared))
    assert done.returncode == 0, done.stderr
    assert states(tmp_path) == ["complete", "pruned", "pruned"], done.stdout + done.stderr
    assert "Submitit" not in done.stdout, "the sweeper announces trials"


@pytest.mark.slow
def test_two_sweepers_share_the_trials_of_one_study(tmp_path: Path, shared: str) -> None:
    words = pruning(6, shared)
    first = start(tmp_path, *words)
    until((tmp_path / "outputs" / "sweeps" / "search" / "0").exists, first)
    first.send_signal(signal.SIGSTOP)  # or it had run them all before the second one is there
    second = start(tmp_path, *words, "hydra.sweeper.resume=true")
    until((tmp_path / "outputs" / "sweeps" / "search" / "1").exists, second)
    first.send_signal(signal.SIGCONT)
    said = [process.communicate(timeout=300)[0] for process in (first, second)]
    assert (first.returncode, second.returncode) == (0, 0), said
    begun = [{line.split()[1] for line in text.splitlines() if " of 6): " in line} for text in said]
    assert begun[0] and begun[1], said
    assert not begun[0] & begun[1]
    ended = states(tmp_path)
    assert len(ended) == len(begun[0] | begun[1]) == 6
    assert set(ended) <= {"complete", "pruned"}


@pytest.mark.slow
def test_no_job_outlives_a_search_that_is_stopped(tmp_path: Path) -> None:
    words = pruning(2, "hydra/launcher=submitit_local", "train.steps=20000")
    search = start(tmp_path, *words)
    until(lambda: any(tmp_path.glob("outputs/cache/.work/preference-*/metrics.jsonl")), search)
    jobs = psutil.Process(search.pid).children(recursive=True)
    assert len(jobs) >= 2, "submitit's own process and the job's"
    search.send_signal(signal.SIGTERM)
    said = search.communicate(timeout=60)[0]
    assert search.returncode == 130, said
    assert "interrupted: the same command with hydra.sweeper.resume=true continues" in said
    assert not [job for job in jobs if job.is_running() and job.status() != psutil.STATUS_ZOMBIE]


def test_what_made_a_job_fail_comes_back(
    dppo: Run, tmp_path: Path, shared: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = tmp_path / "own_reward.py"
    own.write_text(
        "from dataclasses import dataclass\n"
        "class Odd(Exception):\n"
        "    def __init__(self, *, needed): super().__init__(f'lacks {needed}')\n"
        "@dataclass(frozen=True)\n"
        "class Reward:\n"
        "    unit: str\n"
        "    identity = {'name': 'odd'}\n"
        "    def check(self, *given): raise Odd(needed='words')\n"
        "    def score(self, *given): raise Odd(needed='words')\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    words = pruning(2, "hydra/launcher=joblib", "hydra.launcher.n_jobs=2", "hydra.sweeper.n_trials=1", shared)
    words += ["allowed_targets=[own_reward]", "reward._target_=own_reward.Reward", "hydra.sweeper.max_failure_rate=1"]
    done = dppo(*words)
    assert done.returncode == 0, done.stderr
    assert states(tmp_path) == ["failed"]
    text = (tmp_path / "outputs" / "sweeps" / "search" / "0" / "error.txt").read_text()
    assert "Odd: lacks words" in text
    assert "own_reward.py" in text, "the traceback of the other process"


UNREACHABLE = [
    ("refused", f"postgresql://me:{SECRET}@127.0.0.1:PORT/trials", ["postgresql://me@127.0.0.1:", "refused"]),
    ("in the query", f"postgresql://127.0.0.1:PORT/trials?user=me&password={SECRET}", ["password=...", "refused"]),
    ("not escaped", f"postgresql://me:a@{SECRET}/b@127.0.0.1:PORT/trials", ["postgresql://me@127.0.0.1:", "%XX"]),
    ("no port", f"postgresql://me:{SECRET}@127.0.0.1:five/trials", ["postgresql://me@127.0.0.1:", "%XX"]),
    ("no server", "grpc://127.0.0.1:PORT", ["grpc://127.0.0.1:", "server"]),
]


@pytest.mark.parametrize(("url", "named"), [case[1:] for case in UNREACHABLE], ids=[case[0] for case in UNREACHABLE])
def test_an_unreachable_database_is_told_in_one_line_without_its_password(
    url: str,
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setenv("DPPO_STORAGE", url.replace("PORT", str(free_port())))
    status = typed(monkeypatch, tmp_path, *pruning(2, STORAGE))
    output = capfd.readouterr()
    is_one_line(status, output.err, output.out, named)
    assert SECRET not in output.err + output.out
    assert not files_with(tmp_path, SECRET)


@pytest.mark.parametrize(
    "url",
    [
        f"postgresql://me:{SECRET}@host/trials",
        f"postgresql://me:{SECRET}@${{oc.env:HOST}}/trials",
        f"postgresql://host/trials?password={SECRET}",
        f"${{oc.env:NOWHERE,postgresql://me:{SECRET}@host/trials}}",
    ],
)
def test_a_typed_password_is_refused(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOST", "127.0.0.1")
    status = typed(monkeypatch, tmp_path, *pruning(2, f"hydra.sweeper.storage='{url}'"))
    output = capfd.readouterr()
    is_one_line(status, output.err, output.out, ["a password would be written to files", "DPPO_STORAGE"])
    assert SECRET not in output.err + output.out
    assert not files_with(tmp_path, SECRET)


def test_an_unset_variable_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("DPPO_STORAGE", raising=False)
    status = typed(monkeypatch, tmp_path, *pruning(2, STORAGE))
    output = capfd.readouterr()
    is_one_line(status, output.err, output.out, ["DPPO_STORAGE", "not found"])


def test_what_is_shown_of_a_url() -> None:
    for url in ("sqlite:////data/me@host/a:b.db", "journal:///a@b", "postgresql://me@host/trials", "grpc://host:1"):
        assert shown(url) == url
    assert shown("postgresql://me:a@b:c/d@host:5432/x") == "postgresql://me@host:5432/x"
    assert shown("mysql://host/x?a=1&passwd=2&b=3") == "mysql://host/x?a=1&passwd=...&b=3"
    with pytest.raises(UserError, match=r"journal:////no/such/folder/log"):
        _open("journal:////no/such/folder/log")


def _open(url: str) -> None:
    from dppo.search.storage import storage_errors

    with storage_errors(url):
        open_storage(url)


def test_a_refused_word_can_be_sent_between_processes() -> None:
    again = copy.copy(Unused("alpha=1: is unused", "alpha=1"))  # as unpickling does: from __reduce__
    assert (str(again), again.word) == ("alpha=1: is unused", "alpha=1")
