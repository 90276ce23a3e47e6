"""Which trials end early, which choices get an equal share, and what a trial tells its study while it runs."""

from __future__ import annotations

import importlib.util
import logging
import math
import random
import sqlite3
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import yaml
from optuna.trial import FrozenTrial, TrialState, create_trial

from dppo.config import CONF_DIR, SWEEPS_DIR
from dppo.errors import UserError
from dppo.search import pruners
from dppo.search.pruners import Pruner, pruner_from
from dppo.search.samplers import Stratified, sampler_from
from dppo.search.settings import Direction
from dppo.search.space import Parameter, Space, Value
from dppo.search.study import ABANDONED, INDEX, peers
from dppo.search.watch import Watch, watch
from tests.test_command_line import is_one_line, typed
from tests.test_sweeper import settings_of

MAXIMIZE: tuple[Direction, ...] = ("maximize",)
NAMES = sorted(path.stem for path in (CONF_DIR / "hydra" / "sweeper" / "pruner").glob("*.yaml"))
COMPLETE, RUNNING, PRUNED = TrialState.COMPLETE, TrialState.RUNNING, TrialState.PRUNED


def pruner_settings(name: str, **changes: Any) -> dict[str, Any]:
    path = CONF_DIR / "hydra" / "sweeper" / "pruner" / f"{name}.yaml"
    found: dict[str, Any] = yaml.safe_load(path.read_text())
    return found | changes


def pruner(name: str, **changes: Any) -> Pruner:
    return pruner_from(pruner_settings(name, **changes), 5)


def trial(state: TrialState, attributes: Mapping[str, Any] | None = None, *, number: int = 0) -> FrozenTrial:
    """A trial as the study keeps it; its own value is the objective's, not what it is judged by."""
    found = create_trial(
        state=state, value=number / 7 if state == COMPLETE else None, system_attrs=dict(attributes or {})
    )
    found.number = number
    return found


def judged(one: Pruner, states: Sequence[TrialState], values: Sequence[Mapping[int, float]], place: int = -1) -> bool:
    """Whether the trial at ``place`` ends, beside the others."""
    trials = [trial(state, number=at) for at, state in enumerate(states)]
    return one.judge(trials, place % len(trials), dict(enumerate(values)))[0]


def asked(
    one: Pruner, rows: Sequence[Sequence[float]], numbers: Sequence[int] | None = None
) -> list[tuple[int | None, dict[str, Any]]]:
    """One trial after the other, asked about its values at 20, 40, ... percent: where each ended, what it remembers."""
    trials: list[FrozenTrial] = []
    values: dict[int, dict[int, float]] = {}
    found: list[tuple[int | None, dict[str, Any]]] = []
    for place, row in enumerate(rows):
        trials.append(trial(RUNNING, number=numbers[place] if numbers else place))
        ended = None
        for nth, value in enumerate(row):
            values.setdefault(place, {})[20 * (nth + 1)] = value
            ends, attributes = one.judge(trials, place, values)
            trials[place] = trial(RUNNING, attributes, number=trials[place].number)
            if ends:
                ended = 20 * (nth + 1)
                break
        state = COMPLETE if ended is None else PRUNED
        remembered = dict(trials[place].system_attrs)
        trials[place] = trial(state, remembered, number=trials[place].number)
        found.append((ended, remembered))
    return found


# --- decisions -------------------------------------------------------------------------------------------------------


def test_every_option_builds() -> None:
    assert NAMES == ["halving", "hyperband", "median", "none", "wilcoxon"]
    built = {name: pruner(name) for name in NAMES}
    assert {name: one.on_steps for name, one in built.items()} == {
        "halving": True, "hyperband": True, "median": True, "none": False, "wilcoxon": False,
    }  # fmt: skip
    assert [built[name].name for name in ("median", "wilcoxon", "none")] == ["median", "wilcoxon", "nop"]
    assert not judged(built["none"], [COMPLETE] * 9 + [RUNNING], [{20: 1.0}] * 9 + [{20: 0.0}])


@pytest.mark.parametrize("name", ["halving", "hyperband", "median"])
def test_the_order_of_the_trials_decides_and_not_their_numbers(name: str) -> None:
    """A resumed search has gaps in its numbers and ends the same trials."""
    draws = random.Random(0)
    rows = [[draws.random() for _ in range(4)] for _ in range(16)]
    found = asked(pruner(name), rows)
    assert asked(pruner(name), rows) == found
    numbers = [at if at < 4 else 2 * at + 5 for at in range(16)]
    assert asked(pruner(name), rows, numbers) == found
    ended = [place for place, (percent, _) in enumerate(found) if percent is not None]
    assert 0 < len(ended) < 16
    assert [place for place, (percent, _) in enumerate(asked(pruner(name), rows[::-1])) if percent is not None] != ended


def test_the_median_ends_a_bad_one_and_not_a_good_one() -> None:
    rates = [{20: 0.5, 40: rate} for rate in (0.5, 0.55, 0.6, 0.65, 0.7)]
    done = [COMPLETE] * 5
    assert judged(pruner("median"), [*done, RUNNING], [*rates, {20: 0.4, 40: 0.59}])
    assert not judged(pruner("median"), [*done, RUNNING], [*rates, {20: 0.4, 40: 0.61}])
    assert not judged(pruner("median"), [*done, RUNNING], [*rates, {20: 0.61, 40: 0.3}]), "its best value counts"
    assert judged(pruner("median"), [*done, RUNNING], [*rates, {20: 0.4}]), "what others had at that percent"
    assert not judged(pruner("median"), [*done[1:], RUNNING], [*rates[1:], {20: 0.1}]), "four have been completed"
    others = [*done[1:], PRUNED, RUNNING, RUNNING]
    assert not judged(pruner("median"), others, [*rates[1:], {20: 1.0}, {20: 1.0}, {20: 0.1}]), "and one was not"
    assert judged(pruner("median"), [RUNNING, *done], [{20: 0.4}, *rates], place=0), "a trial that is run again"
    assert not judged(pruner("median"), [*done, RUNNING], [*rates, {}])
    assert not judged(pruner("median", n_warmup_steps=30), [*done, RUNNING], [*rates, {20: 0.1}])


def test_halving_remembers_what_each_trial_had_at_its_rungs() -> None:
    found = asked(pruner("halving"), [[0.5, 0.5, 0.5, 0.5], [0.4], [0.6, 0.4], [0.45], [0.7, 0.8, 0.1, 0.3]])
    assert [ended for ended, _ in found] == [None, 20, 40, 20, 80]
    kept = [{key.removeprefix("completed_rung_"): value for key, value in own.items()} for _, own in found]
    assert kept[0] == {"0": 0.5, "1": 0.5, "2": 0.5}
    assert kept[1] == {"0": 0.4}
    assert kept[2] == {"0": 0.6, "1": 0.4}
    assert kept[3] == {"0": 0.45}
    assert kept[4] == {"0": 0.7, "1": 0.8, "2": 0.3}
    # Without what the others remember the second trial would stand alone at its rung.
    trials = [trial(COMPLETE), trial(RUNNING)]
    values = {0: {20: 0.5}, 1: {20: 0.4}}
    assert not pruner("halving").judge(trials, 1, values)[0]
    trials = [trial(COMPLETE, {"completed_rung_0": 0.5, "other": 1}), trial(RUNNING, {"other": 2})]
    ends, attributes = pruner("halving").judge(trials, 1, values)
    assert ends
    assert attributes == {"completed_rung_0": 0.4}


def test_wilcoxon_ends_what_is_worse_prompt_by_prompt() -> None:
    pytest.importorskip("scipy")
    draws = random.Random(0)
    best = {prompt: draws.choice((0.0, 0.5, 1.0)) for prompt in range(40)}
    worse = {prompt: max(0.0, value - 0.5) for prompt, value in best.items()}
    shuffled = dict(zip(best, draws.sample(list(best.values()), 40), strict=True))
    for instances in ("prompts", "seeds"):
        one = pruner("wilcoxon", instances=instances)
        assert judged(one, [COMPLETE, COMPLETE, RUNNING], [shuffled, best, worse])
        assert judged(one, [COMPLETE, COMPLETE, RUNNING], [worse, best, worse]), "the best one is looked at"
        assert judged(one, [COMPLETE, COMPLETE, RUNNING], [best, worse, worse])
        assert not judged(one, [COMPLETE, RUNNING], [best, best]), "no difference"
        assert not judged(one, [COMPLETE, RUNNING], [best, shuffled]), "another order of the same values"
        assert not judged(one, [COMPLETE, RUNNING], [worse, best])
        assert not judged(one, [PRUNED, RUNNING], [best, worse]), "nothing is complete"
        assert not judged(one, [COMPLETE, RUNNING], [best, {0: 0.0}]), "one prompt"
        assert not judged(one, [COMPLETE, RUNNING], [{}, worse])


@pytest.mark.parametrize(
    ("settings", "replicates", "said"),
    [
        ({"_target_": "optuna.pruners.Median"}, 1, "_target_=optuna.pruners.Median: must be a class of optuna.pruners"),
        ({"_target_": "os.system"}, 1, "_target_=os.system: must be a class of optuna.pruners"),
        ({}, 1, "_target_=None: must be a class of optuna.pruners"),
        (pruner_settings("median", instances="prompts"), 5, "instances=prompts: is for wilcoxon, which needs it"),
        (pruner_settings("wilcoxon", instances=None), 5, "instances=None: is for wilcoxon, which needs it"),
        (pruner_settings("wilcoxon", instances="pairs"), 5, "instances=pairs: must be prompts or seeds"),
        (pruner_settings("wilcoxon", p_threshold=2.0), 5, "WilcoxonPruner: "),
        (pruner_settings("median", n_startup=3), 1, "MedianPruner: "),
        (pruner_settings("median", n_startup_trials=-1), 1, "MedianPruner: "),
        (pruner_settings("halving", reduction_factor=1), 1, "SuccessiveHalvingPruner: "),
        ({"_target_": "optuna.pruners.PatientPruner"}, 1, "PatientPruner: "),
        ({"_target_": "optuna.pruners.BasePruner"}, 1, "BasePruner: "),
    ],
)
def test_what_cannot_be_built_is_refused_in_one_line(settings: dict[str, Any], replicates: int, said: str) -> None:
    pytest.importorskip("scipy")
    with pytest.raises(UserError) as error:
        pruner_from(settings, replicates)
    assert str(error.value).startswith("hydra.sweeper.pruner")
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_wilcoxon_needs_replicates_and_scipy(monkeypatch: pytest.MonkeyPatch) -> None:
    for instances, least in (("prompts", 2), ("seeds", 4)):
        settings = pruner_settings("wilcoxon", instances=instances)
        with pytest.raises(UserError, match=f"replicates={least - 1}: .* set it to at least {least}, or choose"):
            pruner_from(settings, least - 1)
    pytest.importorskip("scipy")
    assert pruner_from(pruner_settings("wilcoxon"), 2).instances == "prompts"
    assert pruner_from(pruner_settings("wilcoxon", instances="seeds"), 4).instances == "seeds"
    monkeypatch.setattr(pruners, "find_spec", lambda name: None if name == "scipy" else importlib.util.find_spec(name))
    with pytest.raises(UserError, match=r"needs scipy: type pip install 'dppo\[samplers\]', or choose"):
        pruner_from(pruner_settings("wilcoxon"), 5)


# --- equal shares ----------------------------------------------------------------------------------------------------

RATE = Parameter("train.learning_rate", "float", low=2e-5, high=5e-4, log=True)
LAST = Parameter("phases.dpo.train.learning_rate", "float", low=2e-5, high=5e-4, log=True)
LOSSES = ("dpo", "minll", "unll", "conll")
LOSS = Parameter("loss", "choice", choices=LOSSES, texts=LOSSES)
CHAIN = Parameter("experiment", "choice", choices=("[]", "unll_then_dpo"), texts=("[]", "unll_then_dpo"))
PENALTY = Parameter("penalty", "choice", choices=("quadratic", "expectile"), texts=("quadratic", "expectile"))
ZETA = Parameter("zeta", "float", low=0.0, high=1.0)


def paradigms() -> Space:
    """The space of +sweep=training_paradigms."""
    preset = yaml.safe_load((SWEEPS_DIR / "sweep" / "training_paradigms.yaml").read_text())["hydra"]["sweeper"]
    parameters = (CHAIN, LOSS, RATE, LAST)
    assert [one.name for one in parameters] == list(preset["params"])
    when = {name: {key: tuple(words) for key, words in own.items()} for name, own in preset["when"].items()}
    return Space(parameters, when, {})


def share(
    sampler: Stratified, space: Space, n_trials: int, shift: Mapping[int, float] | None = None
) -> list[dict[str, Value]]:
    """What is proposed for trials whose value says which rates are good, in the strata of ``shift`` otherwise."""
    trials: list[FrozenTrial] = []
    n_strata = len(sampler.strata(space))
    for index in range(n_trials):
        proposal = sampler.propose(space, index, trials, MAXIMIZE)
        numbers = [value for value in proposal.values.values() if isinstance(value, float)]
        score = -sum(abs(math.log(value + 1e-9)) for value in numbers)
        kept = {one.name: one.distribution() for one in space.parameters if one.name in proposal.values}
        score *= (shift or {}).get(index % n_strata, 1.0)
        trials.append(
            create_trial(
                params=dict(proposal.values),
                distributions=kept,
                value=score,
                system_attrs=dict(proposal.attributes),
            )
        )
    return [dict(one.params) for one in trials]


@pytest.mark.parametrize("within", ["tpe", "random", "qmc"])
def test_every_choice_gets_an_equal_share(within: str) -> None:
    settings = settings_of(within)
    if within == "tpe":
        settings["n_startup_trials"] = 2
    sampler = Stratified(("experiment", "loss"), sampler_from(settings, MAXIMIZE))
    space = paradigms()
    strata = sampler.strata(space)
    assert [tuple(own.values()) for own in strata] == [*(("[]", loss) for loss in LOSSES), ("unll_then_dpo",)]
    found = share(sampler, space, 20)
    assert found == share(sampler, space, 20)
    for index, values in enumerate(found):
        own = strata[index % 5]
        assert {name: values.get(name) for name in own} == own
        number = "train.learning_rate" if own["experiment"] == "[]" else "phases.dpo.train.learning_rate"
        assert set(values) == {*own, number}
        assert 2e-5 <= values[number] <= 5e-4  # type: ignore[operator]
    for at in range(5):
        assert len({str(values) for values in found[at::5]}) == 4, "each searches for itself"
        others = {other: -1.0 for other in range(5) if other != at}
        assert share(sampler, space, 20, others)[at::5] == found[at::5], "whatever the others found"
    if within == "tpe":
        assert share(sampler, space, 20, {1: -1.0})[1::5] != found[1::5], "but not what it found itself"


def test_a_parameter_may_exist_in_some_strata_and_beside_some_nuisances() -> None:
    """zeta where penalty=expectile, penalty where the loss has one; dpo has nothing left to search."""
    space = Space((LOSS, PENALTY, ZETA), {"penalty": {"loss": LOSSES[1:]}, "zeta": {"penalty": ("expectile",)}}, {})
    sampler = Stratified(("loss",), sampler_from(settings_of("tpe"), MAXIMIZE))
    found = share(sampler, space, 40)
    for index, values in enumerate(found):
        assert values["loss"] == LOSSES[index % 4]
        assert ("penalty" in values) == (values["loss"] != "dpo")
        assert ("zeta" in values) == (values.get("penalty") == "expectile")
    assert {values["penalty"] for values in found if "penalty" in values} == {"quadratic", "expectile"}


def test_what_is_compared_may_not_depend_on_what_is_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """It would exist in no stratum, and its own default would be all that is tried."""
    words = ["alpha=choice(0.1,1.0)", "loss=unll,dpo", "+hydra.sweeper.when.alpha={loss:[unll]}"]
    status = typed(monkeypatch, tmp_path, "-m", "+sweep=alpha", *words, "hydra.sweeper.labels.alpha=scientific")
    output = capfd.readouterr()
    is_one_line(status, output.err, output.out, ["labels.alpha: is compared", "label loss scientific too"])


# --- a trial and its study -------------------------------------------------------------------------------------------


@pytest.fixture
def study(tmp_path: Path) -> optuna.Study:
    """Five complete trials, an abandoned one, and number 6 with index 5, which runs."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    made = optuna.create_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db", direction="maximize")
    for index in range(5):
        values = {20: 0.5 + index / 100, 40: 0.6 + index / 100}
        made.add_trial(create_trial(value=1.0, user_attrs={INDEX: index}, intermediate_values=values))
    made.add_trial(
        create_trial(state=TrialState.FAIL, user_attrs={INDEX: 5, ABANDONED: True}, intermediate_values={20: 0.9})
    )
    made.add_trial(create_trial(state=RUNNING, user_attrs={INDEX: 5}))
    return made


def watching(tmp_path: Path, name: str = "median", number: int = 6) -> Watch:
    settings = {
        "study_name": "s",
        "storage": f"sqlite:///{tmp_path}/study.db",
        "pruner": pruner_settings(name),
        "replicates": 1,
        "labels": {},
    }
    found = watch(settings, number, str(tmp_path))
    assert isinstance(found, Watch)
    return found


def row(percent: int, value: float) -> dict[str, float | int]:
    return {"step": percent, "interim/percent": percent, "interim/value": value, "interim/win_rate": value}


def stored(tmp_path: Path, number: int) -> FrozenTrial:
    """The trial as another process reads it."""
    found = optuna.load_study(study_name="s", storage=f"sqlite:///{tmp_path}/study.db")
    return found.get_trials()[number]


def test_a_trial_reports_and_is_ended(study: optuna.Study, tmp_path: Path) -> None:
    one = watching(tmp_path)
    assert one(row(20, 0.53)) is None
    assert stored(tmp_path, 6).intermediate_values == {20: 0.53}
    said = one(row(40, 0.57))
    assert said == "0.570 after 40 % of training, the median of 5 completed trials is 0.620 (median pruner)"
    assert stored(tmp_path, 6).intermediate_values == {20: 0.53, 40: 0.57}
    assert stored(tmp_path, 6).state == RUNNING, "the sweeper says how it ended"
    assert stored(tmp_path, 5).intermediate_values == {20: 0.9}


def test_a_trial_is_compared_with_those_of_its_own_choice(study: optuna.Study) -> None:
    losses = optuna.distributions.CategoricalDistribution(["dpo", "unll"])
    rate = optuna.distributions.FloatDistribution(0, 1)

    def trial(loss: str, lr: float) -> FrozenTrial:
        params = {"loss": loss, "lr": lr}
        return create_trial(state=RUNNING, params=params, distributions={"loss": losses, "lr": rate})

    trials = [trial("dpo", 0.1), trial("unll", 0.1), trial("dpo", 0.2)]
    assert peers(trials, trials[2], {"loss": "scientific", "lr": "scientific"}) == [trials[0], trials[2]]
    assert peers(trials, trials[2], {"loss": "nuisance"}) == trials


def test_rungs_are_stored_with_the_trial(study: optuna.Study, tmp_path: Path) -> None:
    assert watching(tmp_path, "halving")(row(20, 0.5)) is None, "nobody else has been at that rung"
    assert stored(tmp_path, 6).system_attrs == {"completed_rung_0": 0.5}
    study.add_trial(create_trial(state=RUNNING, user_attrs={INDEX: 6}))
    said = watching(tmp_path, "halving", number=7)(row(20, 0.4))
    assert said is not None
    assert said.endswith("(successivehalving pruner)")
    assert stored(tmp_path, 7).system_attrs == {"completed_rung_0": 0.4}


@pytest.mark.parametrize("lost", ["tables", "file", "folder"])
def test_a_storage_that_is_lost_warns_once_and_ends_nothing(
    lost: str, study: optuna.Study, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    one = watching(tmp_path)
    assert one(row(20, 0.53)) is None
    path = tmp_path / "study.db"
    if lost == "tables":
        with sqlite3.connect(path) as database:
            for table in ("trial_intermediate_values", "trial_user_attributes"):
                database.execute(f"DROP TABLE {table}")
    else:
        path.unlink()
        if lost == "folder":
            path.mkdir()
    with caplog.at_level(logging.WARNING, logger="dppo"):
        assert one(row(40, 0.0)) is None
        assert one(row(60, 0.0)) is None
    lines = [record.getMessage() for record in caplog.records if record.name == "dppo"]
    assert len(lines) == 1, lines
    assert lines[0].startswith(f"warning: hydra.sweeper.storage=sqlite:///{path}: ")
    assert lines[0].endswith("; this trial can't be pruned")
    assert "\n" not in lines[0]
