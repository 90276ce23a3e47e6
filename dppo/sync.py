"""``python -m dppo.sync PATHS``: upload the offline W&B runs of run, study or multirun directories."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from dppo.command_line import EXIT_FAILED, Parser, command
from dppo.tracking.uploads import Session, check_reachable, sessions, upload


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 if an upload failed, 2 for a user's error."""
    arguments = _parser().parse_args(argv)
    found = sessions(arguments.paths)
    todo = [one for one in found if not one.synced and not one.busy]
    for one in found:
        if not one.synced and one not in todo:
            print(f"skipped {_place(one)}: is still being written")
    counted = f"{len(todo)} to upload, {sum(one.synced for one in found)} uploaded before"
    if arguments.dry_run:
        for one in todo:
            print(f"would upload {_place(one)}")
        print(counted)
        return 0
    if not todo:
        print(counted)
        return 0
    check_reachable()
    failed = 0
    for number, one in enumerate(todo, start=1):
        reason = upload(one, arguments.timeout)
        failed += reason is not None
        told = "uploaded" if reason is None else "failed"
        print(f"[{number}/{len(todo)}] {told} {_place(one)}{'' if reason is None else f': {reason}'}", flush=True)
    again = "; the same command tries them again" if failed else ""
    print(f"{len(todo) - failed} uploaded, {failed} failed{again}")
    return EXIT_FAILED if failed else 0


def _place(session: Session) -> str:
    return os.path.relpath(session.directory)


def _parser() -> Parser:
    parser = Parser(prog="python -m dppo.sync", description=__doc__)
    parser.add_argument("paths", nargs="+", type=Path, help="directories of runs, studies or multiruns")
    parser.add_argument("--dry-run", action="store_true", help="only list what would be uploaded")
    parser.add_argument(
        "--timeout", type=_seconds, default=600.0, metavar="SECONDS", help="how long one run may take (%(default)g)"
    )
    return parser


def _seconds(text: str) -> float:
    try:
        if (value := float(text)) > 0:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number > 0")


if __name__ == "__main__":
    sys.exit(main())
