"""Rewards over HTTP, against a real server that fails in every way that servers do."""

from __future__ import annotations

import dataclasses
import email.utils
import functools
import json
import math
import operator
import os
import signal
import sys
import time
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml

from dppo import config
from dppo.errors import UserError
from dppo.rewards import GradualReward, Reward
from dppo.rewards.endpoint import Endpoint
from dppo.rewards.endpoints import Server
from dppo.types import Message, Prompt
from tests.conftest import outside, small
from tests.endpoint_server import Served, completion, serve
from tests.forks import Forks
from tests.runs import run_small
from tests.test_command_line import typed

KEY = "sk-planted-0123456789"
VARIABLE = "ENDPOINT_TEST_API_KEY"
PROMPTS = [
    Prompt("p0", (Message("user", "Say hello."),)),
    Prompt("p1", (Message("system", "Be brief."), Message("user", "Name a bird."), Message("assistant", "Robin."),
                  Message("user", "Another one."))),
    Prompt("p2", (Message("user", "Count."),)),
]  # fmt: skip
ANSWERS = ["hello", "wren", "one two three"]


@pytest.fixture(autouse=True)
def _key(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, KEY)


@pytest.fixture
def scorer() -> Iterator[Served]:
    """A reward model whose score is the length of the answer, in the reply format of Nemotron."""

    def say(body: dict[str, Any]) -> Any:
        if "messages" in body:
            return completion(f"reward:-{len(body['messages'][-1]['content'])}.5")
        return {"data": [{"score": len(body["response"]) + 0.25}]}

    with serve(say) as served:
        yield served


def loaded(option: str, *words: str, cls: type = Endpoint) -> Any:
    """An option with values that replace its own, without the second that composing takes."""
    values = yaml.safe_load((config.CONF_DIR / "reward" / f"{option}.yaml").read_text())
    del values["_target_"]
    for word in words:
        key, _, value = word.partition("=")
        *path, last = key.removeprefix("reward.").split(".")
        functools.reduce(operator.getitem, path, values)[last] = yaml.safe_load(value)
    return config.typed(cls, values, "reward")


def quick(url: str, *words: str) -> list[str]:
    """Words for a server that is asked without patience."""
    given: dict[str, Any] = {"concurrency": 2, "timeout": 20.0, "max_attempts": 4, "first_wait": 0.01, "max_wait": 1.0}
    given |= {"base_url": url, "api_key_env": VARIABLE}
    changed = {word.partition("=")[0] for word in words}
    return [
        *(f"reward.server.{key}={value}" for key, value in given.items() if f"reward.server.{key}" not in changed),
        *words,
    ]


def nemotron(served: Served, *words: str) -> Endpoint:
    found: Endpoint = loaded("nemotron_70b", *quick(served.v1, *words))
    return found


def plain(served: Served, *words: str) -> Endpoint:
    chosen = ["reward.format=json", "reward.result=data.0.score"]
    found: Endpoint = loaded("endpoint", *quick(served.url, *chosen, *words))
    return found


# --- formats ---------------------------------------------------------------------------------------------------------


def test_nemotron_gets_the_conversation_and_its_reply_is_read(scorer: Served) -> None:
    reward = nemotron(scorer)
    assert isinstance(reward, Reward)
    assert isinstance(reward, GradualReward)
    reward.check(PROMPTS)
    assert scorer.bodies == [], "a check asks nothing"
    assert reward.score(PROMPTS, ANSWERS) == [-5.5, -4.5, -13.5]
    assert set(scorer.keys) == {f"Bearer {KEY}"}
    sent = next(body for body in scorer.bodies if len(body["messages"]) > 2)
    assert sent == {
        "model": "nvidia/llama-3.1-nemotron-70b-reward",
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Name a bird."},
            {"role": "assistant", "content": "Robin."},
            {"role": "user", "content": "Another one."},
            {"role": "assistant", "content": "wren"},
        ],
    }


@pytest.mark.parametrize(
    ("reply", "score"),
    [
        (completion("reward:-5.34375"), -5.34375),
        (completion(" reward: 3 \n"), 3.0),
        (completion("reward:1.5e-05"), 1.5e-05),
        (completion("", logprobs={"content": [{"token": "reward", "logprob": -2.25}]}), -2.25),
        (completion(None, logprobs={"content": [{"token": "reward", "logprob": 7}]}), 7.0),
        (completion("reward:1", logprobs={"content": [{"token": "reward", "logprob": 2.0}]}), 1.0),
        (completion("reward:nan"), None),
        (completion("reward:"), None),
        (completion("the reward:1 is good"), None),
        (completion("reward:1,other:2"), None),
        (completion("-5.3"), None),
        (completion("reward:1e999"), None),
        (completion(""), None),
        (completion(None, logprobs={"content": [{"token": "other", "logprob": 7}]}), None),
        (completion(None, logprobs={"content": [{"token": "reward", "logprob": math.nan}]}), None),
        ({"choices": []}, None),
        ({"error": "no"}, None),
        ([1], None),
        ({"choices": [{"message": "reward:1"}]}, None),
    ],
)
def test_a_reply_is_a_score_or_an_error_never_a_guess(reply: Any, score: float | None) -> None:
    with serve(lambda body: reply) as served:
        reward = nemotron(served)
        if score is not None:
            assert reward.score(PROMPTS[:1], ["x"]) == [score]
            assert len(served.bodies) == 1
            return
        with pytest.raises(UserError, match=r"1 of 1 requests failed, the first: .*its .* \((asked|tried) 4 times\)$"):
            reward.score(PROMPTS[:1], ["x"])
        assert len(served.bodies) == 4


def test_a_template_asks_a_chat_model_for_a_number() -> None:
    with serve(lambda body: completion("7")) as served:
        words = ["reward.model=rater", "reward.parameters={temperature: 0, max_tokens: 4}"]
        words += ["reward.template='Rate {response} as an answer to {prompt}: 0 to 9'"]
        reward = loaded("endpoint", *quick(served.v1, *words))
        assert reward.score(PROMPTS[:1], ["{prompt} and {response}"]) == [7.0]
    (body,) = served.bodies
    question = "Rate {prompt} and {response} as an answer to Say hello.: 0 to 9"
    assert body == {
        "model": "rater",
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": 4,
    }


def test_plain_json_goes_to_the_address_itself(scorer: Served) -> None:
    request = (
        "reward.request={response: '{response}', chat: ['{messages}', 1], text: 'Q {prompt} {other}', m: '{model}'}"
    )
    reward = plain(scorer, request, "reward.model=small")
    assert reward.score(PROMPTS, ANSWERS) == [5.25, 4.25, 13.25]
    sent = next(body for body in scorer.bodies if body["response"] == "hello")
    assert sent == {
        "response": "hello",
        "chat": [[{"role": "user", "content": "Say hello."}], 1],
        "text": "Q Say hello. {other}",
        "m": "small",
    }
    texts = [body["text"] for body in scorer.bodies if body["response"] == "wren"]
    assert texts == ["Q System: Be brief.\n\nUser: Name a bird.\n\nAssistant: Robin.\n\nUser: Another one. {other}"]


@pytest.mark.parametrize(
    "reply", [{"data": [{"score": None}]}, {"data": [{"score": "3"}]}, {"data": [{"score": True}]}, {"data": []},
              {"data": {"0": 1}}, {"data": [{"score": math.nan}]}, {"data": [{"score": math.inf}]}, 3, None],
)  # fmt: skip
def test_json_without_a_number_in_its_place_is_an_error(reply: Any) -> None:
    with serve(lambda body: reply) as served:
        with pytest.raises(UserError, match=r"reward\.result=data\.0\.score of its reply .* \(asked 4 times\)$"):
            plain(served).score(PROMPTS[:1], ["x"])
        assert len(served.bodies) == 4


# --- servers that fail -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("fault", [429, 500, 502, 503, 408, "drop", "truncated", "torn", "html", "slow"])
@pytest.mark.parametrize("kind", [nemotron, plain])
def test_a_passing_failure_is_tried_again(fault: Any, kind: Any, scorer: Served) -> None:
    scorer.faults.extend([fault] * 2)
    patience = ["reward.server.timeout=1"] if fault == "slow" else []
    reward = kind(scorer, "reward.server.concurrency=1", *patience)
    expected = [-5.5, -4.5, -13.5] if kind is nemotron else [5.25, 4.25, 13.25]
    assert reward.score(PROMPTS, ANSWERS) == expected
    assert len(scorer.bodies) == 5, "two attempts failed, nothing else was asked twice"


@pytest.mark.parametrize("date", [False, True])
def test_retry_after_is_obeyed_by_all_requests(date: bool, scorer: Served) -> None:
    wait = email.utils.formatdate(time.time() + 3, usegmt=True) if date else "0.4"
    scorer.faults.append((429, wait))
    reward = nemotron(scorer, "reward.server.concurrency=1", "reward.server.max_wait=4")
    reward.score(PROMPTS, ANSWERS)
    gaps = [after - before for before, after in pairwise(scorer.times)]
    assert gaps[0] >= (0.9 if date else 0.4), "a date has whole seconds"
    many = [PROMPTS[0]] * 8
    scorer.times.clear()
    scorer.faults.append((429, "0.5"))
    scorer.delay = 0.05
    nemotron(scorer, "reward.server.concurrency=4").score(many, [str(n) for n in range(8)])
    early = [one for one in scorer.times if one - scorer.times[0] < 0.5]
    assert len(early) <= 6, "the others wait too, all but what was on its way"


def test_a_server_that_wants_too_long_a_pause_ends_it(scorer: Served) -> None:
    scorer.faults.append((429, "3600"))
    with pytest.raises(UserError, match=r"status 429: .*slow down.*come back in 3600 s, more than max_wait=1") as error:
        nemotron(scorer, "reward.server.concurrency=1").score(PROMPTS, ANSWERS)
    assert "\n" not in str(error.value)
    assert len(scorer.bodies) == 1


def test_waits_double_and_are_cut_at_random(scorer: Served) -> None:
    scorer.faults.extend([500] * 8)
    words = ["reward.server.first_wait=0.05", "reward.server.max_wait=0.2", "reward.server.max_attempts=9"]
    nemotron(scorer, *words).score(PROMPTS[:1], ["x"])
    gaps = [after - before for before, after in pairwise(scorer.times)]
    for gap, full in zip(gaps, [0.05, 0.1, *[0.2] * 6], strict=True):
        assert gap >= full / 2
    assert sum(gaps) < 5, "without a limit 6.4 at least"


@pytest.mark.parametrize(
    ("status", "n_asked", "said"),
    [
        (401, 1, f"the key in the environment variable {VARIABLE} is not accepted"),
        (403, 1, f"the key in the environment variable {VARIABLE} is not accepted"),
        (404, 1, "there is no such address or model: look at reward.server.base_url and reward.model"),
        (405, 1, "status 405"),
        (400, 2, "2 of 6 requests failed, the first: status 400"),
        (413, 2, "2 of 6 requests failed, the first: status 413"),
    ],
)
@pytest.mark.parametrize("kind", [nemotron, plain])
def test_a_refusal_is_one_line_and_not_tried_again(
    status: int, n_asked: int, said: str, kind: Any, scorer: Served
) -> None:
    scorer.faults.extend([status] * 6)
    reward = kind(scorer, "reward.server.concurrency=1", "reward.server.max_failures=1")
    with pytest.raises(UserError) as error:
        reward.score(PROMPTS * 2, [*ANSWERS, "a", "b", "c"])
    assert said in str(error.value)
    assert str(error.value).startswith(f"reward.server.base_url={scorer.url}")
    assert "\n" not in str(error.value)
    assert len(scorer.bodies) == n_asked
    assert KEY not in str(error.value), "the server repeats it"
    assert "***" in str(error.value)


def test_failures_are_counted_and_what_was_answered_is_given_out_first(scorer: Served) -> None:
    scorer.faults.extend([None, 400, None, 400, None, 400])
    prompts, answers = PROMPTS * 4, [str(n) for n in range(12)]
    reward = nemotron(scorer, "reward.server.concurrency=1", "reward.server.max_failures=3")
    came: list[int] = []
    with pytest.raises(UserError, match=r"3 of 12 requests failed, .*; what was answered is kept"):
        place_and_score(reward, prompts, answers, came)
    assert sorted(came) == [0, 2, 4, 6, 7, 8, 9, 10, 11], "three failures are within the limit: the rest is asked"
    scorer.faults.extend([None, 400, None, 400, None, 400])
    fewer = nemotron(scorer, "reward.server.concurrency=1", "reward.server.max_failures=2")
    came.clear()
    with pytest.raises(UserError, match="3 of 12 requests failed"):
        place_and_score(fewer, prompts, answers, came)
    assert came == [0, 2, 4], "the third one is too many"


def place_and_score(reward: Endpoint, prompts: list[Prompt], answers: list[str], came: list[int]) -> dict[int, float]:
    found = {}
    for place, score in reward.scores(prompts, answers):
        came.append(place)
        found[place] = score
    return found


def test_no_more_requests_are_under_way_than_allowed(scorer: Served) -> None:
    scorer.delay = 0.05
    reward = nemotron(scorer, "reward.server.concurrency=3", "reward.server.timeout=5")
    reward.score([PROMPTS[0]] * 12, [str(n) for n in range(12)])
    assert scorer.most_at_once == 3


def test_nobody_is_there() -> None:
    with serve(lambda body: None) as served:
        pass
    with pytest.raises(UserError, match=r"no connection \(.*refused.*\) \(tried 4 times\)"):
        nemotron(served).score(PROMPTS, ANSWERS)


def test_who_stops_reading_stops_asking(scorer: Served) -> None:
    scorer.delay = 0.02
    found = nemotron(scorer).scores([PROMPTS[0]] * 50, [str(n) for n in range(50)])
    next(found)
    found.close()  # type: ignore[attr-defined]
    time.sleep(0.15)
    assert len(scorer.bodies) <= 6


# --- keys and addresses ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("word", "said"),
    [
        ("reward.server.base_url='http://me:secretword@host/v1'", "base_url: must not hold a user name, a password"),
        ("reward.server.base_url='http://host/v1?api_key=secretword'", "base_url: must not hold a user name"),
        ("reward.server.base_url='http://host/v1#secretword'", "base_url: must not hold"),
        ("reward.server.base_url=host/v1", "base_url=host/v1: must begin with http:// or https://"),
        ("reward.server.base_url=ftp://host", "base_url=ftp://host: must begin with http:// or https://"),
        ("reward.server.base_url='http://[secretword'", "base_url: is not an address"),
        ("reward.server.api_key_env=sk-secretword", "api_key_env: must be the NAME of an environment variable"),
        ("reward.server.concurrency=0", "concurrency=0: must be at least 1"),
        ("reward.server.timeout=0", "timeout=0.0: must be > 0 seconds"),
        ("reward.server.max_wait=0.5", "max_wait=0.5: must be at least first_wait"),
        ("reward.server.max_failures=-1", "max_failures=-1: must be at least 0"),
        ("reward.parameters={stream: true}", "parameters.stream=True: is not a parameter that can be set here"),
        ("reward.pattern='(1'", "pattern=(1: is not a regular expression"),
        ("reward.pattern='1'", "pattern=1: must have a group"),
        ("reward.template='{response}'", "template={response}: must hold {prompt}"),
        ("reward.model=null", "model=null: format=chat needs the name of the model"),
    ],
)
def test_settings_that_cannot_work_are_refused_without_repeating_secrets(word: str, said: str) -> None:
    with pytest.raises(UserError) as error:
        loaded("nemotron_70b", word)
    assert said in str(error.value)
    assert str(error.value).startswith("reward.")
    assert "secretword" not in str(error.value)
    assert "\n" not in str(error.value)


def test_json_settings_are_checked() -> None:
    words = ["reward.server.base_url=http://host", "reward.format=json"]
    loaded("endpoint", *words)
    with pytest.raises(UserError, match=r"reward\.request=.*must hold \{response\} or \{conversation\}"):
        loaded("endpoint", *words, "reward.request.response=x")
    with pytest.raises(UserError, match=r"reward\.result=: must be a path"):
        loaded("endpoint", *words, "reward.result=''")
    with pytest.raises(UserError, match=r"reward\.server\.base_url"):
        loaded("endpoint", "reward.format=json")


def test_the_key_comes_from_the_environment_alone(scorer: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE)
    with pytest.raises(UserError, match=rf"reward\.server\.api_key_env={VARIABLE}: this environment variable is not"):
        nemotron(scorer).check(PROMPTS)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    for make in (nemotron, plain):
        make(scorer, "reward.server.api_key_env=null").score(PROMPTS[:1], ["x"])
    assert not any(KEY in (key or "") for key in scorer.keys), "another service's key is not sent"


def test_what_decides_a_score_is_in_its_identity(scorer: Served) -> None:
    base = nemotron(scorer).identity()
    assert KEY not in json.dumps(base)
    for same in ("server.concurrency=7", "server.timeout=9", "server.max_attempts=9", "server.api_key_env=OTHER"):
        assert nemotron(scorer, f"reward.{same}").identity() == base
    assert loaded("nemotron_70b", "reward.server.base_url=http://elsewhere/v1").identity() == base
    for other in ("model=other", "revision=b", "parameters={temperature: 1}", "pattern='(.*)'", "logprob_of=null"):
        assert nemotron(scorer, f"reward.{other}").identity() != base
    one = plain(scorer)
    assert one.identity() != loaded("endpoint", *quick("http://else", "reward.format=json")).identity()
    assert one.identity() != plain(scorer, "reward.result=other").identity()
    assert one.identity() != plain(scorer, "reward.request.more=1").identity()
    assert one.identity() == plain(scorer, "reward.pattern='(x)'").identity(), "what json does not read"


def test_without_the_package_it_says_what_to_install(scorer: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)  # as an import finds it that is not installed
    for act in (lambda: nemotron(scorer).check(PROMPTS), lambda: plain(scorer).score(PROMPTS, ANSWERS)):
        with pytest.raises(UserError, match=r"needs the package openai: pip install 'dppo\[endpoint\]'"):
            act()


# --- through the pipeline --------------------------------------------------------------------------------------------


def test_a_run_is_scored_by_an_endpoint_and_holds_no_key(
    scorer: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    scorer.faults.extend([500, (429, "0.1"), "drop"])
    words = ["loss=dpo", "train.steps=2", "tracking=jsonl", *quick(scorer.v1)]
    words = small("reward=nemotron_70b", *words, "hydra.run.dir=run", "cache.dir=cache", "device=cpu")
    status, said = typed(monkeypatch, tmp_path, *words), capfd.readouterr()
    assert status == 0, said.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    samples = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert len(samples) == 8
    for row in samples:
        assert row["policy_reward"] == -len(row["policy_answer"]) - 0.5
    assert result["reward"]["negative_share"]["policy"] == 1
    asked = {(json.dumps(body["messages"][:-1]), body["messages"][-1]["content"]) for body in scorer.bodies}
    assert len(scorer.bodies) == len(asked) + 3, "each text once, and three attempts that failed"
    assert "chat/completions" not in said.err + (tmp_path / "run" / "run.log").read_text(), "a line a request"
    leaks = [path for path in tmp_path.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]
    assert leaks == []
    assert KEY not in said.out + said.err


@pytest.mark.parametrize("end", ["error", "kill"])
def test_scores_that_were_obtained_are_never_asked_again(
    end: str, scorer: Served, forks: Forks, tmp_path: Path
) -> None:
    """A run that dies of its endpoint, or by kill -9, after 80 answers; the same command then asks for the rest."""
    # The learning rate makes the policy's answers differ from the SFT model's: about twice as many as prompts.
    words = ["dataset.n_test=60", "evaluation.n_prompts=60", "train.steps=2", "loss=dpo", "train.learning_rate=0.05"]
    words += quick(scorer.v1, "reward.server.concurrency=3", "reward.server.timeout=5", "reward.server.max_attempts=1")
    words = ["reward=nemotron_70b", *words]
    if end == "error":
        scorer.broken_after = 80
        with pytest.raises(UserError, match=r"[4-6] of \d+ requests failed, the first: status 500"):
            run_small(tmp_path, *words)
        kept = 80
    else:
        scorer.delay = 0.005
        command = small(*words, "hydra.run.dir=run", f"cache.dir={tmp_path / 'cache'}", "device=cpu")
        process = forks.start("dppo", command, cwd=tmp_path, env={**outside(), VARIABLE: KEY})
        while len(scorer.bodies) < 80:
            assert process.poll() is None
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        kept = len(scorer.bodies) - 8 - 2 * 3 - 1  # a shard that was not full, and what was under way or just answered
    scorer.broken_after, scorer.delay = None, 0.0
    n_before = len(scorer.bodies)
    assert run_small(tmp_path, *words).result["status"] == "complete"
    later = [json.dumps(body) for body in scorer.bodies[n_before:]]
    n_texts = len({json.dumps(body) for body in scorer.bodies})
    assert n_texts > 100
    assert len(later) == len(set(later)) <= n_texts - kept
    n_after = len(scorer.bodies)
    run_small(tmp_path, *words)
    assert len(scorer.bodies) == n_after


def test_interim_measurements_ask_for_no_text_twice(scorer: Served, tmp_path: Path) -> None:
    words = ["reward=nemotron_70b", *quick(scorer.v1), "loss=dpo", "train.learning_rate=1e-9"]
    words += ["evaluation.interim.n_points=3", "evaluation.interim.n_prompts=8", "evaluation.split=validation"]
    run_small(tmp_path, *words)
    asked = [json.dumps(body) for body in scorer.bodies]
    assert len(asked) == len(set(asked)) == 8, (
        "a policy that has not moved answers as the SFT model, to the same prompts"
    )


def test_a_dry_run_asks_nothing(scorer: Served, tmp_path: Path) -> None:
    words = small("reward=nemotron_70b", *quick(scorer.v1), f"cache.dir={tmp_path}", "device=cpu", "loss=dpo")
    from dppo import plan

    found = plan.plan(config.load(config.compose(words), words))
    assert next(step.work for step in found.steps if step.title == "scores") > 0
    assert scorer.bodies == []


def test_every_number_of_a_server_is_documented() -> None:
    """No field of ``Server`` may be missing from an option that has one."""
    fields = {field.name for field in dataclasses.fields(Server)}
    for option, words in (("endpoint", ["reward.server.base_url=http://x", "reward.model=m"]), ("nemotron_70b", [])):
        composed = config.compose([f"reward={option}", *words])
        assert set(composed.reward.server) == fields
    assert get_args(Endpoint.__annotations__["format"]) or Endpoint.__annotations__["format"].startswith("Literal")
