"""``python -m dppo.methods`` and its page: complete, and the same as classes, configuration and sweeps."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from dppo import methods
from dppo.__main__ import _jobs, _search_space, _sweeper
from dppo.config import CONF_DIR, SWEEPS_DIR, compose, load
from dppo.losses.penalised import PenalisedLoss

ROOT = Path(__file__).resolve().parent.parent
OPTIONS = methods.options()
LOSSES = [option for option in OPTIONS if option.group == "loss" and option.cls is not None]
# Every loss but the two that no published grid is known of.
GRIDS = [option.name for option in LOSSES if option.name not in ("sft", "dpo_norm")]


def jobs_of(*words: str) -> list[list[str]]:
    """The jobs of ``python -m dppo -m`` with these words."""
    sweeper = _sweeper(words)
    return _jobs(sweeper, [*_search_space(sweeper, words), *words])


def test_the_page_is_what_the_command_prints(capsys: pytest.CaptureFixture[str]) -> None:
    """After a change: python -m dppo.methods --markdown > docs/methods.md."""
    assert methods.main(["--markdown"]) == 0
    printed = capsys.readouterr().out
    assert printed == (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    for group in ("loss", "penalty"):
        for path in (CONF_DIR / group).glob("*.yaml"):
            assert printed.count(f"\n## {group}={path.stem}\n") == 1
            assert group == "penalty" or printed.count(f"\n| [`{path.stem}`]") == 1


@pytest.mark.parametrize("option", LOSSES, ids=lambda option: option.name)
def test_a_loss_states_its_facts(option: methods.Option) -> None:
    facts = set(option.docstring.facts)
    assert facts >= {"Formula", "Length", "Bounds"}
    assert option.name == "sft" or "Paper" in facts
    assert ("At policy = reference" in facts) == (option.reference != "no")
    # sft has no rewards, and a penalised loss has those of its base.
    assert ("Rewards" in facts) == (option.name != "sft" and not issubclass(type(option.default), PenalisedLoss))


@pytest.mark.parametrize("option", [option for option in OPTIONS if option.group == "penalty"], ids=lambda o: o.name)
def test_a_penalty_states_its_facts(option: methods.Option) -> None:
    assert {"Formula", "Bounds"} <= set(option.docstring.facts)


@pytest.mark.parametrize("option", LOSSES, ids=lambda option: option.name)
def test_keys_and_defaults_are_those_of_a_run(option: methods.Option) -> None:
    words = [f"loss={option.name}"]
    assert option.default == load(compose(words), words).phases["main"].loss
    typed = [*words, *(f"{key.name}={key.default}" for key in option.keys)]
    assert load(compose(typed), typed).phases["main"].loss == option.default
    assert all(key.comment for key in option.keys)


def test_keys_of_penalties_are_typed_as_shown() -> None:
    typed = [
        "loss=unll",
        "penalty=expectile",
        *(f"{key.name}={key.default}" for key in methods.read("penalty", "expectile").keys),
    ]
    assert load(compose(typed), typed).phases["main"].loss.penalty.zeta == 0.5  # type: ignore[attr-defined]


def test_needs_follow_the_classes() -> None:
    found = {option.name: (option.data, option.reference) for option in OPTIONS if option.group == "loss"}
    assert found["dpo"] == ("pairs", "yes")
    assert found["simpo"] == ("pairs", "no")
    assert found["kto"] == ("labelled answers or pairs", "yes")
    assert found["rrhf"] == ("ranked answers or pairs", "no")
    assert found["npo"] == ("pairs and y_gen", "yes")
    assert found["simnpo"] == ("pairs and y_gen", "by base")
    assert found["none"] == ("-", "-")
    assert "mismatched" in methods.read("loss", "kto").statistics
    assert methods.read("loss", "dpo").statistics == ""


@pytest.mark.parametrize("name", GRIDS)
def test_a_grid_varies_the_loss_that_it_is_named_after(name: str) -> None:
    """The first and the last job, with the ends of every range, pass the check that comes before a run."""
    jobs = jobs_of(f"+sweep={name}_grid")
    first, last = (load(compose(job), job).phases["main"].loss for job in (jobs[0], jobs[-1]))
    assert first.name == last.name == name
    assert first != last
    assert len({tuple(job) for job in jobs}) == len(jobs) >= 2


def test_every_loss_has_its_grid() -> None:
    found = {path.stem.removesuffix("_grid") for path in (SWEEPS_DIR / "sweep").glob("*_grid.yaml")}
    assert found >= set(GRIDS)


def test_a_grid_gives_way_to_the_command_line() -> None:
    jobs = jobs_of("+sweep=unll_grid", "penalty=linear", "alpha=0.1,1")
    assert [[word for word in job if word.startswith("alpha=")] for job in jobs] == [["alpha=0.1"], ["alpha=1"]]


def test_in_a_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main(["simpo", "expectile"]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(
        "loss=simpo: Simple preference optimisation.\n\n    -log sigmoid(beta m_w - beta m_l - gamma)\n"
    )
    assert "beta=2,2.5 loss.gamma=0.3,0.5,1,1.2,1.4,1.6 (-m +sweep=simpo_grid)" in " ".join(printed.split())
    assert "\n  zeta=0.5 " in printed
    assert "`" not in printed
    assert methods.main([]) == 0
    everything = capsys.readouterr().out
    assert all(f"{option.group}={option.name}: " in everything for option in OPTIONS)
    assert methods.main(["--markdown", "dpo"]) == 0
    assert capsys.readouterr().out.startswith("## loss=dpo\n")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["simpoo"], "error: simpoo: there is no such method. Did you mean simpo? Known: alpha_dpo, "),
        (["R-DPO"], "error: R-DPO: there is no such method. Did you mean r_dpo? Known: "),
        (["dpo", "xyzzy"], "error: xyzzy: there is no such method. Known: "),
        (["--html"], "error: unrecognized arguments: --html; see python -m dppo.methods --help"),
    ],
)
def test_a_mistake_is_one_line(words: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert methods.main(words) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith(message)
    assert output.err.count("\n") == 1


def test_it_needs_no_transformers() -> None:
    script = "import sys; from dppo import methods; methods.main([]); sys.exit('transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", script], stdout=subprocess.DEVNULL).returncode == 0
