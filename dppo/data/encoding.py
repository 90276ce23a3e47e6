"""From text to token ids: one chat template, one boundary between prompt and response, one length limit.

The whole chat is rendered by the model's chat template and cut, as text, where the prompt ends. So a response is what
the template writes behind the prompt: the answer and the end-of-turn token, without what follows that token.
Tokens that cross the boundary do not occur; otherwise both sides have the ids that the whole text would have.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import hashlib
import importlib.metadata
import json
import math
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dppo.artifacts import IdRow
from dppo.data.ids import ID_DIGITS, content_hash
from dppo.data.kept import Kept
from dppo.data.rows import listed
from dppo.data.tokenised import Tokenised
from dppo.errors import UserError
from dppo.types import EncodedExample, EncodedResponse, Generation, Json, Message, PreferenceExample, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

VERSION = 1  # of how texts become ids: part of what names tokenised data in the cache
_MOST_IDS = 10_000_000  # of a vocabulary; the largest that are published have under a million
_TEMPLATE_SECONDS = 10.0  # for a conversation of two words, which takes microseconds
_TEXTS_PER_CALL = 1024  # the tokenizer keeps about 100 bytes a token while it works on a call
# For templates that write today's date into the prompt, put before them: the same day in every run.
_FIXED_DAY = (
    "{%- macro strftime_now(format) -%}{{- format | replace('%d', '26') | replace('%-d', '26') | replace('%m', '07') "
    "| replace('%b', 'Jul') | replace('%B', 'July') | replace('%Y', '2024') | replace('%y', '24') "
    "| replace('%a', 'Fri') | replace('%A', 'Friday') | replace('%H', '00') | replace('%M', '00') "
    "| replace('%S', '00') -}}{%- endmacro -%}"
)


class TemplateRefusal(Exception):
    """The chat template raised an error for this conversation; the message is the template's."""


def apply_template(
    tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], template: str | None, *, for_generation: bool
) -> str:
    """A conversation as the text that a chat template makes of it; None: the tokenizer's own template.

    Raises TemplateRefusal for whatever goes wrong in there: a template is a program of whoever made the model. It runs
    in the sandbox of transformers, which hides Python's own attributes.
    """
    import jinja2

    try:
        text = tokenizer.apply_chat_template(
            [{"role": turn.role, "content": turn.content} for turn in turns],
            tokenize=False,
            add_generation_prompt=for_generation,
            chat_template=template,
        )
    except jinja2.TemplateError as error:
        raise TemplateRefusal(str(error)) from None
    except (ArithmeticError, AttributeError, LookupError, MemoryError, RecursionError, TypeError, ValueError) as error:
        raise TemplateRefusal(f"{type(error).__name__}: {error}") from None
    return str(text)


@contextlib.contextmanager
def _at_most(seconds: float) -> Iterator[None]:
    """Raise TemplateRefusal when the block takes longer; only the main thread can be told so."""
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def end(*given: object) -> None:
        raise TemplateRefusal(f"it does not end within {seconds:g} s")

    before = signal.signal(signal.SIGALRM, end)
    left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
    began = time.monotonic()
    try:
        yield
    finally:
        # Whoever had set an alarm before gets it, late if need be.
        signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - began), 0.001) if left else 0, interval)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class EncodedSet:
    """Examples that fit into ``max_length`` tokens, prompt and any one response together (None: no limit).

    ``dropped`` counts the examples that are missing by their reason, ``n_truncated`` responses were cut; ``notes`` say
    so in lines for the user. ``lengths`` are tokens before anything was cut or dropped for its length: of every prompt
    and of the responses by role, and as ``whole`` of each example's prompt with its longest response.
    """

    examples: tuple[EncodedExample, ...]
    max_length: int | None
    dropped: Mapping[str, int]
    n_truncated: int
    notes: tuple[str, ...]
    lengths: Mapping[str, tuple[int, ...]]

    @property
    def n_dropped(self) -> int:
        return sum(self.dropped.values())


@dataclass(frozen=True)
class _Rendered:
    """A chat as text: the prompt, and what each answer adds to it. ``mark`` hides control tokens in the turns."""

    prompt: str
    answers: tuple[str, ...]
    mark: str | None


_encoded: Kept[EncodedSet] = Kept(8)


class ChatEncoder:
    """Prompts and responses as token ids of one model.

    Control tokens are written by the template only: in the text of a turn their spellings become ordinary tokens.
    ``kept`` is where ``encode`` finds and keeps what it tokenises; None: in this process only.
    Raises UserError if the tokenizer has no chat template, or one that cannot be used.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, kept: Tokenised | None = None) -> None:
        self.tokenizer = tokenizer
        self._kept = kept
        if not tokenizer.chat_template:
            of = f" ({tokenizer.name_or_path})" if tokenizer.name_or_path else ""
            raise UserError(
                f"model: its tokenizer{of} has no chat template; choose a model that has one, or set "
                "model.chat_template to a file with a Jinja template"
            )
        try:
            self._learn()
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            raise UserError(f"model: its tokenizer cannot be used ({type(error).__name__}: {error})") from error

    def _learn(self) -> None:
        """What the tokenizer and its template do. Raises UserError, and anything for files that were altered."""
        tokenizer = self.tokenizer
        own = tokenizer.get_chat_template()
        self.template_text: str = _FIXED_DAY + own if "strftime_now" in own else own
        added = tokenizer.added_tokens_decoder
        special = {*tokenizer.all_special_tokens, *(token.content for token in added.values() if token.special)}
        written = {token.content for token in added.values() if token.content in self.template_text}
        control = {token for token in special | written if len(token.strip()) > 1}
        # Longest first, and in one order in all processes; without control tokens nothing matches.
        spelled = sorted(control, key=lambda token: (-len(token), token))
        self._control = re.compile("|".join(map(re.escape, spelled)) or "(?!)")
        if (largest := max(len(tokenizer), *added, 0)) > _MOST_IDS:
            raise UserError(f"model: its tokenizer has a token id of {largest:,}; no vocabulary is that large")
        # One integer object for each id, shared by all examples: 60,000 pairs would take gigabytes otherwise.
        self._ids = tuple(range(largest + 1))
        # Where a model expects a token before any text, and the template does not write it.
        plain = self._tokenize(["a"], add_special_tokens=True)[0]
        self._first = plain[:1] if plain[0] == tokenizer.bos_token_id else ()
        self._end, self._suffix, self._turn_end = self._learn_end_of_turn()
        example = self._template((Message("user", "question"),), for_generation=True)
        self._prompt_control = tuple(sorted(set(self._control.findall(example))))

    @functools.cached_property
    def end_of_turn_ids(self) -> frozenset[int]:
        """The ids that end a generation: the end-of-turn token, and the tokenizer's eos where it is another one."""
        ends = {self._tokenize([self._end])[0][0], self.tokenizer.eos_token_id}
        return frozenset(end for end in ends if isinstance(end, int))

    @functools.cached_property
    def control_ids(self) -> frozenset[int]:
        """The ids of control tokens, which only the template writes."""
        added = self.tokenizer.added_tokens_decoder.items()
        spelled = {token_id for token_id, token in added if self._control.fullmatch(token.content)}
        return frozenset(spelled.union(self.tokenizer.all_special_ids))

    def decode(self, token_ids: Sequence[int]) -> str:
        """The text of a response, without control tokens."""
        text = self.tokenizer.decode(list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str)
        return text

    def scoring_tokenizer(self) -> PreTrainedTokenizerBase:
        """A copy of the tokenizer whose template gives whole conversations the ids that prompt and response have here.

        That is: with the token that a model expects first, and without what a template writes behind the end of the
        last answer's turn. For readers of whole conversations, as reward models are. Two things a template cannot do:
        hide control tokens in the text of a turn, and keep tokens from spanning the beginning of an answer.
        """
        written = self._suffix.startswith(self._turn_end)  # otherwise the template ends a turn without a token
        behind = len(self._suffix) - len(self._turn_end if written else self._suffix.rstrip())
        added = "" if written else "{{ eos_token }}"
        sample = self._tokenize([self._template((Message("user", "question"),), for_generation=True)])[0]
        first = "{{ bos_token }}" if self._first and sample[:1] != self._first else ""
        own = self.template_text.removesuffix("\n")
        tokenizer = copy.deepcopy(self.tokenizer)
        tokenizer.chat_template = (
            f"{first}{{% set whole_chat %}}{own}{{% endset %}}"
            "{% if messages[-1]['role'] == 'assistant' %}"
            f"{{{{ whole_chat[:whole_chat | length - {behind}] }}}}{added}"
            "{% else %}{{ whole_chat }}{% endif %}"
        )
        return tokenizer

    def prompt_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """The ids of a prompt up to where the model's answer begins. Raises UserError if the template refuses it."""
        try:
            rendered = self._render(messages, ())
        except TemplateRefusal as error:
            raise UserError(f"the model's chat template refuses a prompt: {error}") from None
        return self._prompts([rendered])[0]

    def response_ids(self, messages: Sequence[Message], answer_text: str) -> tuple[int, ...]:
        """The ids of an answer to this prompt, end-of-turn token included. Raises UserError if the template refuses."""
        try:
            rendered = self._render(messages, (answer_text,))
        except TemplateRefusal as error:
            raise UserError(f"the model's chat template refuses a conversation: {error}") from None
        return self._answers([rendered])[0]

    def encode(
        self, examples: Sequence[PreferenceExample], max_length: int | str | None, *, key: str = "max_length"
    ) -> EncodedSet:
        """Tokenise examples and cut them to ``max_length`` tokens: a number, a percentile such as "p95", or None.

        The limit holds for the prompt and any one of its responses together, and so does the model's context, as far
        as the tokenizer knows it; a percentile is that of the longest such
        sequence of each example given here, so that p95 leaves at least 95 % of these examples whole. Responses are
        cut at their end, prompts never. An example is dropped if the limit leaves no token for a response, if cutting
        makes chosen and rejected equal, or if the template refuses it.

        Raises UserError if no example is left, or none was given.
        """
        made = (self._identity, max_length, key, tuple(examples))
        return _encoded.get(made, lambda: self._encode(examples, max_length, key))

    @functools.cached_property
    def _identity(self) -> str:
        """What decides the ids of a text, and where it is cut."""
        parts = [self._tokenizer_text(), self.template_text, str(self.tokenizer.model_max_length)]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()

    def _tokenizer_text(self) -> str:
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        # One without a backend in Rust can't be told from its copy.
        return str(backend.to_str()) if backend is not None else str(id(self.tokenizer))

    @functools.cached_property
    def _decides_ids(self) -> dict[str, Json]:
        """What decides the ids of a text, in every process: all of the tokenizer and of what was learnt from it."""
        tokenizer = self.tokenizer
        learnt = [self._control.pattern, self._first, self._end, self._suffix, self._turn_end, self._prompt_control]
        of_python = [tokenizer.special_tokens_map, getattr(tokenizer, "split_special_tokens", None)]
        parts = [
            self._tokenizer_text(),
            self.template_text,
            json.dumps([learnt, of_python], sort_keys=True, default=str),
        ]
        packages = ("tokenizers", "transformers", "jinja2")
        return {
            "version": VERSION,
            "tokenizer": hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:ID_DIGITS],
            **{package: importlib.metadata.version(package) for package in packages},
        }

    def _rows(self, examples: Sequence[PreferenceExample]) -> Sequence[IdRow]:
        """The ids of every example, whole."""
        if self._kept is None or getattr(self.tokenizer, "backend_tokenizer", None) is None:
            return self._tokenised(examples)
        return self._kept.rows(self._decides_ids, examples, self._tokenised)

    def _tokenised(self, examples: Sequence[PreferenceExample]) -> list[IdRow]:
        chats: list[_Rendered | TemplateRefusal] = []
        for example in examples:
            try:
                chats.append(self._render(example.prompt.messages, [one.text for one in example.responses]))
            except TemplateRefusal as refusal:
                chats.append(refusal)
        rendered = [chat for chat in chats if isinstance(chat, _Rendered)]
        prompts, answers = iter(self._prompts(rendered)), iter(self._answers(rendered))
        found = []
        for chat in chats:
            if isinstance(chat, TemplateRefusal):
                found.append(IdRow((), (), str(chat)))
            else:
                sequences = (next(prompts), *(next(answers) for _ in chat.answers))
                found.append(IdRow(sequences, tuple(map(response_id, sequences))))
        return found

    def _encode(self, examples: Sequence[PreferenceExample], max_length: int | str | None, key: str) -> EncodedSet:
        if not examples:
            raise UserError("there are no examples to tokenise")
        left_out: Counter[str] = Counter()
        whole = []
        for example, row in zip(examples, self._rows(examples), strict=True):
            if row.refusal is not None:
                left_out[f"refused by the chat template ({row.refusal})"] += 1
                continue
            prompt, *answers = row.sequences
            responses = tuple(
                EncodedResponse(identifier, response.role, token_ids, response.score)
                for response, token_ids, identifier in zip(example.responses, answers, row.hashes[1:], strict=True)
            )
            whole.append(EncodedExample(example.example_id, example.prompt.prompt_id, prompt, responses))
        limit, origin = self._limit(max_length, whole)
        fitting, n_truncated = [], 0
        for one in whole:
            room = None if limit is None else limit - len(one.prompt_ids)
            if room is not None and room < 1:
                left_out[f"prompt leaves no room for an answer in {limit:,} tokens"] += 1
                continue
            cut = dataclasses.replace(one, responses=tuple(cut_response(response, room) for response in one.responses))
            chosen, rejected = cut.response("chosen"), cut.response("rejected")
            if chosen is not None and rejected is not None and chosen.token_ids == rejected.token_ids:
                left_out["chosen and rejected have equal tokens"] += 1
                continue
            n_truncated += sum(new is not old for new, old in zip(cut.responses, one.responses, strict=True))
            fitting.append(cut)
        if not fitting:
            shortest = (
                f"; the shortest prompt has {min(len(one.prompt_ids) for one in whole):,} tokens" if whole else ""
            )
            raise UserError(
                f"{key}={'null' if max_length is None else max_length}: none of {len(examples):,} examples is "
                f"left ({listed(left_out)}){shortest}; raise max_length, or choose other data or another model"
            )
        longest = max(_longest(one) for one in whole)
        notes = [f"longest of {len(whole):,} examples: {longest:,} tokens, {origin}"]
        if n_truncated:
            notes.append(
                f"{n_truncated:,} of {sum(len(one.responses) for one in fitting):,} responses cut at the limit"
            )
        if left_out:
            notes.append(f"{sum(left_out.values()):,} of {len(examples):,} examples left out ({listed(left_out)})")
        return EncodedSet(tuple(fitting), limit, dict(left_out), n_truncated, tuple(notes), _lengths(whole))

    def add_generated(
        self, encoded: Sequence[EncodedExample], generations: Mapping[str, Generation], max_length: int | None
    ) -> tuple[EncodedExample, ...]:
        """The examples with the model's own answer to their prompt as response ``generated``, cut to ``max_length``.

        ``generations`` are keyed by prompt_id. Raises KeyError for a prompt without one, ValueError for an empty one.
        """
        extended = []
        for example in encoded:
            generation = generations[example.prompt_id]
            if not generation.token_ids:
                raise ValueError(f"the generation for prompt {example.prompt_id} has no tokens")
            room = None if max_length is None else max_length - len(example.prompt_ids)
            whole = EncodedResponse(response_id(generation.token_ids), "generated", generation.token_ids)
            extended.append(dataclasses.replace(example, responses=(*example.responses, cut_response(whole, room))))
        return tuple(extended)

    def answers(self, prompts: Sequence[Prompt], generations: Mapping[str, Generation]) -> tuple[EncodedExample, ...]:
        """Each prompt with the model's own answer to it as its one response, in role ``generated``.

        ``generations`` are keyed by prompt_id. Raises KeyError for a prompt without one, ValueError for an empty one.
        """
        bare = [EncodedExample(one.prompt_id, one.prompt_id, self.prompt_ids(one.messages), ()) for one in prompts]
        answered = self.add_generated(bare, generations, None)
        return tuple(
            dataclasses.replace(one, example_id=content_hash([one.prompt_id, one.responses[0].response_id]))
            for one in answered
        )

    def _limit(self, max_length: int | str | None, examples: Sequence[EncodedExample]) -> tuple[int | None, str]:
        """The limit in tokens, never more than the model's context, and words that say where it comes from."""
        context = self.tokenizer.model_max_length  # 1e30 where it is not known
        limit, origin = max_length, f"limit {max_length}"
        if isinstance(limit, str):
            limit = percentile([_longest(example) for example in examples], limit) if examples else None
            origin = f"limit {limit} ({max_length} of these examples)"
        if limit is None or limit > context:
            return (context, f"limit {context} (the model's context)") if context < 10**9 else (limit, "no limit")
        return limit, origin

    def _learn_end_of_turn(self) -> tuple[str, str, str]:
        """The end-of-turn token; what the template writes behind an answer; and how much of that a response keeps."""
        answer = "answer"
        try:
            with _at_most(_TEMPLATE_SECONDS):
                _, (written,) = self._texts((Message("user", "question"),), (answer,))
        except TemplateRefusal as error:
            raise UserError(f"model: its chat template cannot be used: {error}") from None
        _, found, suffix = written.rpartition(answer)
        if not found:
            raise UserError("model: its chat template does not write the text of an answer")
        end = self._control.search(suffix)
        if end is not None:
            return end[0], suffix, suffix[: end.end()]
        eos = self.tokenizer.eos_token
        if not isinstance(eos, str):
            raise UserError("model: its chat template writes no token behind an answer and its tokenizer has no eos")
        return eos, suffix, suffix.rstrip() + eos

    def _render(self, messages: Sequence[Message], answers: Sequence[str]) -> _Rendered:
        texts = [*(message.content for message in messages), *answers]
        mark = None
        if any(self._control.search(text) for text in texts):
            # A mark behind the first character of every spelling keeps it from being read as a control token; the
            # text is cut at the marks before it is tokenised.
            mark = next(sign for sign in map(chr, range(0xE000, 0xF900)) if not any(sign in text for text in texts))

        def hidden(text: str) -> str:
            return text if mark is None else self._control.sub(lambda found: f"{found[0][0]}{mark}{found[0][1:]}", text)

        turns = tuple(Message(message.role, hidden(message.content)) for message in messages)
        prompt, written = self._texts(turns, tuple(hidden(answer) for answer in answers))
        kept = []
        for text in written:
            if not text.endswith(self._suffix):
                raise TemplateRefusal("it ends this answer in another way than others")
            kept.append(text[: len(text) - len(self._suffix)] + self._turn_end)
        return _Rendered(prompt, tuple(kept), mark)

    def _texts(self, turns: tuple[Message, ...], answers: Sequence[str]) -> tuple[str, list[str]]:
        """The prompt as text, and what the template writes behind it for each answer."""
        prompt = self._template(turns, for_generation=True)
        written = []
        for answer in answers:
            chat = self._template((*turns, Message("assistant", answer)), for_generation=False)
            if not chat.startswith(prompt):
                raise TemplateRefusal("it begins an answer in another way in a conversation than for generation")
            written.append(chat[len(prompt) :])
        return prompt, written

    def _template(self, turns: Sequence[Message], *, for_generation: bool) -> str:
        return apply_template(self.tokenizer, turns, self.template_text, for_generation=for_generation)

    def _prompts(self, chats: Sequence[_Rendered]) -> list[tuple[int, ...]]:
        """The ids of each prompt, with the token that this model expects first."""
        unique = {(chat.prompt, chat.mark): () for chat in chats}
        found = dict(zip(unique, self._tokenize_marked(list(unique)), strict=True))
        ids = [found[chat.prompt, chat.mark] for chat in chats]
        return [one if one[:1] == self._first else (*self._first, *one) for one in ids]

    def _answers(self, chats: Sequence[_Rendered]) -> list[tuple[int, ...]]:
        """The ids of every answer of every chat, tokenised behind the end of their prompt."""
        leads, texts = [], []
        for chat in chats:
            # Control tokens stand alone whatever is around them, so what precedes the last one has no influence.
            start = max((chat.prompt.rfind(token) for token in self._prompt_control), default=-1)
            for answer in chat.answers:
                leads.append((chat.prompt[max(start, 0) :], chat.mark))
                texts.append(answer)
        unique = dict.fromkeys(leads)
        lead_ids = dict(zip(unique, self._tokenize_marked(list(unique)), strict=True))
        joint = self._tokenize_marked([(lead + text, mark) for (lead, mark), text in zip(leads, texts, strict=True)])
        found = []
        for lead, text, ids in zip(leads, texts, joint, strict=True):
            n_lead = len(lead_ids[lead])
            if ids[:n_lead] == lead_ids[lead]:
                found.append(ids[n_lead:])
            else:  # a token spans the boundary, which could not follow the prompt's own ids
                found.append(self._tokenize_behind([text] if lead[1] is None else text.split(lead[1])))
        return found

    def _tokenize_marked(self, texts: Sequence[tuple[str, str | None]]) -> list[tuple[int, ...]]:
        """The ids of texts, each with the mark that hides control tokens in it, or None."""
        plain = iter(self._tokenize([text for text, mark in texts if mark is None]))
        found = []
        for text, mark in texts:
            if mark is None:
                found.append(next(plain))
            else:
                first, *others = text.split(mark)
                found.append(self._tokenize([first])[0] + self._tokenize_behind(others))
        return found

    def _tokenize_behind(self, pieces: Sequence[str]) -> tuple[int, ...]:
        """The ids of pieces of a text that another text precedes, without tokens that span two of them.

        Some tokenizers put a space before the first word of a text and behind control tokens, so each piece is
        tokenised behind a line break, or a control token where its beginning would merge with the line break.
        """
        found: tuple[int, ...] = ()
        for piece in pieces:
            lead, joint = self._tokenize(["\n", f"\n{piece}"])
            if joint[: len(lead)] != lead:
                lead, joint = self._tokenize([self._end, self._end + piece])
            found += joint[len(lead) :]
        return found

    def _tokenize(self, texts: Sequence[str], *, add_special_tokens: bool = False) -> list[tuple[int, ...]]:
        shared = self._ids.__getitem__
        found: list[tuple[int, ...]] = []
        for start in range(0, len(texts), _TEXTS_PER_CALL):
            encoded = self.tokenizer(
                list(texts[start : start + _TEXTS_PER_CALL]),
                add_special_tokens=add_special_tokens,
                return_attention_mask=False,
                return_token_type_ids=False,
                verbose=False,
            )
            found += [tuple(map(shared, ids)) for ids in encoded["input_ids"]]
        return found


def response_id(token_ids: Sequence[int]) -> str:
    """A hash of token ids: 32 hexadecimal digits."""
    import numpy as np

    return hashlib.sha256(np.asarray(token_ids, dtype="<i8").tobytes()).hexdigest()[:ID_DIGITS]


def percentile(lengths: Sequence[int], word: str) -> int:
    """The smallest of these lengths that is at least as long as a share of them: "p95" for 95 %.

    Raises UserError for another word than p1 to p100.
    """
    found = re.fullmatch(r"p(\d{1,3})", word)
    if found is None or not 1 <= int(found[1]) <= 100:
        raise UserError(f"max_length={word}: must be a number of tokens, a percentile such as p95, or null")
    return sorted(lengths)[math.ceil(int(found[1]) * len(lengths) / 100) - 1]


def _lengths(examples: Sequence[EncodedExample]) -> dict[str, tuple[int, ...]]:
    roles = dict.fromkeys(response.role for example in examples for response in example.responses)
    found = {"prompt": tuple(len(example.prompt_ids) for example in examples)}
    for role in roles:
        found[role] = tuple(
            len(response.token_ids) for example in examples for response in example.responses if response.role == role
        )
    return {**found, "whole": tuple(map(_longest, examples))}


def _longest(example: EncodedExample) -> int:
    return len(example.prompt_ids) + max(len(response.token_ids) for response in example.responses)


def cut_response(response: EncodedResponse, room: int | None) -> EncodedResponse:
    """The response without what is beyond ``room`` tokens; None leaves it whole."""
    if room is None or len(response.token_ids) <= room:
        return response
    token_ids = response.token_ids[:room]
    return dataclasses.replace(response, response_id=response_id(token_ids), token_ids=token_ids)
