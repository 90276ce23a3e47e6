"""The two generated data sets: what both promise, and what each is for."""

from __future__ import annotations

import dataclasses
import random
import re
import statistics
import time
from collections.abc import Callable
from typing import Any, get_args

import pytest

from dppo.data import Dataset, chats_identity, ids
from dppo.data.arithmetic import Arithmetic
from dppo.data.instructions import PARTNER, Instructions
from dppo.errors import UserError
from dppo.rewards.verifiable import Verifiable, inspect_answer, words_of
from dppo.types import Prompt, Split

LABELS = Verifiable(met=1.0, violated=1.0, repetition=2.0, surplus_word=0.02)
SPLITS: tuple[Split, ...] = get_args(Split)

Build = Callable[..., Instructions | Arithmetic]


def instructions(seed: int = 0, **settings: int | float) -> Instructions:
    base = Instructions(
        seed=seed, n_chats=300, n_pairs=200, n_validation=60, n_test=150,
        compliance=0.5, habit_spread=0.3, pair_compliance=0.5, labels=LABELS,
    )  # fmt: skip
    return dataclasses.replace(base, **settings)  # type: ignore[arg-type]


def arithmetic(seed: int = 0, **settings: int) -> Arithmetic:
    base = Arithmetic(
        seed=seed, n_chats=300, n_pairs=200, n_validation=60, n_test=150, largest_operand=12, largest_removed=4
    )
    return dataclasses.replace(base, **settings)


both = pytest.mark.parametrize("build", [instructions, arithmetic])


@both
def test_sizes_roles_and_ids(build: Build) -> None:
    data = build()
    assert isinstance(data, Dataset)
    sizes: list[tuple[Split, int, int]] = [("train", 300, 200), ("validation", 60, 60), ("test", 150, 150)]
    for split, n_chats, n_pairs in sizes:
        chats, pairs, prompts = data.chats(split), data.pairs(split), data.prompts(split)
        assert (len(chats), len(pairs), len(prompts)) == (n_chats, n_pairs, n_pairs)
        assert prompts == [pair.prompt for pair in pairs]
        for example in (*chats, *pairs):
            assert example.example_id == ids.example_id(example.prompt, example.responses)
            assert example.prompt.prompt_id == ids.prompt_id(example.prompt.messages)
            assert example.prompt.checks
        assert {tuple(response.role for response in chat.responses) for chat in chats} == {("chosen",)}
        assert {tuple(response.role for response in pair.responses) for pair in pairs} == {("chosen", "rejected")}
        assert len({prompt.prompt_id for prompt in prompts}) == len(prompts)
        assert len({chat.prompt.prompt_id for chat in chats}) == len(chats)
    LABELS.check(data.prompts("test"))


@both
def test_splits_share_no_prompt_for_any_pair_of_seeds(build: Build) -> None:
    """Not even the requests behind the prompts are shared, so no test prompt is a training prompt rephrased."""
    asked: dict[Split, set[tuple[tuple[str, str], ...]]] = {split: set() for split in SPLITS}
    texts: dict[Split, set[str]] = {split: set() for split in SPLITS}
    for seed in range(4):
        data = build(seed, n_chats=600, n_pairs=600, n_test=600)
        for split in SPLITS:
            for example in (*data.chats(split), *data.pairs(split)):
                texts[split].add(example.prompt.messages[0].content)
                asked[split].add(tuple(sorted(example.prompt.checks)))
    found = asked if build is instructions else texts
    for one, other in (("train", "validation"), ("train", "test"), ("validation", "test")):
        assert not found[one] & found[other]  # type: ignore[index]


@both
def test_a_seed_fixes_every_row_and_global_randomness_is_left_alone(build: Build) -> None:
    random.seed(1)
    state = random.getstate()
    first = [(build(3).chats(split), build(3).pairs(split)) for split in SPLITS]
    assert random.getstate() == state
    random.seed(2)
    assert first == [(build(3).chats(split), build(3).pairs(split)) for split in SPLITS]
    other = [(build(4).chats(split), build(4).pairs(split)) for split in SPLITS]
    assert all(mine[0] != theirs[0] and mine[1] != theirs[1] for mine, theirs in zip(first, other, strict=True))


@both
def test_a_smaller_size_is_the_beginning_of_a_larger_one(build: Build) -> None:
    """A sample limit then reuses every generation and reference log-prob of the larger set."""
    small, large = build(), build(n_chats=400, n_pairs=300, n_validation=80, n_test=200)
    for split in SPLITS:
        for kind in ("chats", "pairs", "prompts"):
            rows = getattr(small, kind)(split)
            assert rows == getattr(large, kind)(split)[: len(rows)]


@both
def test_identity_follows_every_setting(build: Build) -> None:
    base = build()
    others: dict[str, Any] = {"compliance": 0.4, "habit_spread": 0.1, "pair_compliance": 0.4}
    others["labels"] = Verifiable(met=1.0, violated=1.0, repetition=0.0, surplus_word=0.1)
    for field in dataclasses.fields(base):
        value = others.get(field.name) or getattr(base, field.name) + 1
        assert dataclasses.replace(base, **{field.name: value}).identity() != base.identity(), field.name
    assert build().identity() == base.identity()
    assert ids.canonical_json(base.identity())


@both
def test_default_sizes_take_well_under_a_second(build: Build) -> None:
    data = build(n_chats=8192, n_pairs=2048, n_validation=512, n_test=1024)
    times = []
    for _ in range(3):
        start = time.process_time()
        data.chats("train"), data.pairs("train"), data.prompts("test")
        times.append(time.process_time() - start)
    assert min(times) < 2.0  # about 0.4 s on a quiet machine; the margin is for a busy one


@pytest.mark.parametrize(
    ("build", "settings", "message"),
    [
        (instructions, {"seed": -1}, r"dataset\.seed=-1: must be >= 0"),
        (instructions, {"n_test": 0}, r"dataset\.n_test=0: must be >= 1"),
        (instructions, {"compliance": 1.0}, r"dataset\.compliance=1\.0: must be > 0 and < 1"),
        (instructions, {"pair_compliance": 0.0}, r"dataset\.pair_compliance=0\.0"),
        (instructions, {"habit_spread": 0.6}, r"dataset\.habit_spread=0\.6: must be >= 0 and <= 0\.5"),
        (instructions, {"n_validation": 10**9}, r"dataset\.n_validation=1000000000: must be >= 1 and <= "),
        (arithmetic, {"n_pairs": 0}, r"dataset\.n_pairs=0: must be >= 1"),
        (arithmetic, {"largest_operand": 31}, r"dataset\.largest_operand=31: must be >= 4 and <= 30"),
        (arithmetic, {"largest_removed": 13}, r"dataset\.largest_removed=13: must be >= 1 and <= 12"),
        (arithmetic, {"largest_operand": 4, "n_test": 10**6}, r"dataset\.n_test=1000000: must be >= 1 and <= "),
    ],
)
def test_settings_out_of_range(build: Build, settings: dict[str, int | float], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build(**settings)


# -- instructions ------------------------------------------------------------------------------------------------


def test_checks_say_what_the_prompt_says() -> None:
    for prompt in instructions(n_test=400).prompts("test"):
        text = prompt.messages[0].content.lower()
        kinds = dict(prompt.checks)
        for kind, argument in prompt.checks:
            if kind in ("mention", "finish"):
                assert argument in text
        said = {"one": "1", "two": "2"}
        limit = re.search(r"(one|two) sentences?\b", text)
        assert (said[limit[1]] if limit else None) == kinds.get("sentences")
        assert ("repeat yourself" in text or "twice" in text or "avoid repetition" in text) == (
            "no_repetition" in kinds
        )


def test_pairs_are_ordered_by_the_labels_and_differ_in_most_words() -> None:
    shared = []
    for pair in instructions().pairs("train"):
        chosen, rejected = pair.responses
        scores = LABELS.score([pair.prompt] * 2, [chosen.text, rejected.text])
        assert [chosen.score, rejected.score] == scores
        assert scores[0] > scores[1]
        first, second = words_of(chosen.text), words_of(rejected.text)
        places = zip(first, second, strict=False)
        shared.append(sum(a == b for a, b in places) / max(len(first), len(second)))
    assert statistics.mean(shared) < 0.35


def test_demonstrations_are_of_mixed_quality() -> None:
    """Rewards of both signs, every kind of check met about as often as ``compliance`` says, drift to partners."""
    for compliance in (0.3, 0.7):
        chats = instructions(n_chats=2000, compliance=compliance, habit_spread=0.0).chats("train")
        met: dict[str, list[int]] = {}
        drifted = 0
        for chat in chats:
            answer = chat.responses[0].text
            for check in chat.prompt.checks:
                met.setdefault(check[0], []).append(inspect_answer(answer, [check]).met)
                drifted += check[0] == "mention" and PARTNER[check[1]] in words_of(answer)
        for kind in ("mention", "finish", "sentences"):
            assert abs(statistics.mean(met[kind]) - compliance) < 0.12, (kind, compliance)
        assert abs(drifted / len(met["mention"]) - (1 - compliance)) < 0.12
        rewards = LABELS.score([chat.prompt for chat in chats], [chat.responses[0].text for chat in chats])
        assert 0.1 < statistics.mean(reward < 0 for reward in rewards) < 0.9
        assert len(set(rewards)) > 100


def test_habits_differ_between_words_by_at_most_their_spread() -> None:
    def rates(spread: float) -> list[float]:
        found: dict[str, list[bool]] = {}
        for chat in instructions(n_chats=6000, habit_spread=spread).chats("train"):
            written = words_of(chat.responses[0].text)
            for kind, word in chat.prompt.checks:
                if kind == "mention":
                    found.setdefault(word, []).append(word in written)
        return [statistics.mean(values) for values in found.values()]

    assert statistics.stdev(rates(0.0)) < 0.06 < 0.12 < statistics.stdev(rates(0.4))


# -- arithmetic --------------------------------------------------------------------------------------------------


def test_worked_answers_are_right_and_rejected_ones_wrong_by_one_or_two_tokens() -> None:
    counts = []
    for pair in arithmetic().pairs("train"):
        chosen, rejected = (response.text for response in pair.responses)
        parts = re.fullmatch(r"(\d+) plus (\d+) is (\d+), minus (\d+) is (\d+)\.", chosen)
        assert parts
        a, b, total, c, result = map(int, parts.groups())
        assert max(a, b) <= 12 and c <= 4
        assert a + b == total and total - c == result >= 0
        assert pair.prompt.checks == (("answer", str(result)),)
        assert [int(number) for number in re.findall(r"\d+", pair.prompt.messages[0].content)] == [a, b, c]
        right, wrong = LABELS.score([pair.prompt] * 2, [chosen, rejected])
        assert right > 0.4 > -1 > wrong
        differing = sum(x != y for x, y in zip(chosen.split(), rejected.split(), strict=True))
        assert all(int(number) >= 0 for number in re.findall(r"-?\d+", rejected))
        counts.append(differing)
    assert set(counts) == {1, 2}


def test_demonstrations_and_training_pairs_share_no_numbers() -> None:
    """Else the SFT model knows the pairs by heart: y_gen equals the chosen answer and no gate ever opens."""

    def numbers(prompt: Prompt) -> tuple[str, ...]:
        return tuple(re.findall(r"\d+", prompt.messages[0].content))

    data = arithmetic(n_chats=2000, n_pairs=2000)
    shown = {numbers(chat.prompt) for chat in data.chats("train")}
    for split in SPLITS:
        assert not shown & {numbers(prompt) for prompt in data.prompts(split)}


@both
def test_what_is_not_in_the_identity_of_the_chats_changes_no_chat(build: Build) -> None:
    """SFT models are shared by it, so every setting is tried: it changes the chats and this identity, or neither."""
    data = build(n_chats=40, n_pairs=30, n_validation=20)
    for field in dataclasses.fields(data):
        value = getattr(data, field.name)
        number = value + 1 if isinstance(value, int) else value / 2 if isinstance(value, float) else None
        changed: Any = dataclasses.replace(LABELS, met=2.0) if number is None else number
        other = build(
            **{**{one.name: getattr(data, one.name) for one in dataclasses.fields(data)}, field.name: changed}
        )
        assert other.identity() != data.identity()
        equal = all(other.chats(split) == data.chats(split) for split in ("train", "validation"))
        assert equal == (chats_identity(other) == chats_identity(data)), field.name
