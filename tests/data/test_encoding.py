"""Prompts and responses as token ids: the boundary, the end of a turn, control tokens, and the length limit."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from dppo.data import ids
from dppo.data.encoding import ChatEncoder, percentile
from dppo.data.tiny_tokenizer import build_tokenizer
from dppo.errors import UserError
from dppo.types import Generation, Message, PreferenceExample, Prompt, Response, Role

from .chat_models import (
    DATED,
    FORCED_THOUGHT,
    NO_END,
    chatml,
    gemma,
    llama3,
    mistral,
    pieces_of,
    text_of,
    zephyr,
)

USER = (Message("user", "Name three colours!"),)


def prompt_of(*turns: Message) -> Prompt:
    return Prompt(ids.prompt_id(turns), turns)


def example(question: str, *answers: tuple[Role, str], system: str | None = None) -> PreferenceExample:
    turns = (Message("user", question),) if system is None else (Message("system", system), Message("user", question))
    responses = tuple(Response(role, text) for role, text in answers)
    prompt = prompt_of(*turns)
    return PreferenceExample(ids.example_id(prompt, responses), prompt, responses)


def pair(question: str, chosen: str, rejected: str) -> PreferenceExample:
    return example(question, ("chosen", chosen), ("rejected", rejected))


def rendered(tokenizer: PreTrainedTokenizerFast, *turns: Message, for_generation: bool = False) -> str:
    chat = [{"role": turn.role, "content": turn.content} for turn in turns]
    return str(tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=for_generation))


FAMILIES = {"chatml": chatml, "llama3": llama3, "gemma": gemma, "tiny": build_tokenizer}


@pytest.mark.parametrize("family", FAMILIES)
def test_prompt_and_response_are_the_whole_chat_up_to_the_end_of_turn(family: str) -> None:
    tokenizer = FAMILIES[family]()
    encoder = ChatEncoder(tokenizer)
    answer = "red, green and blue"
    prompt, response = encoder.prompt_ids(USER), encoder.response_ids(USER, answer)
    whole = rendered(tokenizer, *USER, Message("assistant", answer))
    assert prompt + response == tuple(tokenizer(whole.rstrip("\n"), add_special_tokens=False)["input_ids"])
    assert text_of(tokenizer, prompt) == rendered(tokenizer, *USER, for_generation=True)
    assert encoder.decode(response) == answer
    assert response[-1] in encoder.end_of_turn_ids
    assert not encoder.end_of_turn_ids.intersection(response[:-1])


@pytest.mark.parametrize(
    ("family", "ends"),
    [
        ("chatml", {"<|im_end|>"}),
        ("llama3", {"<|eot_id|>", "<|end_of_text|>"}),
        ("gemma", {"<end_of_turn>", "<eos>"}),
        ("tiny", {"<|end|>"}),
    ],
)
def test_the_end_of_a_turn_and_eos_end_a_generation(family: str, ends: set[str]) -> None:
    tokenizer = FAMILIES[family]()
    assert set(pieces_of(tokenizer, sorted(ChatEncoder(tokenizer).end_of_turn_ids))) == ends


@pytest.mark.parametrize("make", [llama3, gemma, zephyr])
def test_there_is_one_bos_whoever_writes_it(make: type[PreTrainedTokenizerFast]) -> None:
    tokenizer = make()
    prompt = ChatEncoder(tokenizer).prompt_ids(USER)
    assert prompt[0] == tokenizer.bos_token_id
    assert prompt.count(prompt[0]) == 1


def test_a_tokenizer_that_writes_no_bos_gets_none() -> None:
    tokenizer = build_tokenizer()
    assert tokenizer.bos_token_id not in ChatEncoder(tokenizer).prompt_ids(USER)


def test_the_first_word_of_an_answer_is_tokenised_in_its_place() -> None:
    # Alone, "hello" would get the space of a word's start, which no model writes after a line break.
    tokenizer = zephyr()
    encoder = ChatEncoder(tokenizer)
    assert pieces_of(tokenizer, encoder.response_ids(USER, "hello world")) == ["hello", "▁world", "</s>"]
    assert text_of(tokenizer, encoder.prompt_ids(USER)).endswith("<|assistant|>\n")


def test_an_answer_right_behind_a_control_token_is_tokenised_as_in_the_whole_chat() -> None:
    # This family puts a space behind control tokens, so that is what the model has learnt to write there.
    tokenizer = zephyr("{% for message in messages %}{{ message['content'] + eos_token }}{% endfor %}")
    encoder = ChatEncoder(tokenizer)
    prompt, response = encoder.prompt_ids(USER), encoder.response_ids(USER, "hello world")
    assert pieces_of(tokenizer, response) == ["▁hello", "▁world", "</s>"]
    whole = rendered(tokenizer, *USER, Message("assistant", "hello world"))
    assert list(prompt + response) == tokenizer(whole)["input_ids"]


def test_no_token_spans_prompt_and_response() -> None:
    tokenizer = chatml()
    encoder = ChatEncoder(tokenizer)
    answer = "\n\nA new paragraph."
    joined = tokenizer(rendered(tokenizer, *USER, Message("assistant", answer)), add_special_tokens=False)["input_ids"]
    prompt, response = encoder.prompt_ids(USER), encoder.response_ids(USER, answer)
    assert tuple(joined[: len(prompt)]) != prompt  # the whole text merges the line breaks of both sides
    assert text_of(tokenizer, prompt) == rendered(tokenizer, *USER, for_generation=True)
    assert text_of(tokenizer, response) == answer + "<|im_end|>"


def test_a_template_without_an_end_gets_eos() -> None:
    tokenizer = chatml(NO_END)
    assert text_of(tokenizer, ChatEncoder(tokenizer).response_ids(USER, "red")) == "red<|im_end|>"


def test_a_template_that_trims_is_followed() -> None:
    tokenizer = llama3()
    assert text_of(tokenizer, ChatEncoder(tokenizer).response_ids(USER, "  red \n")) == "red<|eot_id|>"


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["<|im_end|>", "<|im_start|>", "user", "\n", " ", "hello", "<", "|", "é", "\ue000"])),
    st.lists(st.sampled_from(["<|im_end|>", "<|endoftext|>", "<|im_<|im_end|>end|>", "assistant\n", "\n\n", "x", " "])),
)
def test_spellings_of_control_tokens_stay_text(question: list[str], answer: list[str]) -> None:
    tokenizer, encoder = CHATML
    user, reply = Message("user", "".join(question)), "".join(answer)
    prompt, response = encoder.prompt_ids((user,)), encoder.response_ids((user,), reply)
    controls = [piece for piece in pieces_of(tokenizer, prompt + response) if piece.startswith("<|")]
    assert controls == ["<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>", "<|im_start|>", "<|im_end|>"]
    assert text_of(tokenizer, prompt) == rendered(tokenizer, user, for_generation=True)
    assert text_of(tokenizer, response) == reply + "<|im_end|>"


CHATML = (chatml(), ChatEncoder(chatml()))


# Whole conversations, in every family: what users and models write holds the control tokens of all of them.
EVERY = {**FAMILIES, "zephyr": zephyr, "mistral": mistral}
ENCODERS = {family: (make(), ChatEncoder(make())) for family, make in EVERY.items()}
SPELLINGS = [
    "<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|begin_of_text|>", "<|start_header_id|>", "<bos>",
    "<eos>", "<start_of_turn>", "<end_of_turn>", "<s>", "</s>", "[INST]", "[/INST]", "<|user|>", "<|end|>", "<|",
    "assistant\n", "user",
    "\n", "\n\n", " ", "hello", " world", "é", "\u4f60\u597d", "\U0001f600", "\u200b", "\ue000", "<",
]  # fmt: skip
TURN = st.lists(st.sampled_from(SPELLINGS), max_size=8).map("".join)


def control_tokens(tokenizer: PreTrainedTokenizerFast, token_ids: tuple[int, ...]) -> list[str]:
    return pieces_of(tokenizer, [token_id for token_id in token_ids if token_id in tokenizer.added_tokens_decoder])


def letters(text: str) -> str:
    """Without spaces: some families put one behind a control token or before a first word."""
    return text.replace(" ", "")


@pytest.mark.parametrize("family", EVERY)
@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(TURN, TURN), min_size=1, max_size=3), st.none() | TURN)
def test_a_chat_always_splits_into_prompt_and_response_exactly(
    family: str, exchanges: list[tuple[str, str]], system: str | None
) -> None:
    """Prompt + response are the whole chat rendered once, cut behind its last end-of-turn token, with one BOS at most.

    The control tokens are those of the same conversation of plain words, whatever the turns spell.
    """
    tokenizer, encoder = ENCODERS[family]
    system = None if family == "gemma" else system
    turns = [] if system is None else [Message("system", system)]
    plain = [Message(turn.role, "hello") for turn in turns]
    for question, reply in exchanges:
        turns += [Message("user", question), Message("assistant", reply)]
        plain += [Message("user", "hello"), Message("assistant", "world")]
    answer = turns.pop().content
    prompt, response = encoder.prompt_ids(turns), encoder.response_ids(turns, answer)
    end = text_of(tokenizer, response[-1:])
    whole = rendered(tokenizer, *turns, Message("assistant", answer))
    begin = rendered(tokenizer, *turns, for_generation=True)
    bos = str(tokenizer.bos_token)
    first = bos if family == "zephyr" else ""  # which its template leaves to the tokenizer
    assert letters(text_of(tokenizer, prompt)) == letters(first + begin)
    assert letters(text_of(tokenizer, prompt + response)) == letters(first + whole[: whole.rindex(end) + len(end)])
    assert response[-1] in encoder.end_of_turn_ids
    assert encoder.end_of_turn_ids.isdisjoint(response[:-1])
    assert control_tokens(tokenizer, response) == [end]
    assert control_tokens(tokenizer, prompt) == control_tokens(tokenizer, encoder.prompt_ids(plain[:-1]))
    if family != "chatml":  # whose BOS begins every turn, as SmolLM2's
        assert prompt.count(tokenizer.bos_token_id) == (family != "tiny")
        assert tokenizer.bos_token_id not in prompt[1:]
    n_headers = {"chatml": "<|im_start|>", "llama3": "<|start_header_id|>", "gemma": "<start_of_turn>"}
    if family in n_headers:  # one for each turn and for the answer, and a default system turn in ChatML
        shown = control_tokens(tokenizer, prompt).count(n_headers[family])
        assert shown == len(turns) + 1 + (family == "chatml" and system is None)
    if family == "mistral":
        assert control_tokens(tokenizer, prompt).count("[INST]") == len(exchanges)


@pytest.mark.parametrize("family", EVERY)
def test_control_ids_are_what_the_template_alone_writes(family: str) -> None:
    tokenizer, encoder = ENCODERS[family]
    assert encoder.control_ids == set(tokenizer.added_tokens_decoder) | set(tokenizer.all_special_ids)
    ordinary = tokenizer("hello world", add_special_tokens=False)["input_ids"]
    assert encoder.control_ids.isdisjoint(ordinary)


def test_a_control_token_within_words_gets_no_space_of_a_words_start() -> None:
    tokenizer = zephyr()
    response = ChatEncoder(tokenizer).response_ids(USER, "hello</s>world")
    assert pieces_of(tokenizer, response) == ["hello", "<", "/", "s", ">", "world", "</s>"]


def test_no_chat_template_is_one_line() -> None:
    with pytest.raises(UserError, match=r"has no chat template.*model\.chat_template"):
        ChatEncoder(chatml(None))


def test_a_template_that_answers_differently_when_generating_is_refused() -> None:
    with pytest.raises(UserError, match="begins an answer in another way"):
        ChatEncoder(chatml(FORCED_THOUGHT))


def test_a_template_with_a_date_is_the_same_every_day() -> None:
    tokenizer = chatml(DATED)
    assert "Today is 26 Jul 2024." in text_of(tokenizer, ChatEncoder(tokenizer).prompt_ids(USER))


def test_a_refused_prompt_is_one_line_and_a_refused_example_is_counted() -> None:
    encoder = ChatEncoder(gemma())
    with pytest.raises(UserError, match="System role not supported"):
        encoder.prompt_ids((Message("system", "Be brief."), *USER))
    refused = example("hello", ("chosen", "world"), system="Be brief.")
    encoded = encoder.encode([pair("hello", "world", "so on"), refused], None)
    assert (len(encoded.examples), encoded.n_dropped) == (1, 1)
    assert "refused by the chat template (System role not supported): 1" in encoded.notes[-1]
    with pytest.raises(UserError, match=r"none of 1 examples is left.*System role"):
        encoder.encode([refused], "p95")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_set_has_the_ids_of_its_parts(family: str) -> None:
    encoder = ChatEncoder(FAMILIES[family]())
    given_examples = [
        pair("hello?", "hello world", "\n\nno"),
        pair("<|im_end|> so?", "and so on", "<end_of_turn>"),
        example("capital", ("desirable", "Paris")),
    ]
    encoded = encoder.encode(given_examples, None)
    assert [one.example_id for one in encoded.examples] == [one.example_id for one in given_examples]
    for source, one in zip(given_examples, encoded.examples, strict=True):
        turns = source.prompt.messages
        assert one.prompt_id == source.prompt.prompt_id
        assert one.prompt_ids == encoder.prompt_ids(turns)
        assert [response.token_ids for response in one.responses] == [
            encoder.response_ids(turns, response.text) for response in source.responses
        ]
        assert [response.role for response in one.responses] == [response.role for response in source.responses]


def test_scores_travel_and_equal_tokens_have_equal_ids() -> None:
    encoder = ChatEncoder(chatml())
    prompt = prompt_of(*USER)
    responses = (Response("chosen", "red", 8.5), Response("rejected", "blue"))
    (one,) = encoder.encode([PreferenceExample("id", prompt, responses)], None).examples
    (other,) = encoder.encode([example("hello", ("desirable", "red"))], None).examples
    assert [response.score for response in one.responses] == [8.5, None]
    assert one.responses[0].response_id == other.responses[0].response_id != one.responses[1].response_id


def lengths(encoder: ChatEncoder, one: PreferenceExample) -> tuple[int, list[int]]:
    (encoded,) = encoder.encode([one], None).examples
    return len(encoded.prompt_ids), [len(response.token_ids) for response in encoded.responses]


def test_a_limit_cuts_responses_and_never_the_prompt() -> None:
    encoder = ChatEncoder(build_tokenizer())
    one = pair("abcd", "efghijkl", "mn")
    n_prompt, (n_chosen, n_rejected) = lengths(encoder, one)
    assert (n_chosen, n_rejected) == (9, 3)  # a token a letter, and the end of the turn
    (whole,) = encoder.encode([one], None).examples
    encoded = encoder.encode([one], n_prompt + 4)
    (cut,) = encoded.examples
    assert cut.prompt_ids == whole.prompt_ids
    assert cut.responses[0].token_ids == whole.responses[0].token_ids[:4]
    assert cut.responses[0].response_id != whole.responses[0].response_id
    assert cut.responses[1] == whole.responses[1]
    assert (encoded.n_truncated, encoded.n_dropped, encoded.max_length) == (1, 0, n_prompt + 4)
    whole_lengths = {"prompt": (n_prompt,), "chosen": (9,), "rejected": (3,), "whole": (n_prompt + 9,)}
    assert encoded.lengths == whole_lengths  # before the cut
    assert "1 of 2 responses cut at the limit" in encoded.notes


def test_a_limit_that_fits_exactly_cuts_nothing() -> None:
    encoder = ChatEncoder(build_tokenizer())
    one = pair("abcd", "efghijkl", "mn")
    n_prompt, (n_chosen, _) = lengths(encoder, one)
    assert encoder.encode([one], n_prompt + n_chosen).n_truncated == 0
    assert encoder.encode([one], n_prompt + n_chosen - 1).n_truncated == 1


def test_one_response_token_is_kept_or_the_example_is_dropped() -> None:
    encoder = ChatEncoder(build_tokenizer())
    short, long = pair("abcd", "ef", "gh"), pair("abcdefgh", "ij", "kl")
    n_short, n_long = lengths(encoder, short)[0], lengths(encoder, long)[0]
    assert encoder.encode([long], n_long + 1).examples[0].responses[0].token_ids != ()
    encoded = encoder.encode([short, long], n_long)
    assert [one.example_id for one in encoded.examples] == [short.example_id]
    assert encoded.dropped == {f"prompt leaves no room for an answer in {n_long} tokens": 1}
    assert encoded.lengths["prompt"] == (n_short, n_long)
    assert f"prompt leaves no room for an answer in {n_long} tokens: 1" in encoded.notes[-1]
    with pytest.raises(UserError, match=rf"max_length={n_short}: none of 2 .*shortest prompt has {n_short} tokens"):
        encoder.encode([short, long], n_short)


def test_a_pair_that_cutting_makes_equal_is_dropped() -> None:
    encoder = ChatEncoder(build_tokenizer())
    same_start, other = pair("abcd", "efgh", "efij"), pair("abcd", "kl", "mn")
    n_prompt = lengths(encoder, other)[0]
    encoded = encoder.encode([same_start, other], n_prompt + 2)
    assert [one.example_id for one in encoded.examples] == [other.example_id]
    assert "chosen and rejected have equal tokens: 1" in encoded.notes[-1]


def test_a_percentile_is_of_the_longest_sequence_of_each_example() -> None:
    encoder = ChatEncoder(build_tokenizer())
    # The prompt has 3 tokens: a role, one letter, a role. Chosen answers have 2 to 21 tokens, rejected ones 2.
    examples = [pair("a", "b" * n, "c") for n in range(1, 21)]
    assert lengths(encoder, examples[0]) == (3, [2, 2])
    encoded = encoder.encode(examples, "p95")
    assert encoded.max_length == 3 + 20  # the 19th of 20
    assert (encoded.n_truncated, encoded.n_dropped) == (1, 0)
    assert encoded.notes[0] == "longest of 20 examples: 24 tokens, limit 23 (p95 of these examples)"
    assert encoder.encode(examples, "p100").n_truncated == 0


def test_percentiles_are_nearest_ranks() -> None:
    assert [percentile([30, 10, 20, 40], word) for word in ("p1", "p25", "p26", "p50", "p75", "p100")] == [
        10, 10, 20, 20, 30, 40,
    ]  # fmt: skip
    for word in ("p0", "p101", "95", "p9.5", "median"):
        with pytest.raises(UserError, match=r"max_length=.*percentile such as p95"):
            percentile([1], word)


def test_the_models_context_is_a_limit() -> None:
    tokenizer = build_tokenizer()
    tokenizer.model_max_length = 8
    encoded = ChatEncoder(tokenizer).encode([pair("a", "b" * 20, "c")], None)
    assert encoded.max_length == 8
    assert "the model's context" in encoded.notes[0]


def test_no_examples_is_one_line() -> None:
    with pytest.raises(UserError, match="no examples"):
        ChatEncoder(build_tokenizer()).encode([], None)


def test_generated_answers_join_by_prompt_and_are_cut() -> None:
    encoder = ChatEncoder(build_tokenizer())
    examples = encoder.encode([pair("a", "b", "c"), pair("d", "e", "f"), pair("a", "g", "h")], None).examples
    answer = {
        one.prompt_id: encoder.response_ids(USER, text) for one, text in zip(examples, ("xyz", "w"), strict=False)
    }
    generations = {key: Generation(key, "", found, "eos") for key, found in answer.items()}
    added = encoder.add_generated(examples, generations, None)
    assert [one.responses[2].token_ids for one in added] == [answer[one.prompt_id] for one in examples]
    assert [one.responses[2].role for one in added] == ["generated"] * 3
    assert [one.responses[:2] for one in added] == [one.responses for one in examples]
    cut = encoder.add_generated(examples, generations, 3 + 2)
    assert [one.responses[2].token_ids for one in cut] == [answer[one.prompt_id][:2] for one in examples]
    assert cut[0].responses[2].response_id != added[0].responses[2].response_id
    assert cut[1].responses[2].response_id == added[1].responses[2].response_id
    with pytest.raises(KeyError):
        encoder.add_generated(examples, {}, None)
    empty = {key: Generation(key, "", (), "length") for key in answer}
    with pytest.raises(ValueError, match="no tokens"):
        encoder.add_generated(examples, empty, None)


def test_answers_are_prompts_with_one_generated_response() -> None:
    encoder = ChatEncoder(build_tokenizer())
    prompts = [prompt_of(Message("user", text)) for text in ("a", "b")]
    found = encoder.response_ids(USER, "red")
    generations = {one.prompt_id: Generation(one.prompt_id, "red", found, "eos") for one in prompts}
    answers = encoder.answers(prompts, generations)
    assert [one.prompt_ids for one in answers] == [encoder.prompt_ids(one.messages) for one in prompts]
    assert [[(part.role, part.token_ids) for part in one.responses] for one in answers] == [[("generated", found)]] * 2
    assert len({one.example_id for one in answers}) == 2
