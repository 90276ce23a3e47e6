"""A search that is tracked: its summary run, the upload of all that it left, and the workspace that compares it."""

from __future__ import annotations

import csv
import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from dppo import config, dashboard, sync
from dppo.search.summary import RECORD
from dppo.tracking.uploads import sessions as found_sessions
from dppo.tracking.weights_and_biases import lock_of
from tests.conftest import once, small
from tests.forks import Forks
from tests.tracked_runs import Session, metrics, sessions
from tests.wandb_server import Received, forget, serve

KEY = "planted0123456789abcdef0123456789abcdef0"
SEARCH = [
    "-m",
    "hydra/sweeper=optuna",
    "alpha=tag(log, interval(1e-4,1))",
    "hydra.sweeper.n_trials=2",
    'hydra.sweeper.baselines=["loss=none"]',
    "hydra.sweeper.test_seeds=1",
    "hydra.sweeper.study_name=tiny",
    *small("loss=unll", "tracking=wandb", "tracking.project=tests", "device=cpu"),
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory, forks: Forks) -> Path:
    """The folder in which the search ran."""

    def build(root: Path) -> None:
        (root / "home").mkdir()
        kept = {name: value for name, value in os.environ.items() if not name.startswith(("WANDB_", "NETRC"))}
        done = forks.run("dppo", SEARCH, cwd=root, env={**kept, "HOME": str(root / "home")}, timeout=300)
        assert done.returncode == 0, done.stderr

    return once(tmp_path_factory, "tracked-study", build)


@pytest.fixture(scope="module")
def study(outputs: Path) -> Path:
    return outputs / "outputs" / "sweeps" / "tiny"


def one_session(directory: Path) -> Session:
    (found,) = sessions(directory)
    return found


def test_the_summary_run_holds_the_study(study: Path) -> None:
    found = one_session(study)
    told = found.told
    assert (told.display_name, told.run_group, told.job_type, told.project) == ("study tiny", "tiny", "study", "tests")
    assert (found.code, found.summary["status"]) == (0, "complete")
    with (study / "trials.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["state"] != "baseline"]
    table = found.table("trials")
    trials = [dict(zip(table["columns"], row, strict=True)) for row in table["data"]]
    assert [str(one["trial"]) for one in trials] == [row["trial"] for row in rows]
    for one, row in zip(trials, rows, strict=True):
        assert f"{one['alpha']:.6g}" == f"{float(row['alpha']):.6g}"
        for end in ("", " low", " high"):
            assert f"{one[f'win_rate.value{end}']:.6g}" == row[f"win_rate.value{end}"]
        assert (one["state"], one["command"]) == (row["state"], row["command"])
    assert found.config["files"]["best.yaml"] == (study / "best.yaml").read_text()
    (best,) = found.config["best"]
    assert found.summary["final/best.trial"] == best["trial"]
    assert found.summary["final/n_complete"] == 2
    assert found.table("best_trials")["data"] == [row for row in table["data"] if row[0] == best["trial"]]
    results = found.table("results")
    (sft,) = [row for row in results["data"] if row[0] == "loss=none"]
    assert dict(zip(results["columns"], sft, strict=True)) | {"p": None} == {
        "configuration": "loss=none",
        "seeds": 1,
        "n": 8,
        "win_rate": 0.5,
        "low": 0.5,
        "high": 0.5,
        "difference": None,
        "difference low": None,
        "difference high": None,
        "p": None,
    }
    assert len(found.table("baselines")["data"]) == 1


def test_every_run_of_the_study_says_what_it_is(study: Path) -> None:
    kinds = {
        "0": "trial",
        "1": "trial",
        "baselines/loss=none/seed=0": "baseline",
        "results/loss=none/seed=1": "result",
    }
    linked = set()
    for place, job_type in kinds.items():
        found = one_session(study / place)
        assert (found.told.run_group, found.told.job_type) == ("tiny", job_type)
        assert found.told.display_name.startswith(f"{job_type} {place.split('/')[-2 if '/' in place else 0]}")
        assert found.config["choices"]["loss"] == ("none" if "none" in place else "unll")
        assert found.config["method"] == ("none" if "none" in place else "unll")
        linked.add(found.config["stages"]["sft"])
        if job_type == "trial":
            assert found.rows == metrics(study / place)
    assert len(linked) == 1


# --- python -m dppo.sync ---------------------------------------------------------------------------------------------


@pytest.fixture
def copied(outputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of what the search left, as the working directory, without any account."""
    shutil.copytree(outputs / "outputs", tmp_path / "outputs")
    for path in (tmp_path / "outputs").rglob("stages.json"):
        path.write_text(path.read_text().replace(str(outputs), str(tmp_path)))
    (tmp_path / "home").mkdir()
    for name in [name for name in os.environ if name.startswith(("WANDB_", "NETRC"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Received]:
    with serve() as received:
        monkeypatch.setenv("WANDB_BASE_URL", received.url)
        monkeypatch.setenv("WANDB_API_KEY", KEY)
        forget()
        yield received
        forget()


@dataclass
class Done:
    status: int
    out: list[str]
    err: list[str]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Callable[..., Done]:
    """A command inside this process; W&B's uploader is a process of its own in any case."""

    def run(main: Callable[[list[str]], int], *words: str) -> Done:
        capsys.readouterr()
        status = main(list(words))
        said = capsys.readouterr()
        return Done(status, said.out.splitlines(), said.err.splitlines())

    return run


def test_all_of_a_study_is_uploaded_what_failed_is_tried_again(
    copied: Path, server: Received, run: Callable[..., Done]
) -> None:
    place, sft = "outputs/sweeps/tiny/baselines", "outputs/cache/.tracked/wandb/tests/sft-"
    listed = run(sync.main, place, "--dry-run")
    assert (listed.status, listed.out[-1]) == (0, "2 to upload, 0 uploaded before")
    assert sum(line.startswith(f"would upload {sft}") for line in listed.out) == 1
    assert server.requests == []

    server.broken = True
    failed = run(sync.main, place)
    assert (failed.status, failed.out[-1]) == (1, "0 uploaded, 2 failed; the same command tries them again")
    assert failed.out[0].startswith("[1/2] failed outputs/")
    assert failed.out[0].endswith(": out of order")
    assert list(copied.rglob("*.synced")) == []
    assert len(server.requests) >= 2

    server.broken = False
    done = run(sync.main, place)
    assert (done.status, done.out[-1]) == (0, "2 uploaded, 0 failed")
    own = one_session(Path(place) / "loss=none" / "seed=0")
    assert server.runs[own.told.run_id]["groupName"] == "tiny"
    assert server.runs[own.told.run_id]["jobType"] == "baseline"
    assert server.exit_codes[own.told.run_id] == 0
    assert server.summary[own.told.run_id]["win_rate_value"] == 0.5
    (trained,) = own.config["stages"].values()
    (kept,) = (one for path in copied.glob(f"{sft}*") for one in sessions(path))
    arrived = [{key: value for key, value in row.items() if key[0] != "_"} for row in server.rows(trained)]
    assert arrived == kept.rows
    assert len(arrived) == 5

    again = run(sync.main, place)
    assert (again.status, again.out) == (0, ["0 to upload, 2 uploaded before"])
    assert KEY not in "".join([*failed.out, *failed.err, *done.out, *done.err])


def test_sync_without_a_login_or_a_network_says_one_line(
    copied: Path, server: Received, run: Callable[..., Done], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("WANDB_API_KEY")
    done = run(sync.main, "outputs/sweeps/tiny")
    assert done.status == 2
    (line,) = done.err
    assert line.startswith(f"error: no login for {server.url}: run `wandb login`")
    monkeypatch.setenv("WANDB_API_KEY", KEY)
    with socket.socket() as nobody:
        nobody.bind(("127.0.0.1", 0))
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{nobody.getsockname()[1]}")
        forget()
        done = run(sync.main, "outputs/sweeps/tiny")
    assert done.status == 2
    (line,) = done.err
    assert "does not answer" in line and "with a network" in line
    assert list(copied.rglob("*.synced")) == []


def test_a_server_that_never_answers_is_given_up(copied: Path, server: Received, run: Callable[..., Done]) -> None:
    """It answers the first question, whether it is there, and nothing else."""
    server.silent_after = 1
    done = run(sync.main, "outputs/sweeps/tiny/baselines", "--timeout", "1.5")
    assert done.status == 1
    assert done.out[0].endswith(": not done within 1.5 seconds; see --timeout")
    assert list(copied.rglob("*.synced")) == []


def test_a_session_that_is_being_written_waits_and_the_fullest_of_a_run_counts(
    copied: Path, run: Callable[..., Done]
) -> None:
    trial = Path("outputs/sweeps/tiny/0")
    (session,) = [one for one in found_sessions([trial]) if "sweeps" in str(one.directory)]
    code = (
        "import sys; from pathlib import Path; from dppo.artifacts.locks import try_hold\n"
        "with try_hold(Path(sys.argv[1])) as mine: print(mine, flush=True); sys.stdin.read()"
    )
    writer = subprocess.Popen(
        [sys.executable, "-c", code, str(lock_of(session.directory.parent, session.run))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert writer.stdout is not None
    assert writer.stdout.readline() == "True\n"
    busy = run(sync.main, str(trial), "--dry-run")
    writer.communicate()
    assert f"skipped {os.path.relpath(session.directory)}: is still being written" in busy.out
    assert busy.out[-1] == "3 to upload, 0 uploaded before"
    torn = session.directory.with_name(session.directory.name.replace("run-2", "run-3"))
    shutil.copytree(session.directory, torn)
    (torn / session.log.name).write_bytes(session.log.read_bytes()[:1000])
    assert session in found_sessions([trial])
    assert len(found_sessions([trial])) == 4
    nowhere = run(sync.main, "outputs/nowhere")
    assert nowhere.status == 2
    assert nowhere.err == ["error: outputs/nowhere: is not a directory; give run, study or multirun directories"]


# --- python -m dppo.dashboard ----------------------------------------------------------------------------------------

needs_workspaces = pytest.mark.skipif(find_spec("wandb_workspaces") is None, reason="needs .[dashboard]")


def specified(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[list[str], dict[str, Any]]:
    """The readable lines and the specification that a dry run prints."""
    assert dashboard.main([*words, "--dry-run"]) == 0
    lines, _, spec = capsys.readouterr().out.partition("\n{")
    found: dict[str, Any] = json.loads("{" + spec)["section"]
    return lines.splitlines(), found


@needs_workspaces
@pytest.mark.parametrize("words", ["study=tiny", "study=outputs/sweeps/tiny"])
def test_the_workspace_shows_what_the_study_searched(
    words: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines, spec = specified(capsys, words, "entity=us")
    baseline = one_session(Path("outputs/sweeps/tiny/baselines/loss=none/seed=0")).told.run_id
    assert [line.split() for line in lines if line.startswith(("workspace", "SFT"))] == [
        ["workspace", "dppo:", "tiny", "in", "us/tests"],
        ["SFT", "baseline", baseline],
    ]
    panels = [panel for section in spec["panelBankConfig"]["sections"] for panel in section["panels"]]
    kinds: dict[str, list[dict[str, Any]]] = {}
    for panel in panels:
        kinds.setdefault(panel["viewType"], []).append(panel["config"])
    (parallel,) = kinds["Parallel Coordinates Plot"]
    assert parallel["columns"][0] == {"accessor": "config:alpha.value", "displayName": "alpha", "log": True}
    assert parallel["columns"][-1]["accessor"] == "summary:win_rate_value"
    assert [one["targetKey"] for one in kinds["Parameter Importance"]] == ["win_rate_value"]
    assert {(one["xAxis"], one["yAxis"]) for one in kinds["Scatter Plot"]} == {
        ("summary:length_policy_tokens", "summary:win_rate_value"),
        ("summary:kl_nats_per_token", "summary:win_rate_value"),
    }
    for curve in kinds["Run History Line Plot"]:
        assert (curve["groupBy"], curve["groupAgg"], curve["groupArea"]) == ("configuration.value", "mean", "minmax")
        assert curve["xAxis"] == "train/global_step"
    (runs,) = spec["runSets"]
    assert [key["name"] for key in runs["grouping"]] == ["method.value", "configuration.value"]
    assert [one["value"] for one in runs["filters"]["filters"]][:1] == ["tiny"]
    assert list(runs["runFeed"]["columnPinned"])[:2] == ["run:displayName", "summary:win_rate_value"]
    assert runs["baselineRunId"]
    # Everything that is plotted is there in a trial.
    trial = one_session(Path("outputs/sweeps/tiny/0"))
    axes = {config[axis].partition(":")[2] for config in kinds["Scatter Plot"] for axis in ("xAxis", "yAxis")}
    assert axes <= trial.summary.keys()
    curves = {metric for config in kinds["Run History Line Plot"] for metric in config["metrics"]}
    logged = {key for row in trial.rows for key in row}
    assert curves <= logged
    assert {"alpha", "method", "configuration", "seed"} <= trial.config.keys()


@needs_workspaces
def test_a_name_alone_is_enough(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines, spec = specified(capsys, "study=elsewhere", "project=theirs")
    assert lines[0].split()[1:] == ["dppo:", "elsewhere", "in", "(the", "login's", "default)/theirs"]
    assert "baselineRunId" not in spec["runSets"][0]


@needs_workspaces
@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["project=x"], "error: study: missing"),
        (["study=tiny", "colour=red"], "error: colour=red: write study=NAME"),
        (["study=tinny"], "error: study=tinny: there is no such study in outputs/sweeps. Did you mean tiny? For one"),
        (["study=outputs"], "error: study=outputs: this directory has no study.json"),
    ],
)
def test_what_the_user_must_mend_is_one_line(
    words: list[str], said: str, copied: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert dashboard.main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(said)


def test_a_missing_package_is_named(
    copied: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("wandb_workspaces")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "wandb_workspaces", None)
    assert dashboard.main(["study=tiny", "--dry-run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install" in line and "wandb-workspaces" in line


def test_a_record_that_cannot_be_read_is_named(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = Path("outputs/sweeps/tiny") / RECORD
    path.write_text("{}")
    assert dashboard.main(["study=tiny"]) == 2
    assert str(path) in capsys.readouterr().err


@needs_workspaces
def test_the_page_about_tracking_names_commands_that_work(copied: Path, run: Callable[..., Done]) -> None:
    page = (Path(dashboard.__file__).parent.parent / "docs" / "tracking.md").read_text()
    (block,) = re.findall(r"```sh\n(.*?)```", page, re.DOTALL)
    found = []
    for line in block.splitlines():
        _, _, module, *words = shlex.split(line.partition("  #")[0].replace("alpha", "tiny"))
        found.append(module)
        if module == "dppo":
            config.load(config.compose(words), words)
        else:
            main = {"dppo.sync": sync.main, "dppo.dashboard": dashboard.main}[module]
            done = run(main, *dict.fromkeys([*words, "--dry-run"]))
            assert (done.status, done.err) == (0, [])
    assert set(found) == {"dppo", "dppo.sync", "dppo.dashboard"}


@needs_workspaces
def test_the_workspace_is_saved(copied: Path, server: Received, run: Callable[..., Done]) -> None:
    done = run(dashboard.main, "study=tiny", "entity=me")
    assert done.status == 0, done.err
    (address,) = done.out
    assert address.startswith(f"{server.url}/me/tests?nw=")
    (view,) = server.views
    assert json.loads(view["spec"])["section"]["runSets"][0]["filters"]["filters"][0]["value"] == "tiny"
    server.broken = True
    done = run(dashboard.main, "study=tiny", "entity=me")
    assert done.status == 2
    assert done.err[-1].startswith("error: the workspace was not saved in me/tests (")
