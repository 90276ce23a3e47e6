"""A fork of the tests' starter is what a process of its own would be."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.forks import Forked, Forks

SHOWN = """
import atexit, os, signal, sys
atexit.register(print, "at exit")
print(__name__, __spec__.name, sys.modules["__main__"].atexit is atexit, sys.argv, os.getcwd())
print(sys.path[0], sorted(name for name in os.environ if name.startswith("SHOWN")), signal.getsignal(signal.SIGINT))
print(sys.stdin.read(), sys.stdout.isatty(), sys.stdout.encoding, sys.stdout.line_buffering, sys.stderr.errors)
print("said", file=sys.stderr)
{ending}
"""


@pytest.mark.parametrize("ending", ["", "sys.exit(3)", "sys.exit('told')", "os.abort()", "os.kill(os.getpid(), 15)"])
def test_a_fork_sees_and_leaves_what_a_process_does(ending: str, forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "shown.py").write_text(SHOWN.format(ending=ending))
    environment = {**forks.environment, "SHOWN_API_KEY": "1"}
    words = ["one two", "-x"]
    fork = forks.run("shown", words, cwd=tmp_path, env=environment, timeout=60)
    process = subprocess.run(
        [sys.executable, "-m", "shown", *words],
        cwd=tmp_path,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    assert (fork.returncode, fork.stdout, fork.stderr) == (process.returncode, process.stdout, process.stderr)
    assert not ending or process.returncode


def test_an_exception_is_a_traceback(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("raise KeyError('lost')\n")
    done = forks.run("broken", [], cwd=tmp_path, env=forks.environment, timeout=60)
    assert done.returncode == 1
    assert re.fullmatch(r"Traceback .*\nKeyError: 'lost'\n", done.stderr, re.DOTALL)


def test_forks_can_be_killed_and_draw_numbers_of_their_own(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "long.py").write_text(
        "import random, time, numpy\n"
        "print(random.random(), numpy.random.rand(), flush=True)\n"
        "while True: time.sleep(0.01)\n"
    )
    drawn = []
    for number in range(2):
        with (tmp_path / str(number)).open("w+") as said:
            running = forks.start("long", [], cwd=tmp_path, env=forks.environment, stdout=said.fileno())
            assert isinstance(running, Forked)
            until = time.monotonic() + 60
            while not (tmp_path / str(number)).read_text().endswith("\n"):
                assert running.poll() is None and time.monotonic() < until
                time.sleep(0.01)
        drawn += (tmp_path / str(number)).read_text().split()
        with pytest.raises(subprocess.TimeoutExpired):
            running.wait(0.05)
        running.send_signal(signal.SIGKILL)
        assert running.wait(60) == -signal.SIGKILL
    assert len(set(drawn)) == 4
    with pytest.raises(subprocess.TimeoutExpired):
        forks.run("long", [], cwd=tmp_path, env=forks.environment, timeout=0.2)


def test_what_an_import_may_have_read_starts_a_process(forks: Forks, tmp_path: Path) -> None:
    (tmp_path / "threads.py").write_text("import os, sys; sys.exit('torch' in sys.modules)\n")
    environment = {**forks.environment, "OMP_NUM_THREADS": "7"}
    assert forks.run("threads", [], cwd=tmp_path, env=environment, timeout=60).returncode == 0
    assert forks.run("threads", [], cwd=tmp_path, env=forks.environment, timeout=60).returncode == 1
