"""``python -m dppo.inspect WORDS``: what the model will see of a data set, with lengths, drops and split overlaps.

Takes the words of ``python -m dppo``, and ``n=3`` and ``split=train``. Loads the tokenizer and no weights, and changes
no file. The exit status is 1 if a prompt is both trained on and evaluated.
"""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal, get_args

from dppo import config, startup, threads
from dppo.artifacts import ReadOnly
from dppo.command_line import EXIT_FAILED, Parser, aligned, command
from dppo.data import CountedDataset, Dataset, examples_for
from dppo.data.encoding import ChatEncoder, EncodedSet, percentile
from dppo.data.on_policy import OnPolicy
from dppo.data.subsets import nested_subset
from dppo.data.tokenised import Tokenised
from dppo.errors import UserError
from dppo.rewards import PairwiseReward, Reward
from dppo.rewards.bradley_terry import BradleyTerry
from dppo.terminal import harmless, print_anything
from dppo.types import EncodedExample, EncodedResponse, PreferenceExample, Role, Shape, Split, StatisticsObjective

if TYPE_CHECKING:
    from dppo.config import Experiment, TrainSettings

Kind = Literal["prompt", "response", "control", "note"]
_Shape = Shape | Literal["chats"]
_Rows = Callable[[_Shape, Split], list[PreferenceExample]]
Lines = list[list[tuple[Kind, str]]]

_COLOURS: dict[Kind, str] = {"prompt": "\033[36m", "response": "\033[32m", "control": "\033[1;35m", "note": "\033[2m"}
_PLAIN = "\033[0m"
# Around a control token; in ordinary text they are shown as escapes, so that no text can look like one.
_OPEN, _CLOSE = "⟦", "⟧"
_MARKS = str.maketrans({_OPEN: "\\u27e6", _CLOSE: "\\u27e7", "│": "\\u2502"})
# Of a longer prompt or response the middle is left out, unless --full asks for it.
_HEAD, _TAIL = 200, 40
_QUANTILES = ("p5", "p50", "p95", "p99")


@dataclass(frozen=True)
class _Stage:
    """What one stage of the run trains on.

    ``key`` is that of its max_length. ``reads`` are the roles that its loss uses, all if empty; ``adds`` those that
    only the run itself can make, with what they are.
    """

    title: str
    key: str
    shape: _Shape
    train: TrainSettings
    seed: int
    reads: tuple[Role, ...]
    adds: Mapping[Role, str]


@command
def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; returns the exit status: 0, 1 for overlapping splits, or 2 for a user's error."""
    threads.for_tokenizers(threads.cores())
    startup.begin()  # no model is loaded: most of the time is starting
    try:
        return _inspect(argv)
    finally:
        startup.end()


def _inspect(argv: Sequence[str] | None) -> int:
    n, split, full, words = _arguments(argv)
    print_anything()
    colours = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    experiment = config.from_words(words)
    dataset, stages = experiment.dataset, _stages(experiment)
    kept = Tokenised(ReadOnly(Path(experiment.cache.dir)), dataset.identity())
    encoder = ChatEncoder(experiment.model.load_tokenizer(), kept)
    print(f"data {type(dataset).__name__}, tokenizer of {type(experiment.model).__name__}, split {split}")
    rows = functools.cache(functools.partial(_rows, dataset, experiment.reward))
    found = [_encoded(dataset, rows, encoder, stage, split) for stage in stages]
    table, n_shared = _splits(dataset, rows, stages)
    lines = _notes(f"  {harmless(line)}" for line in _readings(dataset, stages))
    for stage, (n_rows, encoded) in zip(stages, found, strict=True):
        lines += [[], *_stage_lines(stage, n_rows, encoded)]
        for place, example in enumerate(encoded.examples[:n], start=1):
            which = f"example {place} of {min(n, len(encoded.examples))}"
            lines += [[], *_notes([f"  {which}: {example.example_id}, prompt {example.prompt_id}"])]
            lines += _example_lines(encoder, stage, example, None if full else _HEAD + _TAIL)
    if isinstance(dataset, OnPolicy):
        lines += _to_be_answered(experiment, encoder, n, full=full)
    lines += [[], *_notes(table)]
    for line in lines:
        print("".join(_coloured(kind, text) if colours else text for kind, text in line))
    return EXIT_FAILED if n_shared else 0


def _arguments(argv: Sequence[str] | None) -> tuple[int, Split, bool, list[str]]:
    parser = Parser(prog="python -m dppo.inspect", description=(__doc__ or "").replace("``", ""))
    parser.add_argument("words", nargs="*", metavar="WORD", help="as of python -m dppo; n=3 and split=train besides")
    parser.add_argument("--n", metavar="N", help="examples that are shown of each stage; also n=N (default: 3)")
    parser.add_argument("--split", metavar="SPLIT", help=f"{', '.join(get_args(Split))}; also split=SPLIT")
    parser.add_argument("--full", action="store_true", help="leave nothing out of long prompts and responses")
    arguments = parser.parse_args(argv)
    given: dict[str, str | None] = {"n": arguments.n, "split": arguments.split}
    words: list[str] = []
    for word in arguments.words:
        key, _, value = word.partition("=")
        if key in given:
            given[key] = value
        else:
            words.append(word)
    n, split = given["n"] or "3", given["split"] or "train"
    if not n.isdecimal():
        raise UserError(f"n={n}: must be a whole number of examples, 0 or more")
    for known in get_args(Split):
        if split == known:
            return int(n), known, arguments.full, words
    raise UserError(f"split={split}: must be one of {', '.join(get_args(Split))}")


# --- what the run trains on -------------------------------------------------------------------------------------------


def _stages(experiment: Experiment) -> list[_Stage]:
    """SFT, where the run has one, and its preference phases."""
    found = []
    if (train := experiment.sft.train) is not None and experiment.init_from is None:
        found.append(_Stage("sft", "sft.train.max_length", "chats", train, experiment.sft.seed, (), {}))
    if isinstance(experiment.dataset, OnPolicy):
        return found  # what its phases train on is made by the run
    for name, phase in experiment.phases.items():
        loss, adds = phase.loss, dict[Role, str]()
        if "generated" in loss.uses_roles:
            adds["generated"] = "y_gen, which the reference model writes during the run"
        if isinstance(loss, StatisticsObjective) and loss.uses_statistics and "mismatched" in loss.statistics_roles:
            adds["mismatched"] = "answers to other prompts, which the run adds"
        key = "train.max_length" if name == "main" else f"phases.{name}.train.max_length"
        title = f"{name}: {loss.trains_on} for loss={loss.name}"
        found.append(_Stage(title, key, loss.trains_on, phase.train, experiment.seed, tuple(loss.uses_roles), adds))
    return found


def _rows(dataset: Dataset, reward: Reward | PairwiseReward, shape: _Shape, split: Split) -> list[PreferenceExample]:
    """The examples of a split as a run reads them: a pair serves every loss, and a reward model keeps its own pairs."""
    if shape == "chats":
        return dataset.chats(split)
    _, read = examples_for(dataset, shape, split)
    if split == "train" and isinstance(reward, BradleyTerry):
        return [row for row in read() if reward.is_left(row.prompt)]
    return read()


def _readings(dataset: Dataset, stages: Sequence[_Stage]) -> list[str]:
    """What became of the rows of the files, one line a split; none for data that is made here."""
    if not isinstance(dataset, CountedDataset):
        return []
    found: list[str] = []
    for stage in stages:
        found += map(str, dataset.readings("chats" if stage.shape == "chats" else "preferences"))
    return list(dict.fromkeys(found))


def _encoded(
    dataset: Dataset, rows_of: _Rows, encoder: ChatEncoder, stage: _Stage, split: Split
) -> tuple[int, EncodedSet]:
    """(rows of the split, those that the stage takes as token ids); other splits have the training split's limit."""
    train = stage.train
    limit: int | str | None = train.max_length
    rows = rows_of(stage.shape, "train")
    if split != "train":
        if isinstance(limit, str):
            limit = encoder.encode(nested_subset(rows, train.n_examples, stage.seed), limit, key=stage.key).max_length
        rows = rows_of(stage.shape, split)
    if not rows:
        raise UserError(f"dataset={type(dataset).__name__}: has no {stage.shape} in split {split} for {stage.title}")
    taken = nested_subset(rows, train.n_examples if split == "train" else None, stage.seed)
    return len(rows), encoder.encode(taken, limit, key=stage.key)


def _splits(dataset: Dataset, rows_of: _Rows, stages: Sequence[_Stage]) -> tuple[list[str], int]:
    """Examples and prompts of every split, and how many prompts are both trained on and evaluated, which is the sum."""
    rows: list[tuple[str, ...]] = [("splits", "", "examples", "prompts")]
    trained: dict[str, set[str]] = {}
    evaluated: dict[Split, set[str]] = {"validation": set(), "test": set()}
    for shape in dict.fromkeys(stage.shape for stage in stages):
        for split in get_args(Split)[: 1 if shape == "chats" else None]:
            found = rows_of(shape, split)
            prompts = {example.prompt.prompt_id for example in found}
            rows.append((shape, split, f"{len(found):,}", f"{len(prompts):,}"))
            if split == "train":
                trained[f"{shape} {split}"] = prompts
            else:
                evaluated[split] |= prompts
    if isinstance(dataset, OnPolicy):
        trained["answered train"] = {prompt.prompt_id for prompt in dataset.prompts("train")}
        rows.append(("answered", "train", "", f"{len(trained['answered train']):,}"))
    for split, prompts in evaluated.items():
        asked = {prompt.prompt_id for prompt in dataset.prompts(split)}
        rows.append(("answered", split, "", f"{len(asked):,}"))
        prompts |= asked
    pairs = [(name, split, ids & evaluated[split]) for name, ids in trained.items() for split in evaluated]
    pairs.append(("validation", "test", evaluated["validation"] & evaluated["test"]))
    lines = aligned(rows)
    for name, split, shared in pairs:
        if shared:
            lines.append(f"warning: {name} and {split} share {len(shared):,} prompts: must be 0")
    total = sum(len(shared) for _, _, shared in pairs)
    if not total:
        lines.append("prompts in more than one split: 0")
    return lines, total


def _to_be_answered(experiment: Experiment, encoder: ChatEncoder, n: int, *, full: bool) -> Lines:
    """The prompts of which a run makes its own preferences, since there are no answers before it."""
    from dppo.pipeline import prompts_to_answer, ranker

    dataset, prompts = experiment.dataset, prompts_to_answer(experiment)
    assert isinstance(dataset, OnPolicy)
    answers = f"{dataset.answers.n_answers} answers each by {type(dataset.answers).__name__}"
    mixed = ", mixed with those of the data set" if dataset.mix_in else ""
    lines = [
        f"{', '.join(experiment.phases)}: made by the run, nothing to show: the model answers {len(prompts):,} prompts "
        f"({answers}{mixed}), and {type(ranker(experiment)).__name__} ranks them",
        "",
    ]
    token_ids = [encoder.prompt_ids(prompt.messages) for prompt in prompts]
    lengths = [len(ids) for ids in token_ids]
    numbers = [len(lengths), min(lengths), *(percentile(lengths, word) for word in _QUANTILES), max(lengths)]
    lines += aligned([("  tokens", "n", "min", *_QUANTILES, "max"), ("  prompt", *(f"{one:,}" for one in numbers))])
    found: Lines = [[], *_notes(lines)]
    for place, (prompt, ids) in enumerate(zip(prompts[:n], token_ids, strict=False), start=1):
        found += [[], *_notes([f"  prompt {place} of {min(n, len(prompts))}: {prompt.prompt_id}"])]
        found += _gutter("prompt", _pieces(encoder, "prompt", (), ids, None if full else _HEAD + _TAIL))
    return found


# --- as text ----------------------------------------------------------------------------------------------------------


def _stage_lines(stage: _Stage, n_rows: int, encoded: EncodedSet) -> Lines:
    """How many examples, how long they are, and what does not fit."""
    n = len(encoded.examples) + encoded.n_dropped
    asked = "null" if stage.train.max_length is None else stage.train.max_length
    limit = "no limit" if encoded.max_length is None else f"{encoded.max_length:,} tokens"
    lines = [
        f"{stage.title}: {n:,} of {n_rows:,} examples, {stage.key}={asked} ({limit})",
        f"  cut at the limit: {encoded.n_truncated:,} of "
        f"{sum(len(example.responses) for example in encoded.examples):,} responses",
        f"  left out: {encoded.n_dropped:,} examples",
        *(f"    {harmless(reason)}: {count:,}" for reason, count in encoded.dropped.items()),
        "",
    ]
    table: list[tuple[str, ...]] = [("  tokens", "n", "min", *_QUANTILES, "max")]
    for name, lengths in encoded.lengths.items():
        numbers = [len(lengths), min(lengths), *(percentile(lengths, word) for word in _QUANTILES), max(lengths)]
        table.append((f"  {name}", *(f"{number:,}" for number in numbers)))
    for role in stage.adds:
        table.append((f"  {role}", *["n/a"] * (len(table[0]) - 1)))
    lines += aligned(table)
    lines.append("  whole: a prompt with its longest response; nothing cut yet")
    lines += [f"  {role}: {what}" for role, what in stage.adds.items()]
    return _notes(lines)


def _notes(texts: Iterable[str]) -> Lines:
    return [[("note", text)] for text in texts]


def _example_lines(encoder: ChatEncoder, stage: _Stage, example: EncodedExample, most: int | None) -> Lines:
    """The prompt once and every response behind it, as their token ids say; ``most`` tokens of each."""
    lines: Lines = [[("note", f"  {len(example.prompt_ids):,} tokens of prompt, not trained on")]]
    lines += _gutter("prompt", _pieces(encoder, "prompt", (), example.prompt_ids, most))
    for response in example.responses:
        lines.append([("note", f"  {_told(encoder, stage, response)}")])
        pieces = _pieces(encoder, "response", example.prompt_ids, response.token_ids, most)
        lines += _gutter(response.role, pieces)
    return lines


def _told(encoder: ChatEncoder, stage: _Stage, response: EncodedResponse) -> str:
    score = "" if response.score is None else f", score {response.score:g}"
    read = not stage.reads or response.role in stage.reads
    ended = response.token_ids[-1] in encoder.end_of_turn_ids
    return (
        f"{len(response.token_ids):,} tokens of {response.role}{score}, "
        f"{'all trained on' if read else 'not read by this loss'}, "
        f"{'end-of-turn token included' if ended else 'cut at the limit, no end-of-turn token'}"
    )


def _pieces(
    encoder: ChatEncoder, kind: Kind, before: Sequence[int], token_ids: Sequence[int], most: int | None
) -> Iterator[tuple[Kind, str]]:
    """The text of token ids that follow ``before``, control tokens apart; of more than ``most`` without the middle."""
    start, end = 0, len(token_ids)
    if most is not None and end > most:
        yield from _runs(encoder, kind, before, token_ids[:_HEAD])
        start = end - _TAIL
        yield "note", f"[{start - _HEAD:,} tokens left out]"
    yield from _runs(encoder, kind, (*before, *token_ids[:start]), token_ids[start:])


def _runs(
    encoder: ChatEncoder, kind: Kind, before: Sequence[int], token_ids: Sequence[int]
) -> Iterator[tuple[Kind, str]]:
    """Control tokens one by one, and what stands between them."""
    ids, start = (*before, *token_ids), len(before)
    for place in range(start, len(ids) + 1):
        if place == len(ids) or ids[place] in encoder.control_ids:
            if start < place:
                yield kind, _text(encoder, ids[max(0, start - 1) : start], ids[start:place])
            if place < len(ids):
                yield "control", str(encoder.tokenizer.convert_ids_to_tokens(ids[place]))
            start = place + 1


def _text(encoder: ChatEncoder, before: Sequence[int], token_ids: Sequence[int]) -> str:
    """Token ids as text; some tokenizers leave out the space of a first word unless something precedes it."""

    def decoded(ids: Sequence[int]) -> str:
        return str(encoder.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    lead, whole = decoded(before), decoded([*before, *token_ids])
    return whole[len(lead) :] if whole.startswith(lead) else decoded(token_ids)


def _gutter(name: str, pieces: Iterator[tuple[Kind, str]]) -> Lines:
    """Pieces as lines behind the name of what they are; a line break stays one, behind a ␊."""
    lines: Lines = [[]]
    for kind, text in pieces:
        if kind == "control":
            lines[-1].append((kind, f"{_OPEN}{harmless(text).translate(_MARKS)}{_CLOSE}"))
            continue
        first, *others = text.split("\n")
        lines[-1].append((kind, harmless(first).translate(_MARKS) + "␊" * bool(others)))
        for number, other in enumerate(others, start=1):
            lines.append([(kind, harmless(other).translate(_MARKS) + "␊" * (number < len(others)))])
    if not any(text for _, text in lines[-1]):
        lines.pop()
    return [[("note", f"{name:>13} │ "), *line] for line in lines]


def _coloured(kind: Kind, text: str) -> str:
    return f"{_COLOURS[kind]}{text}{_PLAIN}" if text else ""


if __name__ == "__main__":
    sys.exit(main())
