"""Offline sessions of W&B on disk, and their upload by W&B's own command."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from dppo.artifacts.locks import try_hold
from dppo.errors import UserError
from dppo.tracking.weights_and_biases import STAGES, lock_of

_SESSION = re.compile(r"offline-run-(\d{8}_\d{6})-(.+)")
_PROBE = 10.0  # seconds in which a server that can be used answers something
_LOGIN = "run `wandb login` or set WANDB_API_KEY, then this command again"


@dataclass(frozen=True)
class Session:
    """One offline session: its folder, the id of its run, when it began, and its transaction log."""

    directory: Path
    run: str
    begun: str
    log: Path

    @property
    def synced(self) -> bool:
        """Whether W&B's uploader has marked it as uploaded."""
        return self.log.with_name(f"{self.log.name}.synced").exists()

    @property
    def busy(self) -> bool:
        """Whether a process still writes it."""
        with try_hold(lock_of(self.directory.parent, self.run)) as free:
            return not free


def sessions(paths: Sequence[Path]) -> list[Session]:
    """The sessions below these folders and those of the shared stages that they link to, the oldest first.

    Of several sessions of one run the fullest: each begins with the run's first row. Raises UserError for a path that
    is no directory.
    """
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: is not a directory; give run, study or multirun directories")
    places = {found.resolve() for path in paths for found in path.rglob("wandb") if found.is_dir()}
    places |= {stage for place in places for stage in _linked(place)}
    fullest: dict[tuple[Path, str], Session] = {}
    for session in (one for place in sorted(places) for one in _below(place)):
        key = (session.directory.parent, session.run)
        other = fullest.get(key)
        if other is None or session.log.stat().st_size >= other.log.stat().st_size:
            fullest[key] = session
    return sorted(fullest.values(), key=lambda one: (one.begun, str(one.directory)))


def _linked(place: Path) -> Iterator[Path]:
    with suppress(OSError, ValueError, AttributeError):
        for stage in json.loads((place / STAGES).read_text("utf-8")).values():
            yield Path(stage) / "wandb"


def _below(place: Path) -> Iterator[Session]:
    for directory in sorted(place.glob("offline-run-*")):
        if match := _SESSION.fullmatch(directory.name):
            log = directory / f"run-{match[2]}.wandb"
            if log.is_file():
                yield Session(directory, match[2], match[1], log)


def check_reachable() -> None:
    """Raise UserError, which names the remedy, unless there is a login and a server that answers."""
    import wandb  # noqa: TID251 - this is the one place

    settings = wandb.setup(wandb.Settings(silent=True)).settings
    # Any answer will do, also an error; a proxy is used as W&B uses it.
    try:
        urllib.request.urlopen(settings.base_url, timeout=_PROBE).close()
    except urllib.error.HTTPError:
        pass
    except OSError as error:
        reason = getattr(error, "reason", error)
        raise UserError(
            f"{settings.base_url}: does not answer ({reason}): run this command again with a network, or set "
            "WANDB_BASE_URL to your own server"
        ) from None
    if not _has_login(settings.base_url):
        raise UserError(f"no login for {settings.base_url}: {_LOGIN}")


def _has_login(base_url: str) -> bool:
    from wandb.sdk.lib import wbauth  # noqa: TID251 - this is the one place

    return wbauth.authenticate_session(host=base_url, source="dppo", prompt=False, update_session=False) is not None


def upload(session: Session, seconds: float) -> str | None:
    """Have W&B upload a session; returns why it could not, None if it is marked as uploaded.

    W&B asks nothing and is ended after ``seconds``.
    """
    process = subprocess.Popen(
        [sys.executable, "-m", "wandb", "sync", str(session.directory)],
        env={**os.environ, "WANDB_ERROR_REPORTING": "false"},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        said, _ = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not done within {seconds:g} seconds; see --timeout"
    finally:
        with suppress(ProcessLookupError):  # its service, too
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    return None if session.synced else _reason(said.splitlines())


def _reason(said: Iterable[str]) -> str:
    errors = [
        line for line in said if re.search(r"\bERROR\b|^Error|^panic", line) and "detailed error logs" not in line
    ]
    text = errors[0] if errors else "W&B said nothing"
    return re.sub(r"^(wandb: )?(ERROR|Error:?)\s*", "", text).strip() or text
