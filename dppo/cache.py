"""``python -m dppo.cache ls|verify|gc``: what is in the cache, whether it is sound, what of it nobody needs."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from dppo.artifacts import maintenance
from dppo.artifacts.fingerprint import short
from dppo.artifacts.layout import Layout
from dppo.command_line import Parser, aligned, command

DEFAULT = Path("outputs/cache")


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 if ``verify`` found damage, 2 for a user's error."""
    arguments = _parser().parse_args(argv)
    layout = maintenance.open_layout(arguments.dir)
    if arguments.command == "verify":
        return _verify(layout, remove=arguments.remove)
    outputs = arguments.runs or [arguments.dir.resolve().parent]
    return _ls(layout, outputs) if arguments.command == "ls" else _gc(layout, outputs, arguments)


def _parser() -> Parser:
    common = Parser(add_help=False)
    common.add_argument("--dir", type=Path, default=DEFAULT, help="the cache (default: %(default)s)")
    runs = Parser(add_help=False)
    runs.add_argument(
        "--runs",
        type=Path,
        action="append",
        help="where run directories are (default: the folder that the cache is in); may be repeated",
    )
    parser = Parser(prog="python -m dppo.cache", description="The cache of computed stages.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="ls|verify|gc")
    commands.add_parser("ls", parents=[common, runs], help="list artifacts, and which runs use them")
    verify = commands.add_parser(
        "verify", parents=[common], help="hash every file; exit status 1 if something is damaged"
    )
    verify.add_argument("--remove", action="store_true", help="delete what is damaged, so that it is built again")
    gc = commands.add_parser("gc", parents=[common, runs], help="remove what no run refers to")
    gc.add_argument("--dry-run", action="store_true", help="only say what would be removed")
    gc.add_argument("--all", action="store_true", help="also what runs refer to; only what is in use now stays")
    gc.add_argument("--grace", type=_number, default=1.0, metavar="HOURS", help="keep what was used in the last (1)")
    gc.add_argument("--work", type=_number, default=7.0, metavar="DAYS", help="keep checkpoints younger than (7)")
    return parser


def _number(text: str) -> float:
    try:
        if (value := float(text)) >= 0:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"{text!r} is not a number >= 0")


def _ls(layout: Layout, outputs: Sequence[Path]) -> int:
    items = maintenance.contents(layout)
    users: dict[str, list[str]] = {}
    for run in maintenance.runs(layout, outputs):
        for fingerprint in maintenance.reachable(items, run.uses):
            users.setdefault(fingerprint, []).append(_relative(run.path, outputs))
    table = [("stage", "id", "kind", "rows", "size", "last used", "parents", "used by")]
    for item in items:
        names = users.get(item.fingerprint, [])
        more = f" (+{len(names) - 2})" if len(names) > 2 else ""
        table.append(
            (
                item.stage,
                item.fingerprint[:8],
                item.kind,
                "-" if item.rows is None else str(item.rows),
                size(item.bytes),
                f"{age(time.time() - item.used)} ago",
                " ".join(map(short, item.parents)) or "-",
                ", ".join(names[:2]) + more or "-",
            )
        )
    print("\n".join(aligned(table)))
    print(f"{len(items)} in {layout.root}, {size(sum(item.bytes for item in items))}")
    return 0


def _verify(layout: Layout, *, remove: bool) -> int:
    found = 0
    for damage in maintenance.verify(layout, remove=remove):
        found += 1
        after = " - removed" if damage.removed else " - in use, not removed" if remove else ""
        print(f"damaged: {damage.path}: {damage.problem}{after}")
    items = [item for item in maintenance.contents(layout) if item.kind != "unfinished"]
    print(f"{len(items)} in {layout.root}, {size(sum(item.bytes for item in items))}: {found or 'nothing'} damaged")
    return 1 if found else 0


def _gc(layout: Layout, outputs: Sequence[Path], arguments: argparse.Namespace) -> int:
    verb = "would remove" if arguments.dry_run else "removed"
    removals = []
    for removal in maintenance.collect(
        layout,
        outputs,
        grace=arguments.grace * 3600,
        work_age=arguments.work * 86400,
        everything=arguments.all,
        dry_run=arguments.dry_run,
    ):
        removals.append(removal)
        print(f"{verb} {removal.what} ({size(removal.bytes)}): {removal.reason} [{removal.path}]")
    stay = {item.path for item in maintenance.contents(layout)} - {removal.path for removal in removals}
    total = size(sum(removal.bytes for removal in removals))
    print(f"{verb} {len(removals)}, {total}; {len(stay)} stay in {layout.root}")
    return 0


def size(number: float) -> str:
    """Bytes for people, such as ``12.3 MB`` (powers of 1000)."""
    for unit in ("B", "kB", "MB", "GB"):
        if number < 1000:
            return f"{number:.0f} B" if unit == "B" else f"{number:.1f} {unit}"
        number /= 1000
    return f"{number:.1f} TB"


def age(seconds: float) -> str:
    """Seconds for people, such as ``3 h``; a time in the future, after the clock was set back, is ``0 s``."""
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{int(seconds // length)} {unit}"
    return f"{max(int(seconds), 0)} s"


def _relative(path: Path, outputs: Sequence[Path]) -> str:
    for top in outputs:
        if path.is_relative_to(top.resolve()):
            return str(path.relative_to(top.resolve()))
    return str(path)


if __name__ == "__main__":
    sys.exit(main())
