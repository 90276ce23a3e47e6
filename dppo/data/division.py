"""One source, three splits: the official ones where it has them, the others cut by a hash, and no prompt in two."""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

from dppo.data import ids
from dppo.data.draws import share
from dppo.data.kept import Kept
from dppo.data.rows import Columns, Reading, listed, logger, read_examples
from dppo.data.sources import Source
from dppo.errors import UserError
from dppo.types import PreferenceExample, Split

Examples = tuple[PreferenceExample, ...]
Keyed = tuple[str, PreferenceExample]  # an example behind its prompt_key
OFFICIAL: tuple[Split, ...] = ("test", "validation")
TRAIN: tuple[Split, ...] = ("train",)


@dataclass(frozen=True)
class Cut:
    """How splits are cut that a source does not have: shares of the prompts, by a hash of ``seed`` and the prompt."""

    validation_share: float
    test_share: float
    seed: int


@dataclass(frozen=True)
class Division:
    """The examples of each split, and what became of the rows of each split that the source has.

    ``evaluation_keys`` are the ``prompt_key``s of test and validation prompts. ``problems`` say why a split has no
    example.
    """

    parts: Mapping[Split, Examples]
    readings: tuple[Reading, ...]
    evaluation_keys: frozenset[str]
    problems: Mapping[Split, str]

    def part(self, split: Split) -> list[PreferenceExample]:
        """The examples of one split. Raises UserError if there are none."""
        if split in self.problems:
            raise UserError(self.problems[split])
        return list(self.parts[split])


_divided: Kept[Division] = Kept(4)


def divide(
    source: Source, columns: Columns, single_turn: bool, cut: Cut, leave_out: frozenset[str] = frozenset()
) -> Division:
    """The splits of a source. A prompt (by ``prompt_key``) is in one of them only, in test rather than in validation,
    in validation rather than in train.

    ``leave_out`` are the ``prompt_key``s of evaluation prompts of another source: none of them is in train or
    validation. Logs a line for each split that the source has. Divisions are kept by the content of the files.
    Raises UserError for files that are missing, not readable, or without a usable row.
    """
    key = (source, tuple(source.stamps()), columns, single_turn, cut, leave_out)
    return _divided.get(key, lambda: _divide(source, columns, single_turn, cut, leave_out))


def _divide(source: Source, columns: Columns, single_turn: bool, cut: Cut, leave_out: frozenset[str]) -> Division:
    readings: list[Reading] = []
    problems: dict[Split, str] = {}
    held = dict.fromkeys(leave_out, "prompt is an evaluation prompt of the preferences")
    official: list[Split] = [split for split in OFFICIAL if source.has(split)]
    found: dict[Split, list[Keyed]] = {"train": [], "validation": [], "test": []}
    for split in (*official, *TRAIN):
        examples, reading = read_examples(source.files(split), columns, single_turn, source.where(split))
        keyed = [(ids.prompt_key(example.prompt.messages), example) for example in examples]
        left_out = Counter(reading.left_out)
        for key, example in keyed:
            if split != "test" and key in held:
                left_out[held[key]] += 1
            else:
                found[split].append((key, example))
        reading = dataclasses.replace(reading, n_kept=len(found[split]), left_out=left_out)
        if not found[split]:
            problem = f"{reading.where}: none of its {reading.n_rows:,} rows can be used ({listed(left_out)})"
            problems |= dict.fromkeys([split] if split in official else set(found) - set(official), problem)
        else:
            logger.info("%s", reading)
        readings.append(reading)
        held |= dict.fromkeys((key for key, _ in found[split]), f"prompt is in the {split} split")
    below_test = 0.0 if "test" in official else cut.test_share
    below_validation = below_test + (0.0 if "validation" in official else cut.validation_share)
    rest, found["train"] = found["train"], []
    for key, example in rest:
        place = share("split", cut.seed, key)
        found["test" if place < below_test else "validation" if place < below_validation else "train"].append(
            (key, example)
        )
    for split in found:
        if not found[split] and split not in problems:
            name, value = ("test", cut.test_share) if split == "test" else ("validation", cut.validation_share)
            problems[split] = f"dataset.{name}_share={value}: leaves no {split} row of {len(rest):,}; change it"
    parts = {split: tuple(example for _, example in found[split]) for split in found}
    return Division(parts, tuple(readings), frozenset(key for split in OFFICIAL for key, _ in found[split]), problems)
