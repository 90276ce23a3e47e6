"""``python -m dppo.evaluate`` on files written here, on a small run, and on published numbers if they are at hand."""

from __future__ import annotations

import csv
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from dppo import evaluate
from dppo.evaluation.text_health import text_health
from tests.conftest import small
from tests.data.test_sources import Row, write_csv, write_jsonl, write_parquet
from tests.runs import write_run
from tests.test_command_line import typed

Captured = pytest.CaptureFixture[str]
SHARED = Path(os.environ.get("DPPO_SHARED_DATA", Path(__file__).resolve().parents[2] / "shared" / "data")) / "winrate"


def write_json(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text(json.dumps(list(rows)))
    return path


WRITERS: dict[str, Callable[[Path, Sequence[Row]], Path]] = {
    "json": write_json,
    "jsonl": write_jsonl,
    "csv": write_csv,
    "parquet": write_parquet,
}


def judged(preference: object, own: str = "ab", other: str = "abcd", **more: object) -> Row:
    return {"preference": preference, "output_1": other, "output_2": own, **more}


def numbers(tmp_path: Path, *words: str | Path) -> dict[str, Any]:
    """What the command writes with --json."""
    found = tmp_path / "numbers.json"
    assert evaluate.main([*map(str, words), "--n-bootstrap", "200", "--json", str(found)]) == 0
    content: dict[str, Any] = json.loads(found.read_text())
    return content


def complaint(capsys: Captured, *words: str | Path) -> str:
    """The one line of a user's error."""
    capsys.readouterr()
    assert evaluate.main(list(map(str, words))) == 2
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    return shown.err.removeprefix("error: ").strip()


# --- judged pairs -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("ending", WRITERS)
def test_judged_pairs_by_hand_in_every_format(ending: str, tmp_path: Path) -> None:
    """2 wins, a tie written as 0, a loss, and a row without a judgement, which only counts for avg_length.

    x = 1, 1, 1/2, 0: mean 5/8, squared deviations 9 + 9 + 1 + 25 = 44 (in 1/64), over 3, root, over 2.
    """
    rows = [
        judged(2, own="four"),
        judged(2.0, own="fives"),
        judged(0, own="six of it"),
        judged(1, own="a b\nc"),
        judged(None, own="a long answer that nobody judged"),
    ]
    found = numbers(tmp_path, "--preferences", WRITERS[ending](tmp_path / f"judged.{ending}", rows))
    assert (found["n"], found["n_dropped"], found["soft"]) == (4, 1, False)
    rate = found["win_rate"]
    assert (rate["value"], rate["strict"], rate["wins"], rate["ties"], found["losses"]) == (0.625, 0.5, 2, 1, 1)
    published = found["alpaca_eval"]
    assert published["standard_error"] == pytest.approx(100 * math.sqrt(44 / 64 / 3) / 2)
    assert {name: value for name, value in published.items() if name != "standard_error"} == {
        "win_rate": 62.5,
        "discrete_win_rate": 62.5,
        "n_wins": 2,
        "n_wins_base": 1,
        "n_draws": 1,
        "n_total": 4,
        "avg_length": 11,  # (4 + 5 + 9 + 5 + 32) / 5
        "length_controlled_winrate": None,
        "lc_standard_error": None,
    }
    assert found["length"] == {"policy": {"characters": 5.75}, "reference": {"characters": 4.0}}
    assert found["length_controlled"]["longer"] == 0.75
    assert found["text"]["policy"]["distinct_1"] == 1.0
    assert found["text"]["reference"]["distinct_1"] == 0.25
    assert found["reward"] is None


def test_soft_preferences(tmp_path: Path, capsys: Captured) -> None:
    """1.9, 1.6, 1.5 and 1.1: the mean of .9, .6, .5, .1; above and at 1/2 count as wins and ties."""
    rows = [judged(value) for value in (1.9, 1.6, 1.5, 1.1)]
    found = numbers(tmp_path, "--preferences", write_jsonl(tmp_path / "soft.jsonl", rows))
    assert found["soft"]
    assert found["win_rate"]["value"] == pytest.approx(0.525)
    assert (found["win_rate"]["strict"], found["alpaca_eval"]["discrete_win_rate"]) == (0.5, 62.5)
    shown = capsys.readouterr().out
    assert "win rate (mean preference)    0.525" in shown
    assert "Preferences are soft" in shown


def test_lengths_are_read_or_counted_or_unknown(tmp_path: Path) -> None:
    counted = numbers(tmp_path, "--preferences", write_jsonl(tmp_path / "a.jsonl", [judged(2), judged(1)]))
    rows = [{"preference": value, "len_1": 4, "len_2": 2.0} for value in (2, 1)]
    read = numbers(tmp_path, "--preferences", write_parquet(tmp_path / "b.parquet", rows))
    assert read["length_controlled"] == counted["length_controlled"]
    assert read["text"] is None
    bare = numbers(tmp_path, "--preferences", write_csv(tmp_path / "c.csv", [{"preference": 2}, {"preference": 1}]))
    assert (bare["length_controlled"], bare["length"], bare["alpaca_eval"]["avg_length"]) == (None, None, None)
    assert bare["win_rate"] == read["win_rate"]


def test_a_constant_added_to_all_lengths_changes_nothing(tmp_path: Path) -> None:
    lengths = [(9, 3), (4, 8), (7, 7), (1, 2), (20, 30)]
    found = []
    for more in (0, 1000):
        rows = [
            {"preference": 1 + n % 2, "len_1": first + more, "len_2": second + more}
            for n, (first, second) in enumerate(lengths)
        ]
        found.append(numbers(tmp_path, "--preferences", write_jsonl(tmp_path / "l.jsonl", rows))["length_controlled"])
    assert found[0] == found[1]
    assert found[0]["slope"] != 0


def test_one_prompt_has_no_standard_error_and_nan_is_no_preference(tmp_path: Path) -> None:
    rows = [{"preference": 2.0, "len_1": 3, "len_2": 3}, {"preference": math.nan, "len_1": 3, "len_2": 5}]
    found = numbers(tmp_path, "--preferences", write_parquet(tmp_path / "one.parquet", rows))
    assert (found["n"], found["n_dropped"], found["alpaca_eval"]["standard_error"]) == (1, 1, None)
    assert (found["win_rate"]["ci_low"], found["alpaca_eval"]["avg_length"]) == (pytest.approx(0.2065, abs=1e-4), 4)


def weights_file(tmp_path: Path) -> Path:
    path = tmp_path / "weights.csv"
    path.write_text(
        ",np.tanh(std_delta_len),instruction_difficulty,not_gamed_baseline.astype(float)\n"
        f"mine,9,2,0\nother,9,0,{-math.log(3)}\n"
    )
    return path


def test_published_weights(tmp_path: Path, capsys: Captured) -> None:
    rows = [
        judged(1.3, instruction_difficulty=math.log(3) / 2, generator_2="mine"),
        judged(1.7, instruction_difficulty=0.0, generator_2="mine"),
    ]
    words: list[str | Path] = ["--preferences", write_jsonl(tmp_path / "j.jsonl", rows)]
    words += ["--weights", weights_file(tmp_path)]
    found = numbers(tmp_path, *words)["alpaca_eval"]
    assert (found["length_controlled_winrate"], found["lc_standard_error"]) == pytest.approx((62.5, 12.5))
    assert numbers(tmp_path, *words, "--model", "other")["alpaca_eval"]["length_controlled_winrate"] == pytest.approx(
        25
    )
    assert (
        "--model nobody: the weights need one row of this model and have 0; their first column names mine, other"
        in (complaint(capsys, *words, "--model", "nobody"))
    )
    words[1] = write_jsonl(tmp_path / "unnamed.jsonl", [judged(2, instruction_difficulty=1)])
    assert complaint(capsys, *words).endswith("unnamed.jsonl: doesn't name the model (generator_2); add --model NAME")
    words[1] = write_jsonl(tmp_path / "null.jsonl", [judged(2, instruction_difficulty=None)])
    assert "null.jsonl:1: has no instruction_difficulty; fill it in" in complaint(capsys, *words, "--model", "mine")
    words[1] = write_jsonl(tmp_path / "without.jsonl", [judged(2)])
    assert "has no column instruction_difficulty" in complaint(capsys, *words)


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([judged(2), judged(2.5)], "j.jsonl:2: preference is 2.5; it must be from 1 (output_1 is better) to 2"),
        ([judged(0.5)], "j.jsonl:1: preference is 0.5; it must be from 1"),
        ([judged(-1)], "j.jsonl:1: preference is -1; it must be"),
        ([judged("m")], "j.jsonl:1: preference is 'm', not a finite number; mend it, or leave the row out"),
        ([judged(True)], "j.jsonl:1: preference is True, not a finite number"),
        ([judged([1])], "j.jsonl:1: preference is [1], not a finite number"),
        ([judged(math.inf)], "j.jsonl:1: preference is inf, not a finite number"),
        ([judged(10**400)], "not a finite number"),
        ([{"choice": 1}], "j.jsonl:1: has no column preference; found choice, needed preference"),
        ([judged(None), judged(None)], "j.jsonl: no row of 2 has a preference; fill some in, from 1 to 2"),
        (
            [judged(2, prompt_id="a"), judged(1, prompt_id="a")],
            "j.jsonl:2: prompt_id 'a' comes twice, first at",
        ),
        (
            [judged(2, generator_2="a"), judged(1, generator_2="b")],
            "j.jsonl: column generator_2 names 2: 'a', 'b'; keep the rows of one",
        ),
        ([{"preference": 2, "len_1": 3, "len_2": -3}], "j.jsonl:1: len_2 is -3; it must be a number of characters"),
        ([{"preference": 2, "len_1": "x", "len_2": 3}], "j.jsonl:1: len_1 is 'x', not a finite number"),
        (
            [judged(2), {"preference": 2, "output_2": "a"}],
            "j.jsonl:2: has neither len_1 nor output_1, and other rows do; fill one in",
        ),
    ],
)
def test_malformed_pairs_are_one_line(rows: list[Row], told: str, tmp_path: Path, capsys: Captured) -> None:
    assert told in complaint(capsys, "--preferences", write_jsonl(tmp_path / "j.jsonl", rows))


def test_malformed_files_are_one_line(tmp_path: Path, capsys: Captured) -> None:
    whole = write_parquet(tmp_path / "whole.parquet", [judged(2), judged(3)])
    assert f"{whole}, row 2: preference is 3" in complaint(capsys, "--preferences", whole)
    half = tmp_path / "half.parquet"
    half.write_bytes(whole.read_bytes()[:-20])
    assert f"{half}: is not a readable parquet file" in complaint(capsys, "--preferences", half)
    # A byte of a text that is then no UTF-8, which pyarrow finds out only when the text is used.
    plain = tmp_path / "plain.parquet"
    pq.write_table(
        pa.Table.from_pylist([judged(2, own="unmistakable")]), plain, compression="none", use_dictionary=False
    )
    plain.write_bytes(plain.read_bytes().replace(b"unmistakable", b"unmist\xffkable"))
    assert f"{plain}: is not a readable parquet file ('utf-8' codec" in complaint(capsys, "--preferences", plain)
    for name, text, told in (
        ("a.json", '[{"preference": 2}, {"pref', "a.json: is not JSON (Unterminated string"),
        ("b.json", '{"preference": [1, 2]}', "b.json: is not a list of JSON objects with the columns preference"),
        ("c.json", "[1]", "c.json: is not a list of JSON objects"),
        ("d.json", "[]", "d.json: has no rows"),
        ("e.json", '{"preference": 2}\n{"preference": 1}\n', "a row on each line is .jsonl"),
        ("f.json", '[{"choice": 2}]', "f.json: has no column preference; found choice"),
        ("g.csv", "preference\n", "g.csv: has no rows"),
        ("h.csv", "preference\n2\nno\n", "h.csv:3: preference is 'no', not a finite number"),
        ("i.jsonl", "", "i.jsonl: is empty"),
        ("l.json", "[" * 10**5, "l.json: holds lists or objects nested too deeply; leave it out"),
        ("m.jsonl", '{"preference": ' + "1" * 5000 + "}", "m.jsonl:1: holds a number of too many digits; leave it out"),
        ("n.csv", "preference,output_1,output_2\n2,a,b\n2,,b\n", "n.csv:3: has neither len_1 nor output_1, and other"),
        ("k.txt", "2", "k.txt: unknown format .txt; use .parquet, .jsonl, .csv, .json"),
    ):
        path = tmp_path / name
        path.write_text(text)
        assert told in complaint(capsys, "--preferences", path)
    assert "nowhere.csv: there is no such file" in complaint(capsys, "--preferences", tmp_path / "nowhere.csv")


def test_a_row_that_json_leaves_columns_out_of_is_null_there(tmp_path: Path) -> None:
    path = write_json(tmp_path / "j.json", [{"generator_2": "m"}, judged(2, generator_2="m")])
    assert (numbers(tmp_path, "--preferences", path)["n_dropped"]) == 1


# --- answers with scores ----------------------------------------------------------------------------------------------


def both(own: float, other: float, **more: object) -> Row:
    return {"policy_reward": own, "reference_reward": other, **more}


@pytest.mark.parametrize("ending", WRITERS)
def test_scores_of_both_models_in_one_file(ending: str, tmp_path: Path, capsys: Captured) -> None:
    texts = [("a b a b a b", "c"), ("same", "same"), ("d", "longer")]
    scores = [(1.5, -0.5), (2.0, 1.0), (-1.0, -1.0)]
    rows = [
        both(*score, prompt=f"say {n}", policy_answer=own, reference_answer=other)
        for n, (score, (own, other)) in enumerate(zip(scores, texts, strict=True))
    ]
    found = numbers(tmp_path, "--scores", WRITERS[ending](tmp_path / f"scores.{ending}", rows))
    assert (found["win_rate"]["wins"], found["win_rate"]["ties"], found["losses"]) == (2, 1, 0)
    assert found["win_rate"]["value"] == pytest.approx(5 / 6)
    assert found["reward"]["policy"]["value"] == pytest.approx(2.5 / 3)
    assert found["reward"]["delta"]["value"] == pytest.approx(1.0)
    assert found["reward"]["negative_share"] == pytest.approx({"policy": 1 / 3, "reference": 2 / 3})
    assert found["length"] == {"policy": {"characters": 16 / 3}, "reference": {"characters": 11 / 3}}
    # a b a b a b: the 4-grams abab, baba, abab, of which the third stood earlier; the other answers have none.
    assert found["text"]["policy"]["repetition_rate"] == pytest.approx(1 / 9)
    assert found["alpaca_eval"] is None
    assert "Answers of the same text with different scores, counted as scored: 1." in capsys.readouterr().out


def test_two_files_are_joined_by_prompt(tmp_path: Path, capsys: Captured) -> None:
    """The order of rows doesn't matter, prompt_id goes before prompt, and what only one file has is counted."""
    own = [{"prompt_id": n, "prompt": "same", "reward": n, "answer": "mine"} for n in (1, 2, 3)]
    other = [{"prompt_id": n, "prompt": "same", "reward": 2, "answer": "theirs"} for n in (4, 3, 2, 5)]
    first, second = write_jsonl(tmp_path / "own.jsonl", own), write_parquet(tmp_path / "other.parquet", other)
    found = numbers(tmp_path, "--scores", first, "--against", second)
    assert (found["n"], found["win_rate"]["wins"], found["win_rate"]["ties"]) == (2, 1, 1)
    assert found["n_unmatched"] == {"policy": 1, "reference": 2}
    assert found["length"]["reference"] == {"characters": 6.0}
    assert "2 (left out, in one file only: 1 of the model, 2 of the reference)" in capsys.readouterr().out
    by_text = [{"prompt": text, "reward": 1} for text in ("x", "y")]
    third = write_csv(tmp_path / "third.csv", by_text)
    found = numbers(tmp_path, "--scores", third, "--against", third)
    assert (found["win_rate"]["value"], found["win_rate"]["strict"], found["text"]) == (0.5, 0.0, None)
    assert complaint(capsys, "--scores", write_jsonl(tmp_path / "o.jsonl", own[:1]), "--against", third).endswith(
        "none of their 1 and 2 prompts is in both, by prompt; score the answers of both models to the same prompts"
    )


@pytest.mark.parametrize(
    ("rows", "told"),
    [
        ([both(1, 2)], "s.jsonl:1: has no prompt_id or prompt, by which answers are joined; fill it in"),
        ([both(1, 2, prompt=["x"])], "s.jsonl:1: prompt is neither text nor a whole number"),
        ([both(1, 2, prompt_id="a"), both(1, 2, prompt="b")], "s.jsonl:2: has no prompt_id, by which"),
        ([both(1, 2, prompt="a"), both(1, 2, prompt="a")], "s.jsonl:2: prompt 'a' comes twice, first at"),
        ([both(1, math.nan, prompt="a")], "s.jsonl:1: has no reference_reward; fill it in, or leave the row out"),
        ([both(math.inf, 1, prompt="a")], "s.jsonl:1: policy_reward is inf, not a finite number"),
        ([both(1, 2, prompt="a", policy_answer="x")], "s.jsonl:1: has no reference_answer; fill it in"),
        ([both(1, 2, prompt="a", policy_answer=3)], "s.jsonl:1: has, in place of text, a number or list as policy_"),
        (
            [{"prompt": "a", "reward": 1}],
            "s.jsonl:1: has no column policy_reward, reference_reward; found prompt, reward, needed policy_reward, "
            "reference_reward; if it is of one model, add --against FILE of the other",
        ),
    ],
)
def test_malformed_scores_are_one_line(rows: list[Row], told: str, tmp_path: Path, capsys: Captured) -> None:
    assert told in complaint(capsys, "--scores", write_jsonl(tmp_path / "s.jsonl", rows))


def test_text_health_by_hand() -> None:
    """Words: the cat the cat / the dog. 1-grams: 3 of 6 differ; 2-grams: the-cat, cat-the, the-dog of 4; 3-grams: 2."""
    found = text_health(["the cat  the\ncat", "the dog"])
    assert (found.distinct_1, found.distinct_2, found.distinct_3) == (3 / 6, 3 / 4, 2 / 2)
    assert found.repetition_rate == 0
    found = text_health(["", "no no no no no"])  # two 4-grams, of which the second stood earlier; no words: 0
    assert (found.distinct_1, found.repetition_rate) == (1 / 5, 0.25)
    assert text_health(["", " "]).distinct_1 is None


# --- runs -------------------------------------------------------------------------------------------------------------


def test_a_run_has_the_numbers_of_its_result(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Equal, not nearly: the same functions on the same resamples."""
    run = tmp_path / "run"
    chosen = ["evaluation.n_bootstrap=150", "evaluation.bootstrap_seed=3", f"hydra.run.dir={run}"]
    assert typed(monkeypatch, tmp_path, *small("loss=dpo", *chosen)) == 0
    out = tmp_path / "numbers.json"
    assert evaluate.main([str(run), "--json", str(out)]) == 0
    found, result = json.loads(out.read_text()), json.loads((run / "result.json").read_text())
    assert found["win_rate"] == result["win_rate"]
    assert found["reward"] == result["reward"]
    assert found["bootstrap"] == {"n": 150, "seed": 3}
    for who in ("policy", "reference"):
        assert found["length"][who]["characters"] == result["length"][who]["characters"]
    samples = run / "samples.jsonl"
    again = ["--scores", str(samples), "--n-bootstrap", "150", "--seed", "3", "--json", str(out)]
    assert evaluate.main(again) == 0
    assert {**json.loads(out.read_text()), "title": ""} == {**found, "title": ""}


def test_what_is_no_complete_run_is_one_line(tmp_path: Path, capsys: Captured) -> None:
    assert "is not the directory of a run; files go with --preferences or --scores" in complaint(capsys, tmp_path)
    stopped = write_run(tmp_path / "stopped", "loss=dpo", seed=0, status="interrupted")
    assert "has no answers to evaluate, it is interrupted; give a complete run" in complaint(capsys, stopped)
    damaged = write_run(tmp_path / "damaged", "loss=dpo", seed=0, rewards=[1, 2])
    (damaged / "samples.jsonl").unlink()
    assert "can't be read (samples.jsonl is missing); run it again" in complaint(capsys, damaged)
    nested = write_run(tmp_path / "nested", "loss=dpo", seed=0, rewards=[1, -1])
    shutil.copytree(nested, nested / "older")
    assert evaluate.main([str(nested), "--n-bootstrap", "100"]) == 0


# --- the command ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "give one of RUN_DIRECTORY, --preferences FILE and --scores FILE, not 0 of them"),
        (["run", "--scores", "x"], "not 2 of them"),
        (["--scores", "x", "--weights", "w"], "--weights: goes with --preferences; add that, or drop --weights"),
        (["--preferences", "x", "--model", "m"], "--model: goes with --weights"),
        (["run", "--against", "x"], "--against: goes with --scores"),
        (["--scores", "x", "--n-bootstrap", "5"], "--n-bootstrap 5: must be at least 100"),
        (["--scores", "x", "--seed", "-1"], "--seed -1: must be 0 or more"),
        (["--scores", "x", "--seed", "one"], "argument --seed: invalid int value: 'one'; see python -m dppo.evaluate"),
        (["--scores", "x", "--json", "/no/such/folder/x.json"], "must be a file in a folder that exists"),
        (["--scores", "x", "--json", "."], "--json .: must be a file in a folder that exists; make the folder first"),
    ],
)
def test_arguments_that_do_not_go_together(words: list[str], told: str, capsys: Captured) -> None:
    assert told in complaint(capsys, *words)


def test_names_from_a_file_cannot_steer_the_terminal(tmp_path: Path, capsys: Captured) -> None:
    path = write_jsonl(tmp_path / "j.jsonl", [judged(2, generator_2="\x1b[2J\nevil")])
    assert evaluate.main(["--preferences", str(path), "--n-bootstrap", "100"]) == 0
    assert capsys.readouterr().out.startswith("␛[2J␊evil against output_1\n")


def test_the_command_as_a_user_runs_it(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "j.jsonl", [judged(2), judged(1, own="a longer one"), judged(0)])
    done = subprocess.run(
        [sys.executable, "-m", "dppo.evaluate", "--preferences", "j.jsonl", "--json", "out.json"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.splitlines()[:4] == [
        "output_2 against output_1",
        "  prompts                       3",
        "  wins / ties / losses          1 / 1 / 1",
        "  win rate (ties 1/2)           0.500  [0.000, 1.000]",
    ]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["j.jsonl", "out.json"]


def test_the_commands_of_the_documentation_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).resolve().parents[1] / "docs" / "evaluate.md").read_text()
    (block,) = re.findall(r"```sh\n(.*?)```", text, re.DOTALL)
    commands = [shlex.split(line, comments=True) for line in block.splitlines()]
    (tmp_path / "outputs").mkdir()
    write_run(tmp_path / "outputs" / "mine", "loss=dpo", seed=0, rewards=[1, -1, 0])
    pairs = [judged(1.2, generator_2="mine", instruction_difficulty=0.5), judged(2, instruction_difficulty=1.0)]
    write_json(tmp_path / "annotations.json", pairs)
    write_parquet(tmp_path / "annotations.parquet", pairs)
    weights_file(tmp_path).rename(tmp_path / "glm_weights.csv")
    write_jsonl(tmp_path / "mine.jsonl", [{"prompt": "x", "reward": 1}])
    write_parquet(tmp_path / "other.parquet", [{"prompt": "x", "reward": 2}])
    monkeypatch.chdir(tmp_path)
    assert len(commands) == 6
    for words in commands:
        assert words[:3] == ["python", "-m", "dppo.evaluate"]
        assert evaluate.main(["mine" if word == "NAME" else word for word in words[3:]]) == 0
    assert json.loads((tmp_path / "out.json").read_text())["n"] == 2


# --- published numbers ------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not SHARED.is_dir(), reason="AlpacaEval's annotations are not here (DPPO_SHARED_DATA)")
def test_published_alpaca_eval_numbers(tmp_path: Path) -> None:
    compared = 0
    for board in sorted(SHARED.glob("*/leaderboard.csv")):
        with board.open(newline="") as file:
            models = {row[""]: row for row in csv.DictReader(file)}
        weights = board.with_name("glm_weights.csv")
        for model, published in models.items():
            words: list[str | Path] = ["--preferences", board.with_name(f"{model}.parquet")]
            columns = ["win_rate", "standard_error", "discrete_win_rate", "avg_length"]
            columns += ["n_wins", "n_wins_base", "n_draws", "n_total"]
            if weights.exists():
                words += ["--weights", weights]
                columns += [name for name in ("length_controlled_winrate", "lc_standard_error") if published[name]]
            found = numbers(tmp_path, *words)["alpaca_eval"]
            for name in columns:
                assert found[name] == pytest.approx(float(published[name]), abs=1e-9), f"{model} {name}"
                compared += 1
    assert compared >= 40
