"""Searches with Optuna: reproducible, resumed after kill -9, honest about failures, refused before they start."""

from __future__ import annotations

import csv
import math
import os
import shlex
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState, create_trial

from dppo import config, pipeline
from dppo.config import CONF_DIR
from dppo.errors import UserError
from dppo.results import command_line
from dppo.search import report, winners
from dppo.search import study as studies
from dppo.search.samplers import Sampler, sampler_from
from dppo.search.settings import Direction, SearchSettings
from dppo.search.space import Parameter, Space, Value
from dppo.search.study import Study
from tests.conftest import small
from tests.test_architecture import imports
from tests.test_command_line import is_one_line, typed

FIXED = "alpha=tag(log, interval(1e-5, 1.0))"


def load(folder: Path, name: str) -> optuna.Study:
    return optuna.load_study(study_name=name, storage=f"sqlite:///{folder}/outputs/sweeps/{name}/study.db")


def counted(study: optuna.Study) -> list[FrozenTrial]:
    found = [trial for trial in study.get_trials() if studies.ABANDONED not in trial.user_attrs]
    return sorted(found, key=lambda trial: int(trial.user_attrs[studies.INDEX]))


def rows(path: Path) -> list[dict[str, str]]:
    with path.open() as file:
        return list(csv.DictReader(file))


def test_failing_and_diverging_trials_are_recorded_and_the_search_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", "hydra/sweeper=optuna", "hydra/sweeper/sampler=grid", "loss=dpo", *small()]
    words += ["device=cuda,cpu", "train.learning_rate=choice(1e-4,1e30)"]
    words += ["objectives=[win_rate.value,kl.nats_per_answer]", "hydra.sweeper.direction=[maximize,minimize]"]
    status, done = typed(monkeypatch, tmp_path, *words), capfd.readouterr()
    assert status == 0, done.err
    directory = tmp_path / "outputs" / "sweeps" / "search"
    assert [row["state"] for row in rows(directory / "trials.csv")] == ["failed", "failed", "complete", "diverged"]
    study = load(tmp_path, "search")
    assert study.get_trials()[3].values == [0.0, math.inf]
    assert "no CUDA device" in study.get_trials()[0].user_attrs[studies.ERROR]
    assert "no CUDA device" in (directory / "0" / "error.txt").read_text()
    assert "Pareto front: 1 of 4 trials" in done.out
    assert [row["trial"] for row in rows(directory / "pareto.csv")] == ["2"]
    words += ["hydra.sweeper.study_name=fewer", "hydra.sweeper.max_failure_rate=0.25"]
    assert typed(monkeypatch, tmp_path, *words) == 2
    assert "2 of 4 trials failed, more than hydra.sweeper.max_failure_rate=0.25 allows" in capfd.readouterr().err
    assert len(load(tmp_path, "fewer").get_trials()) == 2


REFUSED: list[tuple[str, list[str], list[str]]] = [
    ("unknown sampler", ["hydra/sweeper/sampler=tpee"], ["sampler=tpee", "Did you mean tpe?"]),
    ("reversed interval", ["alpha=interval(2,1)"], ["alpha=", "must not be above"]),
    ("half an interval", ["alpha=interval(2)"], ["alpha=interval(2)"]),
    ("logarithm of zero", ["alpha=tag(log,interval(0.0,1))"], ["alpha=", "above 0"]),
    ("empty range", ["alpha=range(1,1)"], ["alpha=range(1,1)", "no value"]),
    ("unknown tag", ["alpha=tag(lin,interval(0.0,1))"], ["the only tag is log"]),
    ("out of range", ["alpha=interval(-1.0,1)"], ["alpha=-1.0", ">= 0"]),
    ("unknown key", ["alhpa=interval(0.0,1)"], ["alhpa", "Did you mean alpha?"]),
    ("unused by one loss", ["loss=unll,dpo"], ["loss=dpo", "nothing in this run uses alpha", "hydra.sweeper.when"]),
    ("nothing searched", ["alpha=0.1"], ["nothing is searched"]),
    ("grid of an interval", ["hydra/sweeper/sampler=grid"], ["alpha=", "grid needs choice"]),
    ("number of trials", ["hydra.sweeper.n_trials=many"], ["hydra.sweeper.n_trials=many", "whole number"]),
    ("no trial", ["hydra.sweeper.n_trials=0"], ["hydra.sweeper.n_trials=0"]),
    ("direction", ["hydra.sweeper.direction=up"], ["direction", "up", "maximize"]),
    ("too few directions", ["objectives=[win_rate.value,n_prompts]"], ["objectives=", "[maximize,minimize]"]),
    ("unknown objective", ["objectives=[win_rate.valeu]"], ["Did you mean win_rate.value?"]),
    ("seed", ["hydra.sweeper.sampler.seed=null"], ["seed"]),
    ("foreign sampler", ["hydra.sweeper.sampler._target_=os.system"], ["os.system", "optuna."]),
    (
        "a choice in a choice",
        ["train.n_examples=choice(5,sort(3,1))"],
        ["train.n_examples=choice(5,sort(3,1))", "no further"],
    ),
    ("a key searched twice", ["train.n_examples=1,2", "train.n_examples=3,4"], ["train.n_examples is swept twice"]),
    ("condition of nothing", ["+hydra.sweeper.when.beta={loss:[dpo]}"], ["when.beta", "is not searched"]),
    ("condition on nothing", ["+hydra.sweeper.when.alpha={lost:[dpo]}"], ["when.alpha.lost"]),
    ("no database", ["hydra.sweeper.storage=sqlite:///bad.db"], ["bad.db", "not a database"]),
    ("no storage", ["hydra.sweeper.storage=here"], ["hydra.sweeper.storage=here", "sqlite:///"]),
    ("unknown storage", ["hydra.sweeper.storage=sqlit:///x"], ["Did you mean sqlite?"]),
    ("locked", ["hydra.sweeper.storage=sqlite:///locked.db"], ["locked.db", "locked"]),
    ("directories", ["hydra.sweep.subdir=here"], ["hydra.sweep.subdir"]),
    ("several processes", ["WORLD_SIZE=2"], ["torchrun"]),
    ("unknown pruner", ["hydra/sweeper/pruner=medain"], ["pruner=medain", "Did you mean median?"]),
    ("wilcoxon without replicates", ["hydra/sweeper/pruner=wilcoxon"], ["replicates=1", "at least 2"]),
    (
        "wilcoxon with steps",
        ["hydra/sweeper/pruner=wilcoxon", "hydra.sweeper.replicates=3", "evaluation.interim.n_points=3"],
        ["wilcoxon", "evaluation.interim.n_points"],
    ),
    ("pruner that sees nothing", ["evaluation.interim.n_points=0"], ["n_points=0", "pruner=none"]),
    ("argument of a pruner", ["hydra.sweeper.pruner.n_startup_trials=-1"], ["MedianPruner", "n_startup_trials"]),
    ("no constraint", ['hydra.sweeper.constraints=["kl<0.5"]'], ["constraints=kl<0.5", "<="]),
    ("constraint on nothing", ['hydra.sweeper.constraints=["kl.nats<=0.5"]'], ["kl.nats", "Did you mean"]),
    ("label of nothing", ["+hydra.sweeper.labels.beta=nuisance"], ["labels.beta", "is not searched"]),
    ("unknown label", ["hydra.sweeper.labels.alpha=fixed"], ["labels.alpha=fixed", "scientific"]),
    ("enqueued outside", ['hydra.sweeper.enqueue=["alpha=0"]'], ["alpha=0", "is outside", "baselines"]),
    ("enqueued unknown", ['hydra.sweeper.enqueue=["zeta=0.5"]'], ["zeta is not searched"]),
    ("enqueued nothing", ['hydra.sweeper.enqueue=[""]'], ["enqueue", "lacks alpha"]),
    ("baseline with a typo", ['hydra.sweeper.baselines=["losss=dpo"]'], ["losss"]),
    ("baseline out of range", ['hydra.sweeper.baselines=["alpha=-1"]'], ["baselines=alpha=-1", ">= 0"]),
    ("seed searched", ["seed=choice(0,1)", "hydra.sweeper.replicates=2"], ["seed", "replicates"]),
    ("number of workers", ["hydra.sweeper.n_jobs=0"], ["n_jobs=0", "at least 1"]),
    ("code of one's own", ["hydra.sweeper.custom_search_space=os.system"], ["os.system", "allowed_targets"]),
    (
        "no such code",
        ["hydra.sweeper.custom_search_space=tests.nothing", "allowed_targets=[tests]"],
        ["tests.nothing", "no such function"],
    ),
    (
        "password",
        ["hydra.sweeper.storage='postgresql://me:secret@localhost/x'"],
        ["postgresql://me@localhost/x", "oc.env"],
    ),
    ("calibrated for several penalties", ["penalty=linear,sqrt", "alpha=calibrated"], ["calibrated", "penalty"]),
    ("calibrated without a penalty", ["loss=dpo", "alpha=calibrated"], ["alpha", "nothing in this run uses alpha"]),
]


@pytest.mark.parametrize(("words", "named"), [case[1:] for case in REFUSED], ids=[case[0] for case in REFUSED])
def test_a_search_is_refused_in_one_line_before_its_first_trial(
    words: list[str],
    named: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "bad.db").write_text("not a database")
    connection = sqlite3.connect(tmp_path / "locked.db")
    if "locked" in words[0]:
        connection.execute("BEGIN EXCLUSIVE")
        connect = sqlite3.connect
        monkeypatch.setattr(
            sqlite3.dbapi2, "connect", lambda *given, **named: connect(*given, **{**named, "timeout": 0})
        )
    for word in [word for word in words if word.startswith("WORLD_SIZE")]:
        monkeypatch.setenv(*word.split("="))
        words = []
    searched = [] if any(word.startswith("alpha=") for word in words) else [FIXED]
    status = typed(monkeypatch, tmp_path, "-m", "+sweep=alpha", *searched, *words)
    output = capfd.readouterr()
    connection.close()
    is_one_line(status, output.err, output.out, named)
    assert "secret" not in output.err + output.out
    assert not list(tmp_path.glob("outputs/sweeps/*/[0-9]*"))


def test_an_existing_or_changed_study_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = ["-m", "+sweep=alpha_zeta", "penalty=linear", FIXED, "hydra.sweeper.n_trials=1", *small()]
    words += ["hydra.sweeper.baselines=[]", "hydra.sweeper.test_seeds=0"]
    assert typed(monkeypatch, tmp_path, *words) == 0
    (trial,) = load(tmp_path, "alpha_zeta").get_trials()
    assert set(trial.params) == {"alpha"}, "zeta shapes another penalty"

    def refused(*more: str, without: Sequence[str] = ()) -> str:
        capfd.readouterr()
        assert typed(monkeypatch, tmp_path, *[word for word in words if word not in without], *more) == 2
        (line,) = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
        return line

    line = refused()
    assert "study alpha_zeta exists in sqlite:///outputs/sweeps/alpha_zeta/study.db with 1 trials" in line
    assert "hydra.sweeper.resume=true" in line
    resume = "hydra.sweeper.resume=true"
    line = refused(resume, "alpha=interval(0.5,1)", without=[FIXED])
    assert "alpha: tag(log, interval(1e-05,1)) -> interval(0.5,1)" in line
    line = refused(resume, "penalty=expectile", without=["penalty=linear"])
    assert "zeta: absent -> interval(0.05,0.95) when penalty in expectile" in line
    assert "train.steps: 8 -> 9" in refused(resume, "train.steps=9", without=["train.steps=8"])
    assert "direction: maximize -> minimize" in refused(resume, "hydra.sweeper.direction=minimize")
    assert "belongs to a sweep" in refused("hydra.sweeper.storage=sqlite:///elsewhere.db")
    assert typed(monkeypatch, tmp_path, *words, resume, "device=cpu") == 0, "where it runs makes no difference"


def test_an_interrupted_search_says_how_to_go_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def interrupted(*given: object, **named: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "run", interrupted)
    assert typed(monkeypatch, tmp_path, "-m", "+sweep=alpha", FIXED, "hydra.sweeper.baselines=[]") == 130
    assert "interrupted: the same command with hydra.sweeper.resume=true continues" in capfd.readouterr().err
    (trial,) = load(tmp_path, "alpha").get_trials()
    assert trial.state == TrialState.RUNNING


def test_a_death_while_reclaiming_takes_no_index_twice(tmp_path: Path) -> None:
    settings = search_settings(n_trials=3, sampler=settings_of("random"))
    sampler = sampler_from(settings.sampler, MAXIMIZE)
    found = Study(optuna.create_study(direction="maximize"), settings, Space((ALPHA,), {}, {}), sampler, tmp_path, [])
    lost = [found.ask(), found.ask()]
    assert lost[0] is not None and lost[1] is not None
    for trial in found.study.get_trials(deepcopy=False):
        found._note(trial, {studies.OWNER: {**trial.user_attrs[studies.OWNER], "started": 0.0}})
    found._note(found.study.get_trials()[0], {studies.ABANDONED: True})  # as far as the dead one came
    reclaimed = found.reclaim()
    assert reclaimed is not None
    again = reclaimed[1]
    assert found.reclaim() is None
    assert again.values == lost[1].values
    assert [trial.state for trial in found.study.get_trials()[:2]] == [TrialState.FAIL] * 2
    fresh = found.ask()
    assert fresh is not None
    assert fresh.values == lost[0].values
    assert [trial.user_attrs[studies.INDEX] for trial in found.trials()] == [0, 1]


def test_other_applications_pay_nothing_for_the_plugin() -> None:
    plugin = Path(__file__).resolve().parent.parent / "hydra_plugins" / "dppo_sweeper.py"
    roots = {name.partition(".")[0] for name in imports(plugin, top_level_only=True)}
    assert roots <= {*sys.stdlib_module_names, "hydra", "omegaconf"}
    assert "ConfigStore" not in plugin.read_text()


def test_the_lost_are_reclaimed_and_the_living_are_not() -> None:
    own = studies._owner()
    assert not studies.is_gone(own)
    assert studies.is_gone({**own, "started": own["started"] - 100}), "the number belongs to another process now"
    assert studies.is_gone({**own, "boot": "another"}), "the machine was started again"
    assert not studies.is_gone({**own, "pid": 2**22 + 1, "host": "another"}), "another machine can't be asked"
    if Path("/proc/uptime").exists():  # a clock that is set makes nobody another one: it is not looked at
        since_start = float(Path("/proc/uptime").read_text().split()[0])
        assert 0 < own["started"] <= since_start
    child = subprocess.Popen([sys.executable, "-c", "pass"])
    child.wait()
    assert studies.is_gone({**own, "pid": child.pid, "host": socket.gethostname()})
    assert own["pid"] == os.getpid()


# --- spaces and samplers ---------------------------------------------------------------------------------------------

ALPHA = Parameter("alpha", "float", low=1e-4, high=1.0, log=True)
STEPS = Parameter("train.steps", "int", low=2, high=8, step=3)
LOSS = Parameter("loss", "choice", choices=("unll", "dpo"), texts=("unll", "dpo"))
RATE = Parameter("rate", "float", low=0.1, high=0.4, step=0.1)
CONDITIONAL = Space((ALPHA, LOSS, STEPS), {"alpha": {"loss": ("unll",)}}, {})
OWN_KEYS = ("_target_", "_recursive_", "_convert_")
MAXIMIZE: tuple[Direction, ...] = ("maximize",)


def search(sampler: Sampler, space: Space, n_trials: int) -> list[dict[str, Value]]:
    """What a sampler proposes for trials whose value is their alpha; one is infinitely bad, one failed, one runs."""
    trials: list[FrozenTrial] = []
    for index in range(n_trials):
        values = sampler.propose(space, index, trials, MAXIMIZE).values
        score = float(values.get("alpha") or 0.0) if index != 1 else -math.inf
        kept = {one.name: one.distribution() for one in space.parameters if one.name in values}
        state = {2: TrialState.FAIL, 3: TrialState.RUNNING}.get(index, TrialState.COMPLETE)
        value = score if state == TrialState.COMPLETE else None
        trials.append(create_trial(state=state, params=dict(values), distributions=kept, value=value))
    return [dict(trial.params) for trial in trials]


def search_settings(**given: Any) -> SearchSettings:
    """The settings of conf/hydra/sweeper/optuna.yaml with some changed."""
    found = yaml.safe_load((CONF_DIR / "hydra" / "sweeper" / "optuna.yaml").read_text())
    plain = {key: value for key, value in found.items() if key not in ("defaults", *OWN_KEYS)}
    plain |= {"direction": ["maximize"], "sampler": settings_of("tpe"), "pruner": {}, "storage": "sqlite:///x"}
    built: SearchSettings = config.typed(SearchSettings, plain | given, "hydra.sweeper")
    return built


def settings_of(name: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load((CONF_DIR / "hydra" / "sweeper" / "sampler" / f"{name}.yaml").read_text())
    return found


@pytest.mark.parametrize("name", [path.stem for path in (CONF_DIR / "hydra" / "sweeper" / "sampler").glob("*.yaml")])
def test_every_sampler_is_reproducible_and_stays_within_the_space(name: str) -> None:
    space = Space((LOSS, STEPS), {}, {}) if name == "grid" else CONDITIONAL
    if name == "cmaes":
        space = Space((ALPHA, Parameter("zeta", "float", low=0.0, high=1.0)), {}, {})
    try:
        sampler = sampler_from(settings_of(name), MAXIMIZE)
    except UserError as error:
        assert name in ("cmaes", "gp")
        assert "pip install 'dppo[samplers]'" in str(error)
        pytest.skip(str(error))
    n_trials = sampler.limit(space) or 14
    found = search(sampler, space, n_trials)
    assert found == search(sampler, space, n_trials)
    for values in found:
        for one in space.active(values):
            assert one.distribution()._contains(one.distribution().to_internal_repr(values[one.name]))
        assert ("alpha" in values) == (ALPHA in space.active(values))
    assert len({str(values) for values in found}) > n_trials / 2
    if "seed" in settings_of(name):
        assert search(sampler_from({**settings_of(name), "seed": 1}, MAXIMIZE), space, n_trials) != found


def test_a_space_in_words() -> None:
    assert ALPHA.word(1e-5) == "alpha=1e-05"
    assert STEPS.all_values() == [2, 5, 8]
    assert RATE.all_values() == [0.1, 0.2, 0.3, 0.4]
    assert ALPHA.tidy(0.123456789) == 0.123457
    assert ALPHA.tidy(1.0000001) == 1.0
    assert [ALPHA.end_near(value) for value in (1e-4, 1e-2, 0.9)] == ["lower", None, "upper"]
    assert LOSS.end_near("unll") is None
    assert Space((RATE,), {}, {}).grid() == [{"rate": value} for value in (0.1, 0.2, 0.3, 0.4)]
    assert len(list(CONDITIONAL.corners(64))) == 6, "two ends of alpha and of the steps, and dpo without alpha"
    assert list(CONDITIONAL.corners(5)) == [
        {"alpha": 1e-4, "loss": "unll", "train.steps": 2},
        {"alpha": 1.0, "loss": "unll", "train.steps": 2},
        {"loss": "dpo", "train.steps": 2},
        {"alpha": 1e-4, "loss": "unll", "train.steps": 8},
    ]
    assert CONDITIONAL.description()["alpha"] == "tag(log, interval(0.0001,1)) when loss in unll"
    assert CONDITIONAL.keep({"alpha": 0.1, "loss": "dpo"}) == {"loss": "dpo"}
    with pytest.raises(UserError, match="depend on each other"):
        Space((ALPHA, LOSS), {"alpha": {"loss": ("unll",)}, "loss": {"alpha": ("1",)}}, {}).active({})


def test_the_report_names_the_best_the_boundary_and_what_mattered(tmp_path: Path) -> None:
    zeta = Parameter("zeta", "float", low=0.0, high=1.0)
    settings = search_settings(n_trials=24, sampler=settings_of("qmc"))
    sampler = sampler_from(settings.sampler, MAXIMIZE)
    found = Study(
        optuna.create_study(direction="maximize"), settings, Space((ALPHA, zeta), {}, {}), sampler, tmp_path, []
    )
    while (asked := found.ask()) is not None:
        (tmp_path / str(asked.number)).mkdir()
        (tmp_path / str(asked.number) / "config.yaml").write_text("seed: 0\n")
        alpha = asked.values["alpha"]
        assert isinstance(alpha, float)
        found.complete(asked, [math.log(alpha)], "complete" if alpha < 0.9 else "diverged")
    lines = report.write(found, ["win_rate.value"]).lines
    winner = winners.best(found)[0]
    assert winner.params["alpha"] == max(
        trial.params["alpha"] for trial in found.trials() if winners.state(trial) == "complete"
    )
    assert any(line.startswith(f"  alpha={winner.params['alpha']!r} lies at the upper end") for line in lines)
    (line,) = [line for line in lines if line.startswith("importance")]
    assert line.index("alpha") < line.index("zeta")
    assert (tmp_path / "best.yaml").read_text().endswith("seed: 0\n")
    assert len(rows(tmp_path / "trials.csv")) == 24


def test_a_command_line_can_be_pasted() -> None:
    words = ["+sweep=alpha", "objectives=[win_rate.value]", ALPHA.word(0.5)]
    assert shlex.split(command_line(words))[3:] == words
