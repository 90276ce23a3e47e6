"""What W&B holds of a run is what the run's own files hold: read back from the files that W&B wrote."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from dppo import cache, config
from dppo.errors import Pruned
from dppo.loop import Interrupted
from dppo.results import final_scalars
from dppo.tracking import SHARED, STEP, Place, RunInfo, StageInfo
from tests.conftest import small
from tests.runs import Finished
from tests.searches import start, until
from tests.tracked_runs import POINTS, Session, metrics, run_tracked, sessions

OFFLINE = ("tracking=wandb", POINTS)


@pytest.fixture(scope="module", autouse=True)
def _no_account(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Nothing of this machine's W&B account, and no folder of one test's in another's."""
    with pytest.MonkeyPatch.context() as patched:
        for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
            patched.delenv(name)
        patched.setenv("HOME", str(tmp_path_factory.mktemp("home")))
        yield
        for name in [name for name in os.environ if name.startswith("WANDB_")]:
            patched.delenv(name)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of one cache: SFT was built by a run that nobody tracked, then ``run`` was tracked."""
    root = tmp_path_factory.mktemp("mirror")
    run_tracked(root, "untracked", "seed=5")
    place = Place("a study", "trial", "trial 3", ("a_preset",), {"loss": "unll", "penalty": "quadratic"})
    run_tracked(root, "run", *OFFLINE, "alpha=0.25", place=place)
    return root


@pytest.fixture(scope="module")
def session(root: Path) -> Session:
    (found,) = sessions(root / "run")
    return found


def test_every_number_of_every_row_is_in_the_history_at_its_step(root: Path, session: Session) -> None:
    expected = metrics(root / "run")
    assert session.rows == expected
    assert [row[STEP] for row in expected] == list(range(9))
    assert [row[STEP] for row in expected if "interim/win_rate" in row] == [2, 4, 6]
    assert {"train/loss", "train/grad_norm", "train/rewards/chosen", "train/rewards/margins"} <= expected[1].keys()
    assert set(session.step_metrics) == {"train/*", "eval/*", "interim/*"}
    assert set(session.step_metrics.values()) == {STEP}
    shown = {key for row in session.rows for key in row if key != STEP}
    assert {key.partition("/")[0] for key in shown} == {"train", "eval", "interim"}, "all have the step metric"


def test_final_scalars_are_the_results(root: Path, session: Session) -> None:
    result = Finished(root / "run", ()).result
    expected = {f"final/{key}": value for key, value in final_scalars(result).items() if key != "schema"}
    assert {key: value for key, value in session.summary.items() if key.startswith("final/")} == expected
    rate = result["win_rate"]
    assert [session.summary[f"win_rate_{key}"] for key in ("value", "ci_low", "ci_high")] == [
        rate["value"],
        rate["ci_low"],
        rate["ci_high"],
    ]
    assert session.summary["status"] == "complete"
    assert session.code == 0


def test_the_run_says_what_it_is(root: Path, session: Session) -> None:
    told = session.told
    assert (told.project, told.run_group, told.job_type) == ("dppo", "a study", "trial")
    assert told.display_name.startswith("trial 3 unll(alpha=0.25, quadratic")
    assert told.display_name.endswith(" seed=0")
    assert len(told.display_name) <= 100
    assert session.tags == ["a_preset", "unll"]
    config = session.config
    assert config["hp"]["train.steps"] == config["train"]["steps"] == 8
    assert config["hp"]["alpha"] == config["alpha"] == 0.25
    assert config["method"] == "unll"
    assert config["choices"] == {"loss": "unll", "penalty": "quadratic"}
    assert "seed" not in config["configuration"]


def test_the_samples_are_all_there(root: Path, session: Session) -> None:
    samples = Finished(root / "run", ()).samples
    table = session.table("samples")
    assert {"prompt", "reference_answer", "policy_answer", "reference_reward", "policy_reward", "outcome"} <= set(
        table["columns"]
    )
    assert [dict(zip(table["columns"], row, strict=True)) for row in table["data"]] == samples


def test_both_models_rewards_are_counted_in_the_same_bins(root: Path, session: Session) -> None:
    (row,) = [row for row in session.history if "histogram/policy_reward/bins" in row]
    edges = row["histogram/policy_reward/bins"]
    assert edges == row["histogram/reference_reward/bins"]
    samples = Finished(root / "run", ()).samples
    assert edges[0] <= min(min(one["policy_reward"], one["reference_reward"]) for one in samples)
    assert edges[-1] >= max(max(one["policy_reward"], one["reference_reward"]) for one in samples)
    for who in ("policy", "reference"):
        counts = row[f"histogram/{who}_reward/values"]
        assert len(counts) == len(edges) - 1
        for at, count in enumerate(counts):
            last = at == len(counts) - 1
            inside = [
                one
                for one in samples
                if edges[at] <= one[f"{who}_reward"] and (one[f"{who}_reward"] < edges[at + 1] or last)
            ]
            assert count == len(inside)


def test_shared_stages_are_logged_once_and_linked(root: Path, session: Session) -> None:
    parents = {item["stage"]: item["fingerprint"] for item in json.loads((root / "run" / "parents.json").read_text())}
    linked = session.config["stages"]
    assert linked["sft"] == f"sft-{parents['sft']}"
    assert set(linked) == {"sft", "y_gen", "reference"}
    places = json.loads((root / "run" / "wandb" / "stages.json").read_text())
    for title, place in places.items():
        (found,) = sessions(Path(place))
        assert found.told.run_id == linked[title]
        assert found.told.job_type == {"y_gen": "generate"}.get(title, title)
        assert found.told.run_group == "shared stages"
        assert found.code == 0
        artifact = root / "cache" / Path(linked[title].replace("-", "/"))
        assert found.config["inputs"] == json.loads((artifact / "manifest.json").read_text())["inputs"]
        rows: list[dict[str, Any]] = [{STEP: row.pop(STEP), **row} for row in found.rows]
        if title == "sft":  # its training curve, although the run that trained it was not tracked
            assert rows == metrics(artifact)
            assert [row[STEP] for row in rows] == [0, 1, 2, 3, 4]
        else:
            assert found.summary["final/rows"] > 0

    before = {path: path.stat().st_mtime_ns for path in (root / "cache" / SHARED).rglob("*")}
    run_tracked(root, "another", *OFFLINE, "seed=1")
    (another,) = sessions(root / "another")
    assert another.config["stages"]["sft"] == linked["sft"]
    written = [path for path in (root / "cache" / SHARED).rglob("*.wandb") if path not in before]
    # Another seed reaches other pairs, in the same stores.
    assert written == []


def test_phases_with_stages_of_their_own_link_to_each(tmp_path: Path) -> None:
    settings = config.load(config.compose(["tracking=wandb"]), ["tracking=wandb"]).tracking
    tracker = settings.start(RunInfo("id", "name", None, "experiment", (), tmp_path / "run", {}))
    for fingerprint in ("a" * 64, "b" * 64, "a" * 64):
        tracker.stage(StageInfo("y_gen", "generate", fingerprint, tmp_path / "home", {}, [], {"rows": 1}))
    tracker.finish("complete", {})
    (found,) = sessions(tmp_path / "run")
    assert found.config["stages"] == {"y_gen": f"generate-{'a' * 64}", "y_gen_2": f"generate-{'b' * 64}"}
    assert len(list((tmp_path / "home").rglob("*.wandb"))) == 2


def test_the_cache_commands_leave_what_is_tracked_alone(
    root: Path, session: Session, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    copied = tmp_path / "cache"
    shutil.copytree(root / "cache", copied)
    kept = sorted((copied / SHARED).rglob("*.wandb"))
    assert kept
    assert cache.main(["verify", "--dir", str(copied)]) == 0
    assert cache.main(["ls", "--dir", str(copied)]) == 0
    assert "wandb" not in capsys.readouterr().out
    assert cache.main(["gc", "--all", "--dir", str(copied)]) == 0
    assert sorted((copied / SHARED).rglob("*.wandb")) == kept


def test_a_run_that_is_reused_is_mirrored_whole(root: Path, session: Session) -> None:
    run_tracked(root, "run-again", *OFFLINE, "alpha=0.25")
    (again,) = sessions(root / "run-again")
    assert again.rows == session.rows
    assert again.told.run_id != session.told.run_id, "another directory is another run"
    run_tracked(root, "run-again", *OFFLINE, "alpha=0.25")
    (once_more,) = sessions(root / "run-again")
    assert once_more.told.run_id == again.told.run_id
    assert once_more.path != again.path


def test_an_interrupted_run_is_closed_and_continues_its_curve(root: Path) -> None:
    """Ctrl-C after the second of three measurements; the same command again."""

    def stop(row: dict[str, float | int]) -> None:
        if row["interim/percent"] == 50:
            os.kill(os.getpid(), signal.SIGINT)

    words = (*OFFLINE, "seed=2")
    with pytest.raises(Interrupted):
        run_tracked(root, "stopped", *words, verdict=stop)
    (first,) = sessions(root / "stopped")
    assert first.code == 255
    assert first.summary["status"] == "interrupted"
    assert first.tags == ["unll", "interrupted"]
    assert [row[STEP] for row in first.rows] == [0, 1, 2, 3, 4]
    run_tracked(root, "stopped", *words)
    (second,) = sessions(root / "stopped")
    assert second.told.run_id == first.told.run_id
    assert second.rows == metrics(root / "stopped")
    assert [row[STEP] for row in second.rows] == list(range(9))
    assert second.rows[:4] == first.rows[:4]
    assert second.code == 0


def test_pruned_diverged_and_failed_runs_are_marked(root: Path) -> None:
    with pytest.raises(Pruned):
        run_tracked(root, "pruned", *OFFLINE, "seed=3", verdict=lambda row: "worse")
    run_tracked(root, "diverged", *OFFLINE, "train.learning_rate=1e30", "train.schedule=constant")

    def fails(row: object) -> None:
        raise RuntimeError("power cut")

    with pytest.raises(RuntimeError, match="power cut"):
        run_tracked(root, "failed", *OFFLINE, "seed=4", verdict=fails)
    for name, code in (("pruned", 0), ("diverged", 0), ("failed", 1)):
        (found,) = sessions(root / name)
        assert (found.summary["status"], found.code) == (name, code)
        assert (name in found.tags) == (name != "failed")
        assert found.rows == metrics(root / name)
    result = Finished(root / "diverged", ()).result
    (found,) = sessions(root / "diverged")
    assert found.summary["final/diverged.step"] == result["diverged"]["step"]


def test_a_tracker_that_dies_costs_the_run_nothing(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    """W&B's own process is killed while the run trains."""

    def kill(row: object) -> None:
        for child in psutil.Process().children(recursive=True):
            if "wandb-core" in child.name():
                child.kill()
                child.wait()

    started = time.monotonic()
    run_tracked(root, "lost", *OFFLINE, "seed=6", verdict=kill)
    assert time.monotonic() - started < 90
    assert Finished(root / "lost", ()).result["status"] == "complete"
    lines = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len([line for line in lines if line.startswith("warning: tracking=wandb: ")]) == 1
    # The next run of this process is tracked again.
    run_tracked(root, "found", *OFFLINE, "seed=6")
    (found,) = sessions(root / "found")
    assert found.rows == metrics(root / "found")


@pytest.fixture
def _apart(monkeypatch: pytest.MonkeyPatch) -> None:
    """Processes that are started do not share this process's W&B service."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


@pytest.mark.usefixtures("_apart")
def test_a_killed_run_continues_with_its_curve_whole(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "dppo")
    more = (*OFFLINE, "train.steps=60", "train.checkpoint_every=10")
    words = small("loss=unll", *more, f"cache.dir={root / 'cache'}", "device=cpu")
    process = start(root, *words, "hydra.run.dir=killed")

    def n_rows() -> int:
        path = root / "killed" / "metrics.jsonl"
        return len(path.read_text().splitlines()) if path.exists() else 0

    try:
        until(lambda: n_rows() > 30, process)
    finally:
        process.kill()
        process.communicate()
    (first,) = sessions(root / "killed")
    assert first.code is None
    run_tracked(root, "killed", *more)
    assert "  main: continues after step" in caplog.text
    (second,) = sessions(root / "killed")
    assert second.path != first.path
    assert second.told.run_id == first.told.run_id
    assert second.rows == metrics(root / "killed")
    assert [row[STEP] for row in second.rows] == list(range(61))
    assert second.code == 0
