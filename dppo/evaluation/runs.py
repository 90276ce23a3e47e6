"""Run directories, read and checked: what a run measured, how it ended, and which directories are damaged."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from dppo.errors import UserError
from dppo.results import SCHEMA
from dppo.types import Json

# ``unfinished``: there is no result.json; the run failed, was killed, or is still running.
Status = Literal["complete", "diverged", "pruned", "interrupted", "unfinished"]
# Columns of pairs.jsonl that are kept; those behind an edit are None where nothing follows it.
_LOGPS = ("chosen", "rejected", "reference_chosen", "after_edit", "reference_after_edit")


@dataclass(frozen=True, eq=False)
class Run:
    """One run directory.

    ``settings`` are the resolved configuration, ``words`` the overrides as typed, ``result`` is result.json (empty for
    an unfinished run). Of complete runs only: ``rewards`` (policy, reference) by prompt_id, and ``pairs``, log-probs of
    held-out pairs in nats by example_id, as in ``evaluation.edits.PairRow``.
    """

    path: Path
    seed: int
    settings: Mapping[str, Any]
    words: tuple[str, ...]
    status: Status
    result: Mapping[str, Any]
    rewards: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    pairs: Mapping[str, Mapping[str, float | None]] = field(default_factory=dict)

    @property
    def diverged(self) -> bool:
        return self.status == "diverged"

    @property
    def finished(self) -> bool:
        """Whether the run says something about its configuration: complete or diverged."""
        return self.status in ("complete", "diverged")

    @property
    def scored_by(self) -> list[Json]:
        """What the rewards come from: the reward's settings, and its model where the run trained one."""
        ranked = self.result.get("reward_model")
        return [self.settings.get("reward"), ranked["model"] if isinstance(ranked, Mapping) else None]

    @property
    def decoding(self) -> str:
        """How both models' answers were decoded, in words; runs from before it could be chosen are greedy."""
        return str(self.result.get("decoding", "greedy"))

    @property
    def ending(self) -> str:
        """How it ended, in a few words."""
        how = self.result.get(self.status)
        if not isinstance(how, Mapping):
            reason = ": no result.json (failed, killed or still running)" if self.status == "unfinished" else ""
            return f"{self.status}{reason}"
        when = "at" if self.diverged else "after"
        reason = f": {how['reason']}" if how.get("reason") else ""
        return f"{self.status} in phase {how.get('phase')} {when} step {how.get('step')}{reason}"

    def number(self, name: str) -> float | None:
        """A number of result.json by its dotted name; None where it has none."""
        found: Any = self.result
        for key in name.split("."):
            found = found.get(key) if isinstance(found, Mapping) else None
        return float(found) if _finite(found) and not isinstance(found, bool) else None


@dataclass(frozen=True)
class Broken:
    """A run directory that can't be read, and why, in a few words."""

    path: Path
    why: str


class _Damaged(Exception):
    """What is wrong with a run directory."""


def is_run(directory: Path) -> bool:
    """Whether a run wrote this directory, to its end or not."""
    return (directory / "result.json").is_file() or all(
        (directory / name).is_file() for name in ("config.yaml", "command.txt")
    )


def read_runs(paths: Sequence[Path]) -> tuple[list[Run], list[Broken]]:
    """All runs in these directories and below, each once, and the directories of runs that are damaged.

    Nothing about a run's files raises. Raises UserError for a path that is no directory.
    """
    runs: dict[Path, Run] = {}
    broken: dict[Path, Broken] = {}
    for path in paths:
        if not path.is_dir():
            raise UserError(f"{path}: is not a directory; give run directories, or folders that hold some")
        for directory in _candidates(path):
            place = directory.resolve()
            if place in runs or place in broken:
                continue
            try:
                runs[place] = _read(directory)
            except _Damaged as damage:
                broken[place] = Broken(directory, str(damage))
    return list(runs.values()), list(broken.values())


def find_runs(paths: Sequence[Path]) -> list[Run]:
    """All finished runs in these directories and below. Raises UserError if there are none, or one is damaged."""
    runs, broken = read_runs(paths)
    for one in broken:
        raise UserError(f"{one.path}: is not a run that can be read ({one.why})")
    found = [run for run in runs if run.finished]
    if not found:
        raise UserError(f"{' '.join(map(str, paths))}: no finished run (result.json) in there")
    return found


def complete_run(path: Path, lacks: str) -> Run:
    """The complete run of a directory. Raises UserError: one that did not end well has no ``lacks``, in words."""
    if not path.is_dir() or not is_run(path):
        raise UserError(f"{path}: is not the directory of a run")
    runs, broken = read_runs([path])
    for one in broken:
        if one.path == path:
            raise UserError(f"{path}: can't be read ({one.why}); run it again")
    run = next(run for run in runs if run.path == path)
    if run.status != "complete":
        raise UserError(f"{path}: has no {lacks}, it is {run.ending}; give a complete run")
    return run


def rewards_in(directory: Path) -> dict[str, tuple[float, float]]:
    """(policy, reference) rewards by prompt_id. Raises UserError if they can't be read."""
    try:
        return _rewards(directory)
    except _Damaged as damage:
        raise UserError(f"{directory}: {damage}; run it again") from None


def sample_rows(run: Run) -> dict[str, dict[str, Any]]:
    """The rows of samples.jsonl by prompt_id: ``prompt``, ``policy_answer``, ``reference_answer``, the rewards.

    Texts are as the models wrote them. Raises UserError if they can't be read.
    """
    try:
        rows = _rows(run.path / "samples.jsonl")
        for number, row in enumerate(rows, start=1):
            if not all(isinstance(row.get(name), str) for name in ("prompt", "policy_answer", "reference_answer")):
                raise _Damaged(f"samples.jsonl, line {number}: needs a prompt and two answers")
    except _Damaged as damage:
        raise UserError(f"{run.path}: {damage}; run it again") from None
    return {str(row["prompt_id"]): row for row in rows}


def _candidates(path: Path) -> Iterator[Path]:
    for place, folders, _ in os.walk(path):
        folders.sort()
        if is_run(Path(place)):
            yield Path(place)


def _read(directory: Path) -> Run:
    settings = _settings(directory)
    try:
        words = shlex.split(_text(directory / "command.txt"))[3:]
    except ValueError:
        raise _Damaged("command.txt is not a command line") from None
    result = _result(directory)
    status: Status = result["status"] if result else "unfinished"
    complete = status == "complete"
    rewards = _rewards(directory) if complete else {}
    asked = result.get("n_prompts", len(rewards))
    if complete and asked != len(rewards):
        raise _Damaged(f"samples.jsonl has {len(rewards)} of {asked} prompts")
    pairs = _pairs(directory) if complete else {}
    return Run(directory, settings["seed"], settings, tuple(words), status, result, rewards, pairs)


def _settings(directory: Path) -> dict[str, Any]:
    import yaml

    text = _text(directory / "config.yaml")
    try:
        settings = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise _Damaged("config.yaml is not YAML") from None
    if not isinstance(settings, dict) or type(settings.get("seed")) is not int:
        raise _Damaged("config.yaml is not the configuration of a run: it has no seed")
    if isinstance(settings.get("dataset"), dict):
        settings["dataset"].pop("cache_dir", None)  # a copy of cache.dir, which says where and not what
    if isinstance(settings.get("evaluation"), dict) and settings["evaluation"].get("sampling") is None:
        settings["evaluation"].pop("sampling", None)  # runs from before it could be chosen are greedy as well
    return settings


def _result(directory: Path) -> dict[str, Any]:
    """The content of result.json; nothing where there is none."""
    path = directory / "result.json"
    if not path.exists():
        return {}
    try:
        result = json.loads(_text(path))
    except (ValueError, RecursionError):
        raise _Damaged("result.json is not JSON, perhaps only half of it was copied") from None
    if not isinstance(result, dict):
        raise _Damaged("result.json is not the result of a run")
    if result.get("schema") != SCHEMA:
        raise _Damaged(f"result.json has schema {result.get('schema')!r}, this version reads {SCHEMA}")
    if result.get("status") not in get_args(Status):
        raise _Damaged(f"result.json has the unknown status {result.get('status')!r}")
    return result


def _rewards(directory: Path) -> dict[str, tuple[float, float]]:
    found = {}
    for number, row in enumerate(_rows(directory / "samples.jsonl"), start=1):
        own, other = (row.get(name, math.nan) for name in ("policy_reward", "reference_reward"))
        if "prompt_id" not in row or not (_finite(own) and _finite(other)):
            raise _Damaged(f"samples.jsonl, line {number}: needs a prompt_id and two finite rewards")
        found[str(row["prompt_id"])] = float(own), float(other)
    if not found:
        raise _Damaged("samples.jsonl is empty")
    return found


def _pairs(directory: Path) -> dict[str, dict[str, float | None]]:
    found = {}
    for number, row in enumerate(_rows(directory / "pairs.jsonl"), start=1):
        values = {name: row.get(name) for name in _LOGPS}
        numbers = [value for name, value in values.items() if value is not None or "after_edit" not in name]
        if "example_id" not in row or not all(map(_finite, numbers)):
            raise _Damaged(f"pairs.jsonl, line {number}: needs an example_id and log-probs")
        found[str(row["example_id"])] = values
    return found


def _finite(value: object) -> bool:
    return isinstance(value, (int, float)) and abs(value) <= sys.float_info.max


def _rows(path: Path) -> list[dict[str, Any]]:
    rows = []
    # Not splitlines(): an answer may hold separators that JSON leaves as they are.
    for number, line in enumerate(_text(path, may_be_empty=True).split("\n"), start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError):
            raise _Damaged(f"{path.name}, line {number}: is not JSON, perhaps only half of it was copied") from None
        if not isinstance(row, dict):
            raise _Damaged(f"{path.name}, line {number}: is not a row")
        rows.append(row)
    return rows


def _text(path: Path, *, may_be_empty: bool = False) -> str:
    try:
        if path.exists() and not path.is_file():  # reading a pipe would wait for a writer
            raise _Damaged(f"{path.name} is no file")
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise _Damaged(f"{path.name} is missing") from None
    except OSError as error:
        raise _Damaged(f"{path.name} can't be read: {error.strerror}") from None
    except UnicodeDecodeError:
        raise _Damaged(f"{path.name} is not text in UTF-8") from None
    if not text.strip() and not may_be_empty:
        raise _Damaged(f"{path.name} is empty")
    return text
