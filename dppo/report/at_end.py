"""The report that a multirun or a search makes of itself when it has ended."""

from __future__ import annotations

import logging
from pathlib import Path

from dppo.errors import UserError

_log = logging.getLogger("dppo.report")
_begun: list[Path] = []


def begin(directory: Path) -> None:
    """Note that a multirun writes its runs into ``directory``."""
    _begun[:] = [directory]


def finish() -> None:
    """Write the report of the multirun that has ended, if one was begun; its failure is told and fails nothing."""
    if not _begun:
        return
    directory = _begun.pop()
    # matplotlib is needed where there is something to draw.
    from dppo.report.making import report

    if not any(directory.rglob("result.json")):
        return
    try:
        page = report(
            [directory], directory / "report", metric="win_rate", baseline=None, n_bootstrap=10_000, title=None
        )
    except UserError as error:
        _log.warning("no report: %s", error)
    except Exception as error:
        _log.warning("no report (%s: %s); python -m dppo.report %s shows why", type(error).__name__, error, directory)
    else:
        print(f"report {page}", flush=True)
