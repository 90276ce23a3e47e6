"""What a run or a search left: everything that must not depend on how often it was killed."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import re
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from dppo import cache
from dppo.artifacts.layout import TAG, Layout
from dppo.artifacts.maintenance import contents
from dppo.artifacts.manifest import Manifest
from dppo.artifacts.stores import JsonRows, TokenRows
from tests.chaos.runs import Case

# Of rows of metrics and of trials' tables: what a clock says.
_CLOCK = ("timings", "seconds", "tokens_per_second", "seconds_per_step", "duration", "started", "ended", "datetime")


def outcome(case: Case, folder: Path) -> dict[str, Any]:
    """By name: numbers, hashes of files and rows."""
    found = {**cached(folder / "cache")}
    if case.study is None:
        return found | directory("run", folder / "run")
    return found | _study(folder, case.study)


def differences(expected: dict[str, Any], found: dict[str, Any]) -> list[str]:
    """One line for each name whose value differs."""
    lines = []
    for name in sorted(expected.keys() | found.keys()):
        if name not in found:
            lines.append(f"{name} is lost")
        elif name not in expected:
            lines.append(f"{name} is new")
        elif expected[name] != found[name]:
            lines.append(f"{name}: {str(found[name])[:200]} instead of {str(expected[name])[:200]}")
    return lines


def unsound(folder: Path) -> list[str]:
    """What ``verify`` finds in the cache, and what ``gc`` leaves of unfinished work."""
    said = io.StringIO()
    root = folder / "cache"
    with redirect_stdout(said):
        verified = cache.main(["verify", "--dir", str(root)])
        collected = cache.main(["gc", "--dir", str(root), "--runs", str(folder), "--grace", "1000", "--work", "0"])
    lines = [f"verify, gc: {line}" for line in said.getvalue().splitlines()] if verified or collected else []
    for name in (".building", ".work", ".trash"):
        # A file that was being written may have a writer yet, for all gc knows, until it is a day old.
        left = [path for path in (root / name).glob("*") if path.suffix != ".tmp"]
        lines += [f"gc leaves {path.relative_to(root)}" for path in left]
    assert (root / TAG).exists()
    return lines


def leftovers(folder: Path) -> int:
    """How many files and folders that nobody will use lie about, until ``gc`` takes them."""
    root = folder / "cache"
    unfinished = [path for name in (".building", ".work", ".trash") for path in (root / name).glob("*")]
    return len(unfinished) + len(list(folder.rglob(".*.tmp")))


def cached(root: Path) -> dict[str, Any]:
    """Every artifact by the hashes of its files, every store by its rows."""
    found: dict[str, Any] = {}
    formats = {"json rows": JsonRows(), "token rows": TokenRows()}
    for item in contents(Layout(root)):
        name = f"{item.stage} {item.fingerprint[:8]}"
        if item.kind in ("unfinished", "damaged"):
            if item.kind == "damaged":
                found[name] = "damaged"
            continue
        if item.kind == "artifact":
            for file in Manifest.read(item.path).files:
                path = item.path / file
                found[f"{name}/{file}"] = _rows(path) if path.suffix == ".jsonl" else _hash(path.read_bytes())
            continue
        rows: dict[str, str] = {}
        for shard in sorted((item.path / "shards").glob("[!.]*")):
            form: Any = formats[item.kind]
            keys = form.keys(shard)
            for key, row in zip(keys, form.rows(shard, range(len(keys))), strict=True):
                data = json.dumps(row).encode() if item.kind == "json rows" else row.tobytes()
                rows.setdefault(key, _hash(data))
        found |= {f"{name}/{key}": value for key, value in rows.items()}
    return found


def directory(name: str, path: Path) -> dict[str, Any]:
    """A run directory."""
    found: dict[str, Any] = {}
    result = json.loads((path / "result.json").read_text())
    result.pop("command")  # of a trial it has the trial's number
    found[f"{name}/result.json"] = _timeless(result)
    found[f"{name}/metrics.jsonl"] = _rows(path / "metrics.jsonl")
    for file in ("samples.jsonl", "pairs.jsonl"):
        if (path / file).exists():
            found[f"{name}/{file}"] = _hash((path / file).read_bytes())
    found[f"{name}/parents.json"] = json.loads((path / "parents.json").read_text())
    return found


def _study(folder: Path, study: str) -> dict[str, Any]:
    """The trials that count, by index and without their numbers, and the runs beside them."""
    import optuna

    from dppo.search.study import COMMAND, INDEX, WHY, counting

    place = folder / "outputs" / "sweeps" / study
    loaded = optuna.load_study(study_name=study, storage=f"sqlite:///{place}/study.db")
    found: dict[str, Any] = {}
    for trial in counting(loaded):
        index = int(trial.user_attrs[INDEX])
        assert f"trial {index}" not in found, f"two trials have index {index}"
        found[f"trial {index}"] = [
            trial.state.name,
            trial.params,
            trial.values,
            trial.intermediate_values,
            trial.user_attrs[COMMAND],
            trial.user_attrs.get(WHY),
        ]
        for path in sorted((place / str(trial.number)).rglob("result.json")):
            inner = path.parent.relative_to(place / str(trial.number))
            found |= directory(f"trial {index}/{inner}", path.parent)
    for part in ("baselines", "results"):
        for path in sorted((place / part).rglob("result.json")):
            found |= directory(_unnumbered(str(path.parent.relative_to(place))), path.parent)
    for name in ("results.csv", "best.yaml"):
        if (place / name).exists():
            text = (place / name).read_text()
            found[name] = _table(place / name) if name.endswith(".csv") else text.partition("\n")[2]
    return found


def _table(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return [{key: _unnumbered(value) for key, value in _timeless(row).items()} for row in csv.DictReader(file)]


def _unnumbered(text: str) -> str:
    """Without the numbers of trials: a trial that is begun again has another one."""
    return re.sub(r"(trial[ ,])\d+", r"\1", text)


def _rows(path: Path) -> list[dict[str, Any]]:
    return [_timeless(json.loads(line)) for line in path.read_text().splitlines()]


def _timeless(value: Any) -> Any:
    """Without what a clock says, at any depth."""
    if isinstance(value, list):
        return [_timeless(item) for item in value]
    if isinstance(value, dict):
        return {key: _timeless(item) for key, item in value.items() if not any(word in key for word in _CLOCK)}
    return value


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]
