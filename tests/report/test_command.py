"""``python -m dppo.report``, and the reports that multiruns make of themselves."""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import pytest

import dppo.__main__ as entry
from dppo.report import writing
from dppo.report.__main__ import main
from tests.conftest import small
from tests.report.made_runs import make_run, unll


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    """Two seeds of two configurations."""
    for seed in range(2):
        make_run(tmp_path / "runs" / f"dpo{seed}", "loss=dpo", seed=seed, policy=(1.0, 1.0, -1.0, 0.5))
        make_run(tmp_path / "runs" / f"unll{seed}", "loss=unll", seed=seed, loss=unll(0.1), policy=(1.0, 1.0, 1.0, 0.5))
    return tmp_path / "runs"


def configurations(report: Path) -> list[dict[str, str]]:
    with (report / "tables" / "configurations_0.csv").open() as file:
        return list(csv.DictReader(file))


def test_the_report_lies_beside_the_runs(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(runs), "--n-bootstrap", "200"]) == 0
    assert capsys.readouterr().out == f"{runs / 'report' / 'report.html'}\n"
    first, second = configurations(runs / "report")
    assert (first["configuration"], first["win rate against SFT"]) == ("loss=unll", "1")
    assert (second["configuration"], second["win rate against SFT"]) == ("loss=dpo", "0.75")
    assert (first["difference"], second["difference"]) == ("0.25", "")
    assert first["n"] == "4" and first["seeds"] == "2 (0, 1)"


def test_the_baseline_metric_title_and_place_can_be_chosen(runs: Path, tmp_path: Path) -> None:
    place = tmp_path / "elsewhere"
    words = ["--output", str(place), "--baseline", "loss=unll", "--metric", "reward", "--title", "A <title>"]
    assert main([str(runs), "--n-bootstrap", "200", *words]) == 0
    first, second = configurations(place)
    assert float(first["mean reward"]) == 0.875 and first["difference"] == ""
    assert float(second["difference"]) == pytest.approx(0.375 - 0.875)
    assert "<title>A &lt;title&gt;</title>" in (place / "report.html").read_text()
    assert not (runs / "report").exists()


def test_a_new_report_takes_the_place_of_the_old_one(runs: Path) -> None:
    assert main([str(runs), "--n-bootstrap", "200"]) == 0
    (runs / "report" / "figures" / "old.png").write_text("")
    (runs / "report" / "notes.txt").write_text("mine")
    assert main([str(runs), "--n-bootstrap", "200"]) == 0
    assert not (runs / "report" / "figures" / "old.png").exists()
    assert sorted(path.name for path in (runs / "report").iterdir()) == [
        "figures",
        "notes.txt",
        "report.html",
        "tables",
    ]


def refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.count("\n") == 1
    return said.err


def test_what_is_refused(runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere: is not a directory" in refused([str(tmp_path / "nowhere")], capsys)
    (tmp_path / "empty").mkdir()
    assert "no finished run" in refused([str(tmp_path / "empty")], capsys)
    said = refused([str(runs), "--baseline", "loss=ipo"], capsys)
    assert "--baseline loss=ipo" in said and "loss=dpo" in said and "loss=unll" in said
    assert "--n-bootstrap 99: must be" in refused([str(runs), "--n-bootstrap", "99"], capsys)
    assert "accuracy" in refused([str(runs), "--metric", "accuracy"], capsys)
    (tmp_path / "file").write_text("")
    assert "file" in refused([str(runs), "--output", str(tmp_path / "file" / "below")], capsys)
    assert not (runs / "report").exists()


def test_an_interrupted_report_leaves_nothing_and_no_traceback(
    runs: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupt(page: object) -> str:
        raise KeyboardInterrupt

    monkeypatch.setattr(writing, "render", interrupt)
    assert main([str(runs), "--n-bootstrap", "200"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    assert not (runs / "report").exists()


def typed(folder: Path, monkeypatch: pytest.MonkeyPatch, *words: str) -> int:
    """Run the command line inside this process."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["dppo", *words])
    return entry.main()


def test_a_multirun_makes_its_report_also_where_a_job_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Say {n}.", "chosen": f"{n}!", "rejected": "No."} for n in range(200)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = small("report=true", "dataset=pairs_file", "reward=length", "loss=unll", "sft=none", "hydra.sweep.dir=many")
    assert typed(tmp_path, monkeypatch, *words, "alpha=0,0.01,0.1", "dataset.path=pairs.jsonl,absent.jsonl", "-m") == 2
    said = capfd.readouterr()
    assert "absent.jsonl" in said.err and "Traceback" not in said.err
    assert said.out.splitlines()[-1] == "report many/report/report.html"
    found = configurations(tmp_path / "many" / "report")
    assert sorted(row["configuration"] for row in found) == ["alpha=0", "alpha=0.01", "alpha=0.1"]
    assert (tmp_path / "many" / "report" / "figures" / "hyperparameter_search.png").exists()


def test_no_report_where_none_is_wanted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for words in (["report=true", "dry_run=true"], ["report=false", "hydra.sweep.dir=many"]):
        assert typed(tmp_path, monkeypatch, *small("loss=none", *words), "seed=0,1", "-m") == 0
        assert "report.html" not in capfd.readouterr().out
    assert list(tmp_path.rglob("result.json")) and not list(tmp_path.rglob("report.html"))
