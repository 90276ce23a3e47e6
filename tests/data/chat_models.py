"""Small tokenizers with the properties of the families that people train: made here, in a tenth of a second each."""

from __future__ import annotations

import functools
from collections.abc import Sequence

from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import decoders as decoding
from transformers import PreTrainedTokenizerFast

TEXT = [
    "What is the capital of France? The capital of France is Paris.",
    "user assistant system question answer hello world, and so on.\n\n\n\nA new paragraph.\n\nAnother one.\n",
    "Name three colours!\n- red\n- green\n- blue\n",
] * 20

CHATML = (
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{% for message in messages %}{{ (bos_token if loop.first else '') + '<|start_header_id|>' + message['role'] + "
    "'<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}"
    "{% endif %}{% for message in messages %}{{ '<start_of_turn>' + ('model' if message['role'] == 'assistant' else "
    "message['role']) + '\n' + message['content'] | trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + eos_token + '\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)
MISTRAL = (
    "{% if messages[0]['role'] == 'system' %}{% set lead = messages[0]['content'] + '\n\n' %}"
    "{% set turns = messages[1:] %}{% else %}{% set lead = '' %}{% set turns = messages %}{% endif %}{{ bos_token }}"
    "{% for message in turns %}{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('roles must alternate') }}{% endif %}{% if message['role'] == 'user' %}"
    "{{ '[INST] ' + (lead if loop.first else '') + message['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + message['content'] + eos_token }}{% endif %}{% endfor %}"
)
NO_END = (
    "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
FORCED_THOUGHT = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\n<think>\n'")
DATED = CHATML.replace("You are a helpful assistant.", "Today is ' + strftime_now('%d %b %Y') + '.")


GPT2_WORDS = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
LLAMA3_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


@functools.cache
def _byte_level(specials: tuple[str, ...], first: str | None, words: str) -> Tokenizer:
    """Byte-level BPE, as GPT-2, Llama 3 and Qwen have; ``first`` is put before any text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(words), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoding.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(TEXT, trainer)
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    if first is not None:
        tokenizer.post_processor = processors.TemplateProcessing(
            single=f"{first} $A", special_tokens=[(first, tokenizer.token_to_id(first))]
        )
    return tokenizer


def _wrapped(tokenizer: Tokenizer, template: str | None, **specials: str) -> PreTrainedTokenizerFast:
    # A copy, because transformers changes settings of the object that it wraps.
    copy = Tokenizer.from_str(tokenizer.to_str())
    return PreTrainedTokenizerFast(
        tokenizer_object=copy, chat_template=template, clean_up_tokenization_spaces=False, **specials
    )


def chatml(template: str | None = CHATML) -> PreTrainedTokenizerFast:
    """As SmolLM2 and Qwen: the pad token ends a turn, a default system turn, a line break behind the end."""
    tokenizer = _byte_level(("<|endoftext|>", "<|im_start|>", "<|im_end|>"), None, GPT2_WORDS)
    return _wrapped(tokenizer, template, eos_token="<|im_end|>", pad_token="<|im_end|>", bos_token="<|im_start|>")


def llama3() -> PreTrainedTokenizerFast:
    """As Llama 3: the template writes BOS and trims; the tokenizer puts BOS before plain text as well."""
    specials = ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
    tokenizer = _byte_level(specials, "<|begin_of_text|>", LLAMA3_WORDS)
    return _wrapped(tokenizer, LLAMA3, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def gemma() -> PreTrainedTokenizerFast:
    """As Gemma: the end of a turn is not eos, and there are no system turns."""
    specials = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
    tokenizer = _byte_level(specials, "<bos>", GPT2_WORDS)
    return _wrapped(tokenizer, GEMMA, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>")


def zephyr(template: str | None = ZEPHYR) -> PreTrainedTokenizerFast:
    """As Zephyr on Mistral: words carry the space before them, one is put before the first word of a text and of what
    follows a control token, and only the tokenizer writes BOS.
    """
    return _wrapped(_sentence_pieces(()), template, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def mistral() -> PreTrainedTokenizerFast:
    """As Mistral's instruct models since v0.3: user turns between control tokens, and no header before an answer."""
    tokenizer = _sentence_pieces(("[INST]", "[/INST]"))
    return _wrapped(tokenizer, MISTRAL, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def _sentence_pieces(more: tuple[str, ...]) -> Tokenizer:
    """Unigram with byte fallback, as SentencePiece makes; ``more`` are control tokens besides <s> and </s>."""
    words = sorted({word for text in TEXT for word in text.replace(",", " ").replace(".", " ").split()})
    specials = ("<s>", "</s>", *more)
    pieces = [("<unk>", 0.0), *((token, 0.0) for token in specials), ("▁", -9.0)]
    pieces += [(f"<0x{byte:02X}>", -100.0) for byte in range(256)]
    pieces += [(chr(code), -10.0) for code in range(0x21, 0x7F)]
    pieces += [(mark + word, -1.0) for word in words for mark in ("", "▁") if len(mark + word) > 1]
    tokenizer = Tokenizer(models.Unigram(list(dict(pieces).items()), unk_id=0, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoding.Sequence(
        [decoding.Replace("▁", " "), decoding.ByteFallback(), decoding.Fuse(), decoding.Strip(" ", 1, 0)]
    )
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return tokenizer


def pieces_of(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int]) -> list[str]:
    """The tokens of ids as the vocabulary spells them."""
    return [str(token) for token in tokenizer.convert_ids_to_tokens(list(token_ids))]


def text_of(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int]) -> str:
    """The text of ids with control tokens."""
    return str(tokenizer.decode(list(token_ids), skip_special_tokens=False, clean_up_tokenization_spaces=False))
