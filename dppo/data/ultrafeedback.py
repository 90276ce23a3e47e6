"""Real preferences in the layout of UltraFeedback-binarised, and chats in that of SmolTalk: Hub or local folder.

Layout: ``data/<split>-*.parquet`` (below ``data/<configuration>/`` where the data set has configurations). Preference
rows hold ``chosen`` and ``rejected``, lists of {role, content} messages, and may hold ``prompt``, ``score_chosen``
and ``score_rejected``; chat rows hold ``messages``.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dppo.data.rows import ChatColumns, PairColumns, check_share, cut, read_examples, unique_prompts
from dppo.digests import content_digest
from dppo.errors import UserError
from dppo.hub import local_folder, pinned_commit, snapshot
from dppo.types import Json, PreferenceExample, Prompt, Split

VERSION = 1

PAIR = PairColumns(None, "chosen", "rejected", "score_chosen", "score_rejected")
CHAT = ChatColumns("messages")


@dataclass(frozen=True)
class Source:
    """One data set: a repository of the Hub or a local folder in the same layout.

    ``key`` names its path in the configuration. ``config`` is the configuration (a folder below ``data/``), None
    where there is none. ``revision`` is a branch, tag or commit; local folders have none. ``train_split`` and
    ``test_split`` are the names in the files.
    """

    key: str
    path: str
    revision: str
    config: str | None
    train_split: str
    test_split: str

    def files(self, split: Split) -> list[Path]:
        """The parquet files of a split, sorted by name; those of ``validation`` are the training files.

        Downloads what is missing. Raises UserError.
        """
        name = self.test_split if split == "test" else self.train_split
        below = "data" if self.config is None else f"data/{self.config}"
        folder = local_folder(self.path, self.key)
        if folder is None:
            folder = snapshot(self.path, "dataset", self._commit(), [f"{below}/{name}-*.parquet"], self.key)
        found = sorted((folder / below).glob(f"{name}-*.parquet"))
        if not found:
            there = sorted(str(file.relative_to(folder)) for file in folder.glob("**/*.parquet"))
            raise UserError(
                f"{self.key}={self.path}: has no {below}/{name}-*.parquet; "
                f"found {', '.join(there[:8]) or 'no parquet file'}{', ...' if len(there) > 8 else ''}"
            )
        return found

    def identity(self) -> dict[str, Json]:
        """The commit of a repository, or a hash of the content of a local folder's files."""
        layout: dict[str, Json] = {"config": self.config, "train": self.train_split, "test": self.test_split}
        if local_folder(self.path, self.key) is None:
            return {"repository": self.path, "commit": self._commit(), **layout}
        return {"content": [content_digest(self.files(split)) for split in ("train", "test")], **layout}

    def _commit(self) -> str:
        return pinned_commit(self.path, "dataset", self.revision, self.key)


@dataclass(frozen=True)
class UltraFeedback:
    """Preferences from ``path``, demonstrations for SFT from ``sft_path``.

    ``validation`` are the training rows of a share of the training prompts, chosen by a hash of ``seed`` and the
    prompt; ``test`` is the official test split, and no training row has a prompt of it. ``single_turn`` leaves out
    conversations of more than one exchange (a system turn may stand before it). Rows that cannot be used are left
    out, counted, and logged.
    """

    path: str
    revision: str
    train_split: str
    test_split: str
    sft_path: str
    sft_revision: str
    sft_config: str | None
    sft_train_split: str
    sft_test_split: str
    single_turn: bool
    validation_share: float
    seed: int

    def __post_init__(self) -> None:
        check_share("validation_share", self.validation_share)

    @property
    def preferences(self) -> Source:
        return Source("dataset.path", self.path, self.revision, None, self.train_split, self.test_split)

    @property
    def demonstrations(self) -> Source:
        return Source(
            "dataset.sft_path",
            self.sft_path,
            self.sft_revision,
            self.sft_config,
            self.sft_train_split,
            self.sft_test_split,
        )

    def identity(self) -> dict[str, Json]:
        """Everything that determines the rows. Raises UserError if a source cannot be found."""
        return {
            "dataset": "ultrafeedback",
            "version": VERSION,
            "preferences": self.preferences.identity(),
            "demonstrations": self.demonstrations.identity(),
            "single_turn": self.single_turn,
            "validation_share": self.validation_share,
            "seed": self.seed,
        }

    def chats(self, split: Split) -> list[PreferenceExample]:
        """Demonstrations: the last answer of each conversation. Raises UserError for missing or unusable files."""
        return self._examples(self.demonstrations, CHAT, split)

    def pairs(self, split: Split) -> list[PreferenceExample]:
        """Preference pairs with their scores. Raises UserError for missing or unusable files."""
        return self._examples(self.preferences, PAIR, split)

    def prompts(self, split: Split) -> list[Prompt]:
        """The prompts of ``pairs(split)``, each once."""
        return unique_prompts(self.pairs(split))

    def _examples(self, source: Source, columns: ChatColumns | PairColumns, split: Split) -> list[PreferenceExample]:
        def read(of: Split, leave_out: frozenset[str] = frozenset()) -> tuple[PreferenceExample, ...]:
            where = f"{source.path} {source.test_split if of == 'test' else source.train_split}"
            return read_examples(source.files(of), columns, self.single_turn, where, leave_out)

        test = read("test")
        if split == "test":
            return list(test)
        rest = read("train", leave_out=frozenset(example.prompt.prompt_id for example in test))
        return cut(rest, split, self.validation_share, 0.0, self.seed)
