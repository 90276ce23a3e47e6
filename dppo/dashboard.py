"""``python -m dppo.dashboard study=NAME``: the W&B workspace that compares a study's runs, built as code."""

from __future__ import annotations

import difflib
import json
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from dppo.command_line import Parser, aligned, command
from dppo.config import CONF_DIR
from dppo.errors import UserError
from dppo.tracking import uploads, workspace
from dppo.tracking.workspace import Compared, Searched

_KEYS = ("study", "entity", "project")
_STUDIES = Path("outputs/sweeps")
_RECORD = "study.json"
# Where nothing but a name is known: what this project's searches look for.
_USUAL = (Searched("alpha", "alpha", log=True), Searched("loss", "choices.loss", log=False))
_SFT = "loss=none"


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for a user's error."""
    arguments = _parser().parse_args(argv)
    compared = _compared(_given(arguments.words))
    built = workspace.build(compared)
    if arguments.dry_run:
        print("\n".join(_lines(compared)))
        print(json.dumps(workspace.specification(built), indent=2))
        return 0
    uploads.check_reachable()
    print(workspace.save(built))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m dppo.dashboard", description=__doc__)
    parser.add_argument(
        "words", nargs="+", metavar="KEY=VALUE", help="study=NAME or study=DIRECTORY, then entity=... project=..."
    )
    parser.add_argument("--dry-run", action="store_true", help="print the workspace; needs no login")
    return parser


def _given(words: Sequence[str]) -> dict[str, str]:
    found: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (equals and value and key in _KEYS):
            raise UserError(f"{word}: write study=NAME or study=DIRECTORY; known: {', '.join(_KEYS)}")
        found[key] = value
    if "study" not in found:
        raise UserError("study: missing, give the name or the directory of a study (study=...)")
    return found


def _compared(given: Mapping[str, str]) -> Compared:
    study = given["study"]
    directory = next((path for path in (Path(study), _STUDIES / study) if (path / _RECORD).is_file()), None)
    if directory is None:
        if Path(study).is_dir():
            raise UserError(
                f"study={study}: this directory has no {_RECORD}, so it is no study's; give the study's name"
            )
        if "project" not in given:
            known = sorted(path.parent.name for path in _STUDIES.glob(f"*/{_RECORD}"))
            near = difflib.get_close_matches(study, known, n=1)
            hint = f" Did you mean {near[0]}?" if near else ""
            raise UserError(
                f"study={study}: there is no such study in {_STUDIES}.{hint} For one whose files are elsewhere give "
                "its W&B project too (project=...)"
            )
        return Compared(study, study, given.get("entity"), given["project"], _USUAL, (), None)
    record = _record(directory / _RECORD)
    tracking = record["tracking"]
    project = given.get("project") or tracking.get("project")
    if project is None:
        raise UserError(f"study={study}: was not tracked with tracking=wandb; give a W&B project (project=...)")
    return Compared(
        study=record["name"],
        group=tracking.get("group") or record["name"],
        entity=given.get("entity") or tracking.get("entity"),
        project=project,
        searched=[Searched(one["name"], _config_key(one["name"]), one["log"]) for one in record["parameters"]],
        objectives=record["objectives"],
        baseline=next(_run_ids(directory / "baselines" / _SFT), None),
    )


def _record(path: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = json.loads(path.read_text("utf-8"))
        assert {"name", "tracking", "parameters", "objectives"} <= record.keys()
    except (OSError, ValueError, AttributeError, AssertionError) as error:
        raise UserError(f"{path}: cannot be read ({type(error).__name__}); resume the study to write it anew") from None
    return record


def _config_key(name: str) -> str:
    """Where the config of a run has what is searched: a group by the option that was chosen."""
    return f"choices.{name}" if (CONF_DIR / name).is_dir() else name


def _run_ids(directory: Path) -> Iterator[str]:
    for path in sorted(directory.glob("seed=*/wandb/*run-*")):
        if match := re.fullmatch(r"(?:offline-)?run-\d{8}_\d{6}-(.+)", path.name):
            yield match[1]


def _lines(compared: Compared) -> list[str]:
    entity = compared.entity or "(the login's default)"
    searched = ", ".join(f"{one.name}{' (logarithmic)' if one.log else ''}" for one in compared.searched)
    rows = [
        ["workspace", f"dppo: {compared.study} in {entity}/{compared.project}"],
        ["runs", f"group {compared.group}, grouped by method and configuration"],
        ["searched", searched],
        ["objectives", ", ".join(compared.objectives) or "win_rate.value"],
        ["SFT baseline", compared.baseline or f"none: the study has no run of {_SFT} (hydra.sweeper.baselines)"],
    ]
    return aligned(rows)


if __name__ == "__main__":
    sys.exit(main())
