"""A dry run says what a run would do: it changes nothing, and the run then does exactly that."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dppo import config
from dppo.artifacts import Cache
from dppo.errors import UserError
from dppo.loop import Interrupted, Metrics, Outcome, train
from dppo.pipeline import chat_encoder
from dppo.plan import Plan, lines, plan
from dppo.stages.sft import sft_examples
from tests.conftest import small
from tests.runs import Finished, run_small
from tests.test_command_line import is_one_line, typed
from tests.test_stages import SCORES_MAY_HIT

BASE = ("loss=unll", "penalty=quadratic", "alpha=0.1")
TITLES = ["sft", "y_gen", "reference", "preference", "answers", "baseline", "scores", "drift", "compare"]


def planned(root: Path, *overrides: str, also_built: frozenset[str] = frozenset()) -> Plan:
    words = small(*overrides, f"cache.dir={root / 'cache'}", "device=cpu")
    return plan(config.load(config.compose(words), words), also_built=also_built)


def listing(root: Path) -> dict[str, tuple[int, float]]:
    """Every path below ``root`` with its size and its time."""
    return {
        path.relative_to(root).as_posix(): (path.lstat().st_size, path.lstat().st_mtime) for path in root.rglob("*")
    }


def todo(found: Plan) -> list[str]:
    return list(dict.fromkeys(step.title for step in found.todo))


@pytest.fixture(scope="module")
def warm(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Plan, Finished]:
    """A cache with one run, and the plan that was made before it."""
    root = tmp_path_factory.mktemp("planned")
    before = planned(root, *BASE)
    assert listing(root) == {}
    return root, before, run_small(root, *BASE)


def test_before_a_run_everything_is_to_be_built_and_no_time_is_invented(warm: tuple[Path, Plan, Finished]) -> None:
    before = warm[1]
    assert [step.title for step in before.steps] == TITLES
    assert {step.action for step in before.steps} == {"build"}
    assert {step.seconds for step in before.steps} == {None}
    work = {step.title: (step.work, step.unit) for step in before.steps}
    assert work["sft"] == (4, "step")
    assert work["preference"] == (8, "step")
    assert work["baseline"] == (8, "answer")
    assert work["scores"] == (16, "response")
    assert work["reference"][0] == 3 * work["y_gen"][0]  # chosen, rejected and generated
    last = lines(before)
    assert f"no time known for {', '.join(TITLES)}: nothing like it has run with this cache" in last
    sft = before.steps[0]
    weights = next((warm[0] / "cache" / "sft").rglob("*.safetensors")).stat().st_size
    assert sft.bytes is not None
    assert 0.8 * weights < sft.bytes <= weights


def test_after_the_run_everything_is_reused_under_its_own_fingerprints(warm: tuple[Path, Plan, Finished]) -> None:
    root, before, finished = warm
    seen = listing(root)
    after = planned(root, *BASE)
    assert listing(root) == seen
    assert after.todo == []
    assert lines(after)[-1] == "dry run: everything is in the cache, a run would build nothing"
    parents = json.loads((finished.directory / "parents.json").read_text())
    used = [{"stage": step.stage, "fingerprint": step.fingerprint} for step in after.steps]
    assert [item for place, item in enumerate(used) if item not in used[:place]] == parents
    guessed = [(step.title, step.fingerprint) for step in before.steps if step.title != "drift"]
    assert guessed == [(step.title, step.fingerprint) for step in after.steps if step.title != "drift"]


def test_another_alpha_is_priced_by_what_the_first_run_took(warm: tuple[Path, Plan, Finished]) -> None:
    root, _, finished = warm
    other = planned(root, "loss=unll", "penalty=quadratic", "alpha=0.2")
    assert todo(other) == ["preference", "answers", "scores", "drift", "compare"]
    for step in other.todo:
        assert step.seconds is not None and step.seconds > 0
        assert step.bytes is not None and step.bytes > 0
    steps = {step.title: step for step in other.steps}
    assert steps["scores"].action == "extend"
    assert steps["preference"].basis == "1 earlier run of this model"
    path = root / "cache" / finished.result["models"]["policy"]
    took = json.loads((path / "manifest.json").read_text())["timings"]["total"]
    assert steps["preference"].seconds == pytest.approx(took)
    longer = {step.title: step for step in planned(root, "loss=unll", "alpha=0.2", "train.steps=16").steps}
    assert longer["preference"].seconds == pytest.approx(2 * took)
    rows = {item["stage"]: item for item in finished.result["timings"]["stages"]}
    assert rows["preference"]["rows"] is None
    assert rows["answers"]["rows"] == 8
    assert steps["answers"].seconds == pytest.approx(rows["answers"]["seconds"])
    # Twice the answers take twice the decoding, and load the model once.
    took, decoding = rows["answers"]["seconds"], rows["answers"]["tokens"] / rows["answers"]["tokens_per_second"]
    assert decoding < took
    more = {step.title: step for step in planned(root, "loss=unll", "alpha=0.2", "evaluation.n_prompts=16").steps}
    assert more["answers"].work == 16
    assert more["answers"].seconds == pytest.approx(took + decoding)
    assert more["answers"].basis == f"1 earlier run of this model, {rows['answers']['tokens_per_second']:,.0f} tokens/s"
    assert "about" in lines(other)[-1]


def test_a_time_of_another_model_or_precision_says_nothing(warm: tuple[Path, Plan, Finished]) -> None:
    root = warm[0]
    wider = {step.title: step for step in planned(root, *BASE, "model.hidden_size=32").steps}
    assert {title for title, step in wider.items() if step.seconds is not None} == {"scores", "compare"}
    rounded = {step.title: step for step in planned(root, *BASE, "train.precision=bf16").steps}
    assert rounded["preference"].seconds is None
    smaller = {step.title: step for step in planned(root, *BASE, "train.max_length=64").steps}
    assert smaller["preference"].basis == "1 earlier run of this model with other settings"


@pytest.mark.parametrize(
    "words",
    [
        "loss=dpo",
        "loss=unll",
        "loss=kto",
        "loss=sft",
        "loss=none",
        "loss=unll evaluation.interim.n_points=2 evaluation.interim.n_prompts=4",
        "loss=unll evaluation.interim.n_points=2 evaluation.interim.n_prompts=4 evaluation.interim.kl=true",
        "sft=none loss=dpo train.steps=2",
        "loss=dpo sft.train.steps=null sft.train.epochs=1 train=lora train.steps=2",
        "+experiment=unll_then_dpo phases.unll.train.steps=3 phases.dpo.train.steps=2",
        "+experiment=unll_then_dpo phases.unll.train.steps=3 phases.dpo.train.steps=2 phases.dpo.reference=previous",
    ],
)
def test_a_run_builds_exactly_what_was_planned(words: str, tmp_path: Path) -> None:
    before = planned(tmp_path, *words.split())
    found = run_small(tmp_path, *words.split())
    assert [step.title for step in before.steps] == found.stages
    assert todo(before) == found.built
    for step, item in zip(before.steps, found.result["timings"]["stages"], strict=True):
        assert step.work >= (item["rows"] or 0)  # equal texts are scored once
    after = planned(tmp_path, *words.split())
    assert after.todo == []
    assert [step.fingerprint for step in after.steps] == [
        item["fingerprint"] for item in found.result["timings"]["stages"]
    ]


def test_a_run_from_a_finished_one(warm: tuple[Path, Plan, Finished], tmp_path: Path) -> None:
    shutil.copytree(warm[0] / "cache", tmp_path / "cache")
    words = ("loss=dpo", f"init_from={warm[2].directory}")
    before = planned(tmp_path, *words)
    found = run_small(tmp_path, *words)
    assert [step.title for step in before.steps] == found.stages
    assert set(todo(before)) - SCORES_MAY_HIT == set(found.built) - SCORES_MAY_HIT
    assert before.without_time == []


def test_a_diverged_phase_ends_the_plan(tmp_path: Path) -> None:
    words = ("loss=dpo", "train.learning_rate=1e30")
    found = run_small(tmp_path, *words)
    after = planned(tmp_path, *words)
    assert [step.title for step in after.steps] == found.stages
    assert after.steps[-1].basis == "diverged: the run would end here"


def test_what_an_earlier_plan_makes_is_reused_by_the_next(tmp_path: Path) -> None:
    first = planned(tmp_path, *BASE)
    assert planned(tmp_path, *BASE, also_built=first.makes).todo == []
    other = planned(tmp_path, "loss=unll", "alpha=0.2", also_built=first.makes)
    assert todo(other) == ["preference", "answers", "scores", "drift", "compare"]


def test_an_unfinished_build_counts_what_is_left_and_so_does_its_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("loss=dpo", "train.checkpoint_every=2", "train.evaluate_every=null")

    def stopped(*given: Any, log: Callable[[Metrics], None], **named: Any) -> Outcome:
        def then_stop(row: Metrics) -> None:
            log(row)
            if named["title"] == "main" and row["step"] == 5:
                raise Interrupted("stopped")

        return train(*given, log=then_stop, **named)

    with monkeypatch.context() as patch:
        patch.setattr("dppo.stages.training.train", stopped)
        with pytest.raises(Interrupted):
            run_small(tmp_path, *words)
    (step,) = [step for step in planned(tmp_path, *words).steps if step.title == "preference"]
    assert step.work == 4
    assert step.basis.startswith("continues after step 4")
    found = run_small(tmp_path, *words)
    place = tmp_path / "cache" / found.result["models"]["policy"]
    manifest = Cache(tmp_path / "cache").existing(place.parent.name, place.name).manifest()
    assert manifest.extra["continued_after"] == 4
    (again,) = [step for step in planned(tmp_path, *words, "seed=1").steps if step.title == "preference"]
    assert again.seconds == pytest.approx(manifest.timings["total"] * 8 / 4)


def test_the_command_line_prints_the_table_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = small("loss=unll", "alpha=0.1", "dry_run=true")
    assert typed(monkeypatch, tmp_path, *words, "hydra.run.dir=mine") == 0
    table = capfd.readouterr().out.splitlines()
    assert table[0].split() == ["stage", "id", "work", "time", "memory", "disk", "measured", "on"]
    assert [line.split()[0] for line in table[1:10]] == TITLES
    assert list(tmp_path.iterdir()) == []

    assert typed(monkeypatch, tmp_path, *words, "seed=0,1", "-m") == 0
    told = capfd.readouterr().out
    assert "dry run: 9 of 9 stages" in told
    assert "dry run: 5 of 9 stages" in told
    assert list(tmp_path.iterdir()) == []

    for wrong, named in (("train.stepz=3", ["train.stepz=3", "train.steps"]), ("objectives=[kl]", ["objectives=[kl]"])):
        status = typed(monkeypatch, tmp_path, *words, wrong)
        output = capfd.readouterr()
        is_one_line(status, output.err, output.out, named)


def test_a_search_says_what_its_runs_would_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = small("-m", "+sweep=alpha", "dry_run=true", "hydra.sweeper.n_trials=5", "hydra.sweeper.replicates=2")
    assert typed(monkeypatch, tmp_path, *words) == 0
    told = capfd.readouterr().out
    rows = {line.split("  ")[0]: line.split() for line in told.splitlines()}
    assert rows["trials such as alpha=0.001"][4] == "6", "three of five trials, two seeds"
    assert rows["trials such as alpha=1.0"][4] == "4"
    assert rows["results of the best"][4] == rows["results of loss=dpo"][3] == "3"
    assert "dry run: 28 runs" in told, "5 x 2 trials, 3 x 2 baselines, 4 x 3 results"
    assert list(tmp_path.iterdir()) == []


# --- a machine that is elsewhere -------------------------------------------------------------------------------------

RATES: tuple[str, ...] = (
    "rates=h100",
    "dry_run=true",
    "rates.n_devices=2",
    "rates.teraflops=0.001",
    "rates.utilisation=0.5",
)
RATES += ("rates.decoded_tokens_per_second=1.0", "rates.tokens_per_answer=8", "rates.responses_per_second=4.0")


def test_rates_of_a_machine_price_every_stage_by_weights_and_tokens(tmp_path: Path) -> None:
    found = {step.title: step for step in planned(tmp_path, *BASE, *RATES).steps}
    measured = {step.title: step for step in planned(tmp_path, *BASE).steps}
    assert {title: (step.fingerprint, step.work) for title, step in found.items()} == {
        title: (step.fingerprint, step.work) for title, step in measured.items()
    }
    words = small(*BASE, f"cache.dir={tmp_path / 'cache'}", "device=cpu")
    experiment = config.load(config.compose(words), words)
    n_weights = experiment.model.load_model(0).num_parameters()
    speed = 2 * 0.001e12 * 0.5

    encoder = chat_encoder(experiment, Cache(tmp_path / "cache"))
    assert experiment.sft.train is not None
    chats = sft_examples(experiment.dataset, experiment.sft.train, 0, encoder).examples
    each = sum(one.n_tokens for one in chats) / len(chats)
    # 4 steps of sft.train.batch_size chats; evaluated at the start and after 2 and 4 steps, on 4 chats.
    n_tokens = each * experiment.sft.train.batch_size * 4
    assert found["sft"].seconds == pytest.approx(n_weights * (6 * n_tokens + 2 * each * 4 * 3) / speed)

    n_answers = found["answers"].work
    assert found["answers"].seconds == pytest.approx(n_answers * 8 / (1.0 * 1e9 / n_weights) / 2)
    assert found["answers"].bytes == n_answers * (128 + 12 * 8)
    assert found["scores"].seconds == pytest.approx(found["scores"].work / 4)
    assert found["scores"].device_seconds == pytest.approx(found["scores"].work / 4 * (2 + 4))
    assert found["sft"].device_seconds == pytest.approx(2 * (found["sft"].seconds or 0))
    told = lines(planned(tmp_path, *BASE, *RATES))
    assert told[0].endswith("reckoned with") and told[-1].endswith(" device-hours")
    assert "2 devices, 0.001 TFLOP/s at 50%" in told[1]
    assert all(step.seconds is not None and step.bytes is not None for step in found.values())


def test_what_costs_more_is_reckoned_to_cost_more(tmp_path: Path) -> None:
    def seconds(title: str, *words: str) -> float:
        (step,) = [one for one in planned(tmp_path, *BASE, *RATES, *words).steps if one.title == title]
        return step.seconds or 0.0

    plain = seconds("preference", "train.evaluate_every=null")
    assert seconds("preference", "train.evaluate_every=null", "train.steps=16") == pytest.approx(2 * plain)
    assert seconds("preference", "train.evaluate_every=null", "rates.n_devices=4") == pytest.approx(plain / 2)
    assert seconds("preference", "train.evaluate_every=null", "train=lora") == pytest.approx(plain * 4 / 6)
    again = seconds("preference", "train.evaluate_every=null", "train.activation_checkpointing=true")
    assert again == pytest.approx(plain * 8 / 6)
    assert seconds("preference") > plain
    assert seconds("preference", "train.evaluate_every=null", "train.packing=padded") > plain
    assert seconds("preference", "train.evaluate_every=null", "rates.tokens_per_answer=80") > plain
    assert seconds("y_gen", "rates.tokens_per_answer=16") == pytest.approx(2 * seconds("y_gen"))


def test_a_search_adds_up_device_hours(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    words = small("-m", "hydra/sweeper=optuna", "alpha=choice(0.1,0.2)", *RATES, "hydra.sweeper.n_trials=2")
    assert typed(monkeypatch, tmp_path, *words, "hydra.sweeper.test_seeds=0") == 0
    last = capfd.readouterr().out.splitlines()[-1]
    assert last.startswith("dry run: 2 runs, about") and " device-hours; " in last


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (("rates=a100",), "rates: only a dry run reckons with a machine that is elsewhere: add dry_run=true"),
        (("rates=a100", "dry_run=true", "rates.n_devices=0"), "rates.n_devices=0: must be at least 1"),
        (("rates=a100", "dry_run=true", "rates.utilisation=40"), "rates.utilisation=40.0: must be in (0, 1]"),
        (("rates=a100", "dry_run=true", "rates.teraflops=0"), "rates.teraflops=0.0: must be > 0"),
        (("rates=a100", "dry_run=true", "rates.reward_devices=-1"), "rates.reward_devices=-1: must be at least 0"),
    ],
)
def test_wrong_rates_are_refused(words: tuple[str, ...], line: str) -> None:
    with pytest.raises(UserError) as caught:
        config.load(config.compose(words), words)
    assert str(caught.value).startswith(line)


PAGE = (Path(__file__).resolve().parent.parent / "docs" / "laptop_to_cluster.md").read_text()
COMMANDS = re.findall(
    r"^python -m dppo (.*?)(?:  #.*)?$", "".join(re.findall(r"```sh\n(.*?)```", PAGE, re.DOTALL)), re.M
)


@pytest.mark.parametrize("command", COMMANDS)
def test_the_commands_of_the_page_print_device_hours(
    command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert typed(monkeypatch, tmp_path, *small(*shlex.split(command))) == 0
    assert capfd.readouterr().out.rstrip().endswith(" device-hours")


def test_the_page_has_commands() -> None:
    assert len(COMMANDS) == 3
