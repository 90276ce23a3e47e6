"""``tracking=jsonl``: everything that a tracker is told, one JSON object a line."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from dppo.loop import Interrupted
from dppo.results import final_scalars
from dppo.tracking import STEP, Place, StudyInfo, Table
from dppo.tracking.json_lines import FILE, JsonLines
from tests.runs import Finished
from tests.tracked_runs import POINTS, metrics, run_tracked

WORDS = ("tracking=jsonl", POINTS)


def events(directory: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (directory / FILE).read_text().splitlines()]


def of_kind(found: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    return [{key: value for key, value in one.items() if key != "event"} for one in found if one["event"] == kind]


def merged(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of one step together."""
    found: dict[int, dict[str, Any]] = {}
    for row in rows:
        found.setdefault(row[STEP], {}).update(row)
    return list(found.values())


def test_a_run_is_told_whole_also_when_it_was_interrupted_before(tmp_path: Path) -> None:
    def stop(row: dict[str, float | int]) -> None:
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        run_tracked(tmp_path, "run", *WORDS, verdict=stop)
    first = events(tmp_path / "run")
    assert first[-1] == {"event": "finish", "status": "interrupted", "final": {}}

    place = Place("group", "trial", "trial 0", ("preset",), {"loss": "unll"})
    run_tracked(tmp_path, "run", *WORDS, place=place)
    found = events(tmp_path / "run")
    assert list(dict.fromkeys(one["event"] for one in found)) == [
        "start",
        "stage",
        "metrics",
        "table",
        "histogram",
        "finish",
    ]
    (start,) = of_kind(found, "start")
    assert start["id"] == first[0]["id"]
    assert (start["group"], start["job_type"], start["tags"]) == ("group", "trial", ["preset", "unll"])
    assert start["config"]["train"]["steps"] == 8
    assert merged(of_kind(found, "metrics")) == metrics(tmp_path / "run")
    stages = {one["title"]: one for one in of_kind(found, "stage")}
    assert set(stages) == {"sft", "y_gen", "reference"}
    place_of_sft = tmp_path / "cache" / stages["sft"]["id"].replace("-", "/")
    kept = [json.loads(line) for line in (place_of_sft / "metrics.jsonl").read_text().splitlines()]
    assert stages["sft"]["rows"] == kept
    finished = Finished(tmp_path / "run", ())
    (table,) = of_kind(found, "table")
    assert table["name"] == "samples"
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["rows"]] == finished.samples
    (histogram,) = of_kind(found, "histogram")
    assert {sum(counts) for counts in histogram["counts"].values()} == {8}
    assert len(histogram["edges"]) == len(histogram["counts"]["policy_reward"]) + 1
    (finish,) = of_kind(found, "finish")
    expected = {key: value for key, value in final_scalars(finished.result).items() if key != "schema"}
    assert finish == {"status": "complete", "final": expected}


def test_a_study_is_told_and_numbers_that_are_not_finite_are_null(tmp_path: Path) -> None:
    table = Table(("trial", "value"), ((0, 0.5), (1, float("-inf"))))
    final = {"best": float("nan"), "n": 2}
    info = StudyInfo("id", "name", tmp_path, ("study",), {"a": [1]}, {"trials": table}, {"f": "t"}, final, "complete")
    JsonLines().study(info)
    JsonLines().study(info)  # anew, not appended
    assert events(tmp_path) == [
        {
            "event": "start",
            "id": "id",
            "name": "name",
            "group": "name",
            "job_type": "study",
            "tags": ["study"],
            "config": {"a": [1]},
        },
        {"event": "table", "name": "trials", "columns": ["trial", "value"], "rows": [[0, 0.5], [1, None]]},
        {"event": "file", "name": "f", "text": "t"},
        {"event": "finish", "status": "complete", "final": {"best": None, "n": 2}},
    ]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs a device that is always full")
def test_a_full_disk_costs_the_run_nothing(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / FILE).symlink_to("/dev/full")
    run_tracked(tmp_path, "run", *WORDS)
    assert Finished(tmp_path / "run", ()).result["status"] == "complete"
    (line,) = [record.getMessage() for record in caplog.records if record.name == "dppo.tracking"]
    assert line.startswith("warning: tracking=jsonl: ")
    assert "no space left" in line
    assert line.endswith("; this run goes on without it")
