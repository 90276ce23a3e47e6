"""Reading run directories: how each ended, and damage that is told and breaks nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dppo import compare
from dppo.errors import UserError
from dppo.evaluation.runs import find_runs, is_run, read_runs, rewards_in, sample_rows
from tests.runs import write_run


def write_some(path: Path) -> None:
    """One run of every ending, and a directory that is none."""
    write_run(path / "whole", "loss=dpo", seed=0, rewards=[1, -1])
    write_run(path / "lost", "loss=unll", seed=0, status="diverged")
    write_run(path / "ended" / "early", "loss=unll", seed=1, status="pruned")
    write_run(path / "stopped", "loss=unll", seed=2, status="interrupted")
    write_run(path / "running", "loss=unll", seed=3, rewards=[1])
    (path / "running" / "result.json").unlink()
    (path / "notes").mkdir()
    (path / "notes" / "config.yaml").write_text("seed: 0")
    result = json.loads((path / "ended" / "early" / "result.json").read_text())
    result["pruned"] = {"phase": "main", "step": 7, "reason": "too slow"}
    (path / "ended" / "early" / "result.json").write_text(json.dumps(result))


def test_every_ending_is_told_apart(tmp_path: Path) -> None:
    write_some(tmp_path)
    runs, broken = read_runs([tmp_path, tmp_path / "whole"])
    assert broken == []
    assert {run.path.name: run.status for run in runs} == {
        "whole": "complete",
        "lost": "diverged",
        "early": "pruned",
        "stopped": "interrupted",
        "running": "unfinished",
    }
    endings = {run.path.name: run.ending for run in runs}
    assert endings["early"] == "pruned in phase main after step 7: too slow"
    assert endings["running"] == "unfinished: no result.json (failed, killed or still running)"
    assert endings["stopped"] == "interrupted"
    assert {run.path.name for run in find_runs([tmp_path])} == {"whole", "lost"}
    assert not is_run(tmp_path / "notes") and is_run(tmp_path / "running")
    (whole,) = (run for run in runs if run.status == "complete")
    assert whole.rewards == {"p0": (1.0, 0.0), "p1": (-1.0, 0.0)} == rewards_in(whole.path)
    assert whole.pairs["e0"]["after_edit"] is None
    assert whole.number("kl.nats_per_answer") == 2.0
    assert whole.number("kl") is None and whole.number("status") is None and whole.number("no.such") is None


DAMAGE = {
    "result.json empty": ("result.json", "", "result.json is empty"),
    "result.json half": ("result.json", '{"schema": 1, "sta', "result.json is not JSON"),
    "result.json list": ("result.json", "[]", "result.json is not the result of a run"),
    "schema": ("result.json", '{"schema": 99, "status": "complete"}', "schema 99, this version reads 1"),
    "no schema": ("result.json", '{"status": "complete"}', "schema None"),
    "status": ("result.json", '{"schema": 1, "status": "fine"}', "unknown status 'fine'"),
    "result.json binary": ("result.json", b"\xff\xfe\x00", "not text in UTF-8"),
    "samples missing": ("samples.jsonl", None, "samples.jsonl is missing"),
    "samples empty": ("samples.jsonl", "", "samples.jsonl is empty"),
    "samples half": ("samples.jsonl", '{"prompt_id": "p0"', "samples.jsonl, line 1: is not JSON"),
    "samples row": ("samples.jsonl", "3\n", "samples.jsonl, line 1: is not a row"),
    "samples reward": (
        "samples.jsonl",
        '{"prompt_id": "p0", "policy_reward": NaN, "reference_reward": 0}\n',
        "samples.jsonl, line 1: needs a prompt_id and two finite rewards",
    ),
    "samples fewer": (
        "samples.jsonl",
        '{"prompt_id": "p0", "policy_reward": 1, "reference_reward": 0}\n',
        "samples.jsonl has 1 of 2 prompts",
    ),
    "pairs missing": ("pairs.jsonl", None, "pairs.jsonl is missing"),
    "pairs row": ("pairs.jsonl", '{"example_id": "e0"}\n', "pairs.jsonl, line 1: needs an example_id and log-probs"),
    "config missing": ("config.yaml", None, "config.yaml is missing"),
    "config not yaml": ("config.yaml", "[", "config.yaml is not YAML"),
    "config other": ("config.yaml", "a: 1", "config.yaml is not the configuration of a run"),
    "command missing": ("command.txt", None, "command.txt is missing"),
    "command quote": ("command.txt", "python -m dppo 'a", "command.txt is not a command line"),
}


@pytest.mark.parametrize(("name", "content", "why"), DAMAGE.values(), ids=DAMAGE)
def test_damage_is_told_and_breaks_nothing(
    name: str, content: str | bytes | None, why: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_run(tmp_path / "good", "loss=dpo", seed=0, rewards=[1, -1])
    bad = write_run(tmp_path / "bad", "loss=unll", seed=0, rewards=[1, -1])
    (bad / name).unlink()
    if content is not None:
        (bad / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    runs, broken = read_runs([tmp_path])
    assert [run.path.name for run in runs] == ["good"]
    assert [one.path for one in broken] == [bad]
    assert why in broken[0].why and "\n" not in broken[0].why

    assert compare.main([str(tmp_path), "--n-bootstrap", "100"]) == 0
    first = capsys.readouterr().out.splitlines()[0]
    assert first.startswith(f"left out: {bad}: ") and why in first
    # Alone, or as one of two runs, it leaves nothing to compare.
    for paths in ([str(bad)], [str(tmp_path / "good"), str(bad)]):
        assert compare.main(paths) == 2
        said = capsys.readouterr()
        assert said.out == ""
        assert len(said.err.splitlines()) == 1 and why in said.err and str(bad) in said.err
    with pytest.raises(UserError, match="is not a run that can be read"):
        find_runs([tmp_path])


def test_answers_may_hold_line_separators_and_must_be_there(tmp_path: Path) -> None:
    path = write_run(tmp_path / "run", "loss=dpo", seed=0, rewards=[1], answers=["one\u2028two\x85three"])
    rows = (path / "samples.jsonl").read_text()
    (path / "samples.jsonl").write_text(json.dumps(json.loads(rows), ensure_ascii=False) + "\n", encoding="utf-8")
    ((run,), _) = read_runs([path])
    assert sample_rows(run)["p0"]["policy_answer"] == "one\u2028two\x85three"
    (path / "samples.jsonl").write_text('{"prompt_id": "p0", "policy_reward": 1, "reference_reward": 0}\n')
    with pytest.raises(UserError, match="line 1: needs a prompt and two answers"):
        sample_rows(run)


def test_what_is_no_directory_is_the_users_to_mend(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nowhere: is not a directory"):
        read_runs([tmp_path / "nowhere"])
    assert read_runs([tmp_path]) == ([], [])
