"""Questions of chat benchmarks, and a model's answers to them in the files that the benchmarks' own judges read.

AlpacaEval: one JSON list. Arena-Hard-Auto and MT-Bench (FastChat's llm_judge): JSON lines, in a file that bears the
model's name. Of Arena-Hard-Auto both layouts are known, that of 2025 (``uid``, ``prompt``) and the one before
(``question_id``, ``turns``); which it is the questions say.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dppo.data import ids
from dppo.data.tables import placed_rows
from dppo.errors import UserError
from dppo.types import Json, Message, Prompt

Layout = Literal["alpaca_eval", "arena_hard", "arena_hard_0.1", "mt_bench"]
LAYOUTS = {"alpaca_eval": "AlpacaEval", "arena_hard": "Arena-Hard-Auto", "mt_bench": "MT-Bench"}
_ANSWER_ID_DIGITS = 22  # as many as the tools' own


@dataclass(frozen=True)
class Question:
    """The user turns of one question; ``key`` is its id in the benchmark's file, for AlpacaEval its place.

    ``dataset`` is AlpacaEval's name of the part that a question comes from, empty for the others.
    """

    key: Json
    turns: tuple[str, ...]
    dataset: str = ""


def read_questions(file: Path, benchmark: str) -> tuple[Layout, list[Question]]:
    """The questions of a benchmark's file and their layout. Raises UserError that names the file and the row."""
    if benchmark == "alpaca_eval":
        rows = placed_rows([file], ("instruction",), ("dataset",))
        return "alpaca_eval", [
            Question(number, (_text(row["instruction"], place, "instruction"),), str(row["dataset"] or file.stem))
            for number, (place, row) in enumerate(rows)
        ]
    if benchmark == "arena_hard":
        columns = ("uid", "prompt", "question_id", "turns")
        first, *_ = placed = list(placed_rows([file], (), columns))
        if first[1]["uid"] is not None:
            return "arena_hard", _unique(
                (place, Question(_key(row["uid"], place, "uid"), (_text(row["prompt"], place, "prompt"),)))
                for place, row in placed
            )
        return "arena_hard_0.1", _unique(_turns(place, row) for place, row in placed)
    return "mt_bench", _unique(_turns(place, row) for place, row in placed_rows([file], ("question_id", "turns")))


def prompt_of(turns: Sequence[str], answers: Sequence[str] = ()) -> Prompt:
    """The conversation before the next answer: ``turns`` so far, and the ``answers`` to all but the last of them."""
    messages: list[Message] = []
    for number, turn in enumerate(turns):
        messages.append(Message("user", turn))
        if number < len(answers):
            messages.append(Message("assistant", answers[number]))
    return Prompt(ids.prompt_id(messages), tuple(messages))


def answer_file(
    layout: Layout, questions: Sequence[Question], answers: Sequence[Sequence[str]], model: str, made: str
) -> str:
    """The text of a file of answers; ``answers`` of each question are by turn, ``made`` is the model's time, ISO 8601.

    Ids are hashes of model, question and answers, so that the same answers make the same file.
    """
    pairs = list(zip(questions, answers, strict=True))
    if layout == "alpaca_eval":
        rows = [
            {"dataset": question.dataset, "instruction": question.turns[0], "output": own[0], "generator": model}
            for question, own in pairs
        ]
        return json.dumps(rows, indent=2, ensure_ascii=False) + "\n"
    time = datetime.datetime.fromisoformat(made).timestamp()
    write = {"arena_hard": _arena_hard, "arena_hard_0.1": _arena_hard_old, "mt_bench": _mt_bench}[layout]
    lines = [{**write(question, own, model), "tstamp": time} for question, own in pairs]
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)


def _arena_hard(question: Question, answers: Sequence[str], model: str) -> dict[str, Any]:
    messages: list[dict[str, Any]] = []
    for turn, answer in zip(question.turns, answers, strict=True):
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": {"answer": answer}}]
    return {"uid": question.key, "ans_id": _answer_id(question, answers, model), "model": model, "messages": messages}


def _arena_hard_old(question: Question, answers: Sequence[str], model: str) -> dict[str, Any]:
    return _choices(question, answers, model, [{"content": answer} for answer in answers])


def _mt_bench(question: Question, answers: Sequence[str], model: str) -> dict[str, Any]:
    return _choices(question, answers, model, list(answers))


def _choices(question: Question, answers: Sequence[str], model: str, turns: list[Any]) -> dict[str, Any]:
    return {
        "question_id": question.key,
        "answer_id": _answer_id(question, answers, model),
        "model_id": model,
        "choices": [{"index": 0, "turns": turns}],
    }


def _answer_id(question: Question, answers: Sequence[str], model: str) -> str:
    return ids.content_hash([model, question.key, list(question.turns), list(answers)])[:_ANSWER_ID_DIGITS]


def _turns(place: str, row: Mapping[str, object]) -> tuple[str, Question]:
    turns = row["turns"]
    if not isinstance(turns, Sequence) or isinstance(turns, str) or not turns:
        raise UserError(f"{place}: turns is not a list of the user's turns")
    texts = tuple(_text(turn.get("content") if isinstance(turn, Mapping) else turn, place, "turns") for turn in turns)
    return place, Question(_key(row["question_id"], place, "question_id"), texts)


def _unique(placed: Iterable[tuple[str, Question]]) -> list[Question]:
    found: dict[Json, Question] = {}
    for place, question in placed:
        if question.key in found:
            raise UserError(f"{place}: a second question with the id {question.key}")
        found[question.key] = question
    return list(found.values())


def _text(value: object, place: str, name: str) -> str:
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{place}: {name} is not text")
    return value


def _key(value: object, place: str, name: str) -> str | int:
    if not isinstance(value, (str, int)) or isinstance(value, bool):
        raise UserError(f"{place}: {name} is neither text nor a whole number")
    return value
