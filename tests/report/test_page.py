"""The page in a real browser: a search of the real command line, hostile answers, many runs."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
from playwright.sync_api import Browser, expect

from dppo.report.making import report
from tests.conftest import once, small
from tests.report.browser import Opened, running
from tests.report.made_runs import DPO, make_run, unll
from tests.test_command_line import typed

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script><!--",
    "<img src=x onerror='window.hacked = 1'>",
    "{{ 7 * 7 }} {% raw %} ${hacked}",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "bell \x07 escape \x1b[31m null \x00 end",
    "line\u2028separator\u2029here, zero\u200bwidth",
    "x" * 60_000,
    "\ud800 alone",
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with running() as found:
        yield found


@pytest.fixture(scope="module")
def searched(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The report that a small search of the real command line made of itself, and what the search printed."""

    def build(root: Path) -> None:
        words = ["-m", "+sweep=alpha", "alpha=tag(log, interval(0.001,1))", "hydra.sweeper.n_trials=3"]
        words += ["hydra.sweeper.test_seeds=1", "hydra/sweeper/pruner=none", *small("report=true", "loss=unll")]
        with (root / "said.txt").open("w") as said, redirect_stdout(said), pytest.MonkeyPatch.context() as patch:
            assert typed(patch, root, *words) == 0

    root = once(tmp_path_factory, "search-with-report", build)
    return root / "outputs" / "sweeps" / "alpha" / "report" / "report.html", (root / "said.txt").read_text()


def test_a_search_ends_with_its_report(searched: tuple[Path, str]) -> None:
    page, said = searched
    assert said.splitlines()[-1] == f"report {page.relative_to(page.parents[4])}"
    figures = {path.name for path in (page.parent / "figures").iterdir()}
    assert {"hyperparameter_search.png", "hyperparameter_search.svg", "paradigms.png", "rewards.svg"} <= figures
    assert all((page.parent / "figures" / name).stat().st_size > 1000 for name in figures)
    tables = {path.stem for path in (page.parent / "tables").iterdir()}
    for name in tables:
        assert all((page.parent / "tables" / f"{name}{kind}").stat().st_size for kind in (".csv", ".md", ".tex"))
    text = page.read_text("utf-8")
    linked = set(re.findall(r'href="((?:figures|tables)/[^"]+)"', text))
    assert linked == {path.relative_to(page.parent).as_posix() for path in page.parent.glob("*/*")}


def test_the_page_of_a_search_in_a_browser(searched: tuple[Path, str], browser: Browser) -> None:
    opened = Opened(browser, searched[0])
    page = opened.page
    # Trials on validation prompts, results and baselines on test prompts: never in one comparison.
    assert page.locator("#configurations h3").all_inner_texts() == [
        "8 test prompts, scored by Verifiable",
        "8 validation prompts, scored by Verifiable",
    ]
    assert page.locator("#search-0 svg").count() >= 3
    expect(page.locator("#search-0 pre")).to_contain_text("noise between seeds")
    for name in page.locator("nav a").all():
        assert page.locator(str(name.get_attribute("href"))).count() == 1

    # Sorting: the first click brings the largest value up, the second the smallest.
    first = page.locator("#table-runs tbody tr >> visible=true")
    heading = page.locator("#table-runs th", has_text="reward")
    values = []
    for order in ("descending", "ascending"):
        heading.locator("button").click()
        assert heading.get_attribute("aria-sort") == order
        shown = [float(cell.inner_text()) for cell in page.locator("#table-runs tbody tr td:nth-child(10)").all()]
        assert shown == sorted(shown, reverse=order == "descending")
        values.append(shown)
    assert values[0][0] > values[0][-1]

    # Filtering by words and by status.
    everything = first.count()
    page.fill("#filter", "loss=dpo validation")
    expect(page.locator("#count")).to_have_text(f"1 of {everything} runs")
    assert "loss=dpo" in first.inner_text()
    page.fill("#filter", "")
    page.select_option("#status", "complete")
    expect(page.locator("#count")).to_have_text(f"{everything} of {everything} runs")

    # Answers: another model on the left, then more of them, then those that hold a word.
    assert page.locator("#list article").count() == 8
    assert page.locator("#list article h4").nth(1).inner_text().startswith("SFT: reward ")
    page.select_option("#left", index=1)
    assert not page.locator("#list article h4").nth(1).inner_text().startswith("SFT")
    page.fill("#search", "no such answer anywhere")
    expect(page.locator("#list")).to_have_text("No answer contains this.")

    # Settings of two configurations.
    page.select_option("#first", label="loss=dpo")
    page.select_option("#second", label="loss=none")
    expect(page.locator("#settings")).to_contain_text("loss")
    page.select_option("#second", label="loss=dpo")
    expect(page.locator("#settings")).to_contain_text("nothing")

    # Tips of a figure, and the other theme.
    mark = page.locator("#paradigms .wide [data-tip]").first
    mark.scroll_into_view_if_needed()
    mark.hover(force=True)
    expect(page.locator("#tip")).to_be_visible()
    colour = "getComputedStyle(document.body).backgroundColor"
    before = page.evaluate(colour)
    page.click("#theme")
    assert page.evaluate(colour) != before
    assert opened.overflow() == 0
    opened.check()


def test_the_page_on_a_phone(searched: tuple[Path, str], browser: Browser) -> None:
    opened = Opened(browser, searched[0], width=390, dark=True)
    assert opened.overflow() == 0
    for panel in ("hyperparameter_search", "paradigms", "rewards"):
        narrow, wide = (opened.page.locator(f"#{panel} .{kind}") for kind in ("narrow", "wide"))
        assert narrow.is_visible() and not wide.is_visible()
        sizes = narrow.locator("svg text").evaluate_all("all => all.map(one => one.getBoundingClientRect().height)")
        assert min(sizes) > 8, "letters that can be read"
    opened.check()


def test_hostile_answers_are_text(tmp_path: Path, browser: Browser) -> None:
    rewards = list(range(len(HOSTILE)))
    for name, loss in (("plain", DPO), ("<img/src=x/onerror=window.hacked=1>", unll(0.1))):
        path = make_run(tmp_path / "runs" / str(len(name)), f"'loss={name}'", loss=loss, policy=rewards)
        rows = [json.loads(line) for line in (path / "samples.jsonl").read_text().splitlines()]
        for row, text in zip(rows, HOSTILE, strict=True):
            row |= {"prompt": text, "policy_answer": text, "reference_answer": text[::-1]}
        (path / "samples.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = made(tmp_path)
    opened = Opened(browser, page)
    shown = "\n".join(opened.page.locator("#list .text").all_inner_texts())
    for text in HOSTILE[:4]:
        assert text in shown
    for sign in (
        "\u27e8U+202E\u27e9",
        "\u27e8U+2028\u27e9",
        "\u27e8U+200B\u27e9",
        "\u27e8U+D800\u27e9",
        "\u2407",
        "\u241b[31m",
        "\u2400",
    ):
        assert sign in shown
    assert "[56,000 more characters]" in shown
    assert "\u05e9\u05dc\u05d5\u05dd" in shown
    assert opened.page.locator("#list .text").first.get_attribute("dir") == "auto"
    assert opened.page.evaluate("window.hacked") is None
    assert opened.page.locator("script").count() == 2
    assert opened.overflow() == 0
    opened.check()


def test_another_script_does_not_run(tmp_path: Path, browser: Browser) -> None:
    make_run(tmp_path / "runs" / "one")
    page = made(tmp_path)
    page.write_text(page.read_text("utf-8").replace("</main>", "<script>window.hacked = 1</script></main>"))
    opened = Opened(browser, page)
    assert opened.page.evaluate("window.hacked") is None
    assert any("Content Security Policy" in line for line in opened.said)


def test_damaged_and_unfinished_runs_are_listed(tmp_path: Path, browser: Browser) -> None:
    runs = tmp_path / "runs"
    make_run(runs / "good", seed=0)
    make_run(runs / "torn", seed=1)
    (runs / "torn" / "samples.jsonl").write_text('{"prompt_id": "p0", "policy_rew')
    make_run(runs / "half", seed=2)
    (runs / "half" / "result.json").write_text('{"schema": 1, "sta')
    make_run(runs / "killed", seed=3)
    (runs / "killed" / "result.json").unlink()
    make_run(runs / "diverged", "loss=unll", loss=unll(9.0), status="diverged")
    page = made(tmp_path)
    opened = Opened(browser, page)
    rows = opened.page.locator("#table-left_out tbody tr")
    assert rows.count() == 3
    expect(opened.page.locator("header")).to_contain_text("Left out: 2 broken, 1 unfinished")
    told = "\n".join(rows.all_inner_texts())
    assert "torn" in told and "samples.jsonl, line 1" in told
    assert "half" in told and "result.json is not JSON" in told
    assert "killed" in told and "unfinished" in told
    diverged = opened.page.locator("#table-runs tr", has_text="diverged")
    assert diverged.count() == 1
    opened.check()


def test_two_hundred_runs_are_a_small_page(tmp_path: Path, browser: Browser) -> None:
    generator = np.random.default_rng(0)
    n_prompts = 128
    reference = generator.normal(size=n_prompts).tolist()
    for n in range(100):
        for seed in range(2):
            policy = (np.array(reference) + generator.normal(0.01 * n, 1, n_prompts)).tolist()
            alpha = 0.0001 * 1.1**n
            path = tmp_path / "runs" / f"{n}-{seed}"
            make_run(
                path, f"alpha={alpha:.6g}", seed=seed, loss=unll(alpha), settings={"alpha": alpha}, policy=policy,
                reference=reference,
            )  # fmt: skip
    page = made(tmp_path)
    assert page.stat().st_size < 10_000_000
    opened = Opened(browser, page)
    assert opened.page.locator("#table-runs tbody tr").count() == 200
    opened.page.fill("#filter", "alpha=0.0001 ")
    opened.check()


def made(root: Path) -> Path:
    return report([root / "runs"], root / "report", metric="win_rate", baseline=None, n_bootstrap=200, title=None)
