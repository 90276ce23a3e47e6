from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from dppo.data.arithmetic import Arithmetic
from dppo.data.instructions import Instructions
from dppo.data.tiny_tokenizer import SPECIAL_TOKENS, build_tokenizer, words
from dppo.rewards.verifiable import Verifiable

TOKENIZER = build_tokenizer()
SPECIAL = {token: TOKENIZER.get_vocab()[token] for token in SPECIAL_TOKENS}


def encode(text: str) -> list[int]:
    return list(TOKENIZER(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


@settings(max_examples=200, deadline=None)
@given(
    st.one_of(
        st.text(),
        st.text(alphabet=" .,<>0x4Aa▁é\n\x00"),
        st.lists(
            st.sampled_from([*SPECIAL_TOKENS, "<0xA1>", "<unk>", " kite", "kite", " ", "\n", "日本", "\u200d"])
        ).map("".join),
    )
)
def test_any_text_decodes_to_itself_and_never_becomes_a_special_token(text: str) -> None:
    tokens = encode(text)
    assert TOKENIZER.decode(tokens) == text
    assert not set(tokens) & set(SPECIAL.values())


def test_a_word_is_one_token_with_its_space_and_nothing_is_added() -> None:
    text = "Mention kite and river, end with thank you."
    pieces = ["Mention", " kite", " and", " river", ",", " end", " with", " thank", " you", "."]
    assert TOKENIZER.convert_ids_to_tokens(TOKENIZER(text)["input_ids"]) == pieces
    assert TOKENIZER.convert_ids_to_tokens(encode("é<0xA1>")) == ["<0xC3>", "<0xA9>", *"<0xA1>"]


def test_special_tokens_have_different_ids() -> None:
    assert len(set(SPECIAL.values())) == len(SPECIAL_TOKENS) == 6
    assert TOKENIZER.pad_token_id == SPECIAL["<|pad|>"]
    assert TOKENIZER.eos_token_id == SPECIAL["<|end|>"]
    assert TOKENIZER.bos_token_id == SPECIAL["<|begin|>"]
    assert TOKENIZER("<|end|>")["input_ids"] == [TOKENIZER.eos_token_id]
    assert sorted(TOKENIZER.get_vocab().values()) == list(range(len(TOKENIZER)))


def test_chat_template_spends_one_token_a_turn_and_one_to_end_an_answer() -> None:
    turns = [{"role": "system", "content": "Be old."}, {"role": "user", "content": "Mention kite."}]
    prompt = TOKENIZER.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert prompt == "<|system|>Be old.<|user|>Mention kite.<|assistant|>"
    whole = [*turns, {"role": "assistant", "content": "The kite."}]
    assert TOKENIZER.apply_chat_template(whole, tokenize=False) == prompt + "The kite.<|end|>"
    tokens = TOKENIZER.apply_chat_template(whole[1:], return_dict=False)
    assert tokens == [
        SPECIAL["<|user|>"], *encode("Mention kite."),
        SPECIAL["<|assistant|>"], *encode("The kite."), SPECIAL["<|end|>"],
    ]  # fmt: skip
    with pytest.raises(TemplateError, match="unknown role: tool"):
        TOKENIZER.apply_chat_template([{"role": "tool", "content": "x"}], tokenize=False)


def test_saved_tokenizer_is_the_same(tmp_path: Path) -> None:
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded.backend_tokenizer.to_str() == TOKENIZER.backend_tokenizer.to_str()
    assert loaded.chat_template == TOKENIZER.chat_template
    assert (loaded.pad_token, loaded.eos_token, loaded.bos_token) == ("<|pad|>", "<|end|>", "<|begin|>")
    text = "<|user|>Héllo  kite .<|end|>"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == "Héllo  kite ."
    assert loaded.decode(loaded(text, split_special_tokens=True)["input_ids"]) == text


def test_every_word_of_the_embedded_data_is_one_token_and_every_piece_is_used() -> None:
    """No word is spelled in letters, which would cost tokens, and no piece is there that the data never need."""
    labels = Verifiable(met=1.0, violated=1.0, repetition=2.0, surplus_word=0.02)
    sizes = {"n_chats": 3000, "n_pairs": 3000, "n_validation": 1, "n_test": 1}
    instructions = Instructions(seed=5, compliance=0.5, habit_spread=0.3, pair_compliance=0.5, labels=labels, **sizes)
    arithmetic = Arithmetic(seed=5, largest_operand=30, largest_removed=30, **sizes)
    seen: set[str] = set()
    for example in (*instructions.chats("train"), *instructions.pairs("train"), *arithmetic.pairs("train")):
        for text in (example.prompt.messages[0].content, *(response.text for response in example.responses)):
            pieces = TOKENIZER.convert_ids_to_tokens(encode(text))
            assert all(len(piece) > 1 or re.fullmatch(r"[.,?0-9AI]", piece) for piece in pieces), (text, pieces)
            seen.update(pieces)
    unused = set(words()) - seen
    assert all(piece.strip().isdigit() for piece in unused), unused  # every number up to the largest sum has a piece
    assert len(TOKENIZER) == len(SPECIAL_TOKENS) + 256 + 95 + len(words()) < 800
