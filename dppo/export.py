"""``python -m dppo.export RUN``: a run's model as a transformers folder with a card, or its answers for judges."""

from __future__ import annotations

import dataclasses
import os
import secrets
import sys
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

from dppo import config
from dppo.artifacts.files import remove, sync_tree, write_atomic
from dppo.command_line import Parser, command
from dppo.config import SamplingSettings
from dppo.errors import UserError
from dppo.evaluation.questions import LAYOUTS, Question, answer_file, prompt_of, read_questions
from dppo.evaluation.runs import Run, complete_run, sample_rows
from dppo.model_card import Who, model_card
from dppo.terminal import harmless, print_anything

if TYPE_CHECKING:
    from dppo.data.encoding import ChatEncoder
    from dppo.generation import VLLM, Greedy
    from dppo.stages.workbench import Workbench
    from dppo.types import Artifact

_FLAGS = {name: f"--{name.replace('_', '-')}" for name in ("model", *LAYOUTS)}


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, or 2 for a user's error."""
    arguments = _parser().parse_args(argv)
    kind, place = _check(arguments)
    print_anything()
    run = complete_run(arguments.run, "model to export")
    who: Who = "reference" if arguments.reference else "policy"
    if kind == "model":
        _export_model(run, who, place, arguments)
    elif arguments.questions is None:
        rows = list(sample_rows(run).values())
        questions = [Question(number, (row["prompt"],), _origin(run)) for number, row in enumerate(rows)]
        answers = [(row[f"{who}_answer"],) for row in rows]
        _write(place, answer_file("alpaca_eval", questions, answers, arguments.name or place.stem, ""))
    else:
        _export_answers(run, who, kind, place, arguments)
    print(harmless(str(place)))
    return 0


def _parser() -> Parser:
    parser = Parser(prog="python -m dppo.export", description=(__doc__ or "").replace("``", ""))
    parser.add_argument("run", type=Path, help="directory of a complete run")
    parser.add_argument("--model", type=Path, metavar="FOLDER", help="weights, tokenizer and card into a new folder")
    for name, title in LAYOUTS.items():
        own = "; without --questions the run's own" if name == "alpaca_eval" else ""
        parser.add_argument(_FLAGS[name], type=Path, metavar="FILE", help=f"answers in the format of {title}{own}")
    parser.add_argument("--questions", type=Path, metavar="FILE", help="the benchmark's questions")
    parser.add_argument("--reference", action="store_true", help="the SFT model in place of the trained policy")
    parser.add_argument("--name", help="what the model is called (default: the name of the new file or folder)")
    parser.add_argument("--max-new-tokens", type=int, metavar="N", help="longest answer (default: the run's)")
    parser.add_argument("--cache", type=Path, metavar="FOLDER", help="the run's cache (default: as the run says)")
    parser.add_argument("--device", help="auto, cpu, cuda, cuda:N, mps or xpu (default: the run's)")
    return parser


def _check(arguments: Namespace) -> tuple[str, Path]:
    """What is to be written, and where. Raises UserError for arguments that don't go together."""
    given = [name for name in _FLAGS if getattr(arguments, name) is not None]
    if len(given) != 1:
        raise UserError(f"give one of {', '.join(_FLAGS.values())}, not {len(given)} of them")
    (kind,) = given
    place: Path = getattr(arguments, kind)
    if arguments.questions is None and kind not in ("model", "alpaca_eval"):
        raise UserError(f"{_FLAGS[kind]}: needs --questions, the benchmark's question.jsonl")
    if arguments.questions is not None and kind == "model":
        raise UserError("--questions: goes with a format of answers; drop it, or drop --model")
    if arguments.max_new_tokens is not None:
        if arguments.questions is None:
            raise UserError("--max-new-tokens: goes with --questions; drop it")
        if arguments.max_new_tokens < 1:
            raise UserError(f"--max-new-tokens {arguments.max_new_tokens}: must be at least 1")
    if place.exists() or place.is_symlink():
        raise UserError(f"{_FLAGS[kind]} {place}: is there already; choose another place, or remove it")
    if not place.absolute().parent.is_dir():
        raise UserError(f"{_FLAGS[kind]} {place}: its folder does not exist; make it first")
    return kind, place


def _origin(run: Run) -> str:
    data = run.settings.get("dataset") or {}
    return f"{str(data.get('_target_', 'data')).rpartition('.')[2]} {run.result['split']}"


def _model(run: Run, who: Who, arguments: Namespace) -> tuple[Workbench, Artifact, str, ChatEncoder]:
    """(bench, model, when it was made, encoder). Raises UserError where the cache has lost it."""
    from dppo.data.encoding import ChatEncoder
    from dppo.models import saved_tokenizer
    from dppo.pipeline import workbench
    from dppo.stages.finished import model_slot

    cache = arguments.cache or Path(config.recorded(run.settings, "cache").dir)
    bench = workbench(str(cache), arguments.device or config.recorded(run.settings, "device"))
    remedy = f"add --cache with that run's cache, or run it again: {run.result['command']}"
    slot = model_slot(bench, who, run.result["models"][who], str(run.path), remedy)
    encoder = ChatEncoder(saved_tokenizer(slot.path))
    return bench, slot.artifact(reused=True), slot.manifest().created, encoder


def _export_model(run: Run, who: Who, place: Path, arguments: Namespace) -> None:
    from dppo.stages.training import write_model

    bench, model, _, encoder = _model(run, who, arguments)
    building = place.parent / f".{place.name[:40]}.{secrets.token_hex(4)}.tmp"
    try:
        building.mkdir()
        write_model(bench, model, building)
        _write_generation_settings(building, encoder, config.recorded(run.settings, "generation"))
        card = model_card(run, who, arguments.name or place.name)
        (building / "README.md").write_text(card, encoding="utf-8")
        sync_tree(building)
        if place.exists():  # since it was checked; renaming would replace an empty folder
            raise UserError(f"--model {place}: is there already; choose another place, or remove it")
        os.rename(building, place)
    finally:
        remove(building)


def _write_generation_settings(folder: Path, encoder: ChatEncoder, settings: Greedy | VLLM) -> None:
    """Those of the run, for tools that read them: greedy, up to any token that ends a turn."""
    from transformers import GenerationConfig

    tokenizer = encoder.tokenizer
    ends = sorted(encoder.end_of_turn_ids)
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else ends[0]
    GenerationConfig(
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=ends if len(ends) > 1 else ends[0],
        pad_token_id=padding,
        do_sample=False,
        max_new_tokens=settings.max_new_tokens,
    ).save_pretrained(folder)


def _export_answers(run: Run, who: Who, kind: str, place: Path, arguments: Namespace) -> None:
    from dppo.generation import decoding_of
    from dppo.stages.generate import generate

    layout, questions = read_questions(arguments.questions, kind)
    settings = decoding_of(config.recorded(run.settings, "generation"), _sampling(run))
    if arguments.max_new_tokens is not None:
        settings = dataclasses.replace(settings, max_new_tokens=arguments.max_new_tokens)
    bench, model, made, encoder = _model(run, who, arguments)
    answers: list[list[str]] = [[] for _ in questions]
    for turn in range(max(len(question.turns) for question in questions)):
        # A later turn is asked behind the model's own answers to those before it.
        asked = {
            at: prompt_of(question.turns[: turn + 1], answers[at])
            for at, question in enumerate(questions)
            if turn < len(question.turns)
        }
        _, found = generate(bench, "answers", model, list(asked.values()), settings, encoder)
        for at, prompt in asked.items():
            answers[at].append(found[prompt.prompt_id].text)
    _write(place, answer_file(layout, questions, answers, arguments.name or place.stem, made))


def _sampling(run: Run) -> SamplingSettings | None:
    """How the run's answers were sampled; None: they are greedy."""
    values = (run.settings.get("evaluation") or {}).get("sampling")
    if values is None:
        return None
    return cast("SamplingSettings", config.typed(SamplingSettings, values, "evaluation.sampling"))


def _write(place: Path, text: str) -> None:
    write_atomic(place, text.encode())


if __name__ == "__main__":
    sys.exit(main())
