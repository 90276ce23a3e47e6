"""The tokenizer of ``model=tiny``, built here from the words of the embedded data sets: no download, no training.

A Unigram model whose pieces are whole words, with the space before them where there is one, single printable ASCII
characters, and the 256 bytes, so that any text can be encoded and decodes to exactly itself.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

PAD, END, BEGIN = "<|pad|>", "<|end|>", "<|begin|>"
ROLES = ("system", "user", "assistant")
SPECIAL_TOKENS = (PAD, END, BEGIN, *(f"<|{role}|>" for role in ROLES))

# A turn begins with the token of its role; only an answer needs an end, because the model has to write it.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] -%}"
    "{{- raise_exception('unknown role: ' + message['role']) -}}"
    "{%- endif -%}"
    "{{- '<|' + message['role'] + '|>' + message['content'] -}}"
    "{%- if message['role'] == 'assistant' -%}{{- '<|end|>' -}}{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}"
)

_PIECE = re.compile(r" ?[^\W_]+|[^\w\s]")


def words() -> list[str]:
    """Every word of the embedded data sets as it stands in their texts, with the space before it; sorted."""
    from dppo.data import arithmetic, instructions

    found: set[str] = set()
    for module in (instructions, arithmetic):
        for text in module.texts_with_every_word():
            found.update(_PIECE.findall(text))
    return sorted(piece for piece in found if len(piece) > 1)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """The tokenizer, equal on every machine: pad and end-of-turn are different tokens, nothing is added at the start.

    ``eos`` is the end-of-turn token. ``bos`` exists for tools that ask for one; the chat template writes none.
    """
    from tokenizers import AddedToken, Tokenizer
    from tokenizers.decoders import ByteFallback, Fuse
    from tokenizers.decoders import Sequence as Decoders
    from tokenizers.models import Unigram
    from transformers import PreTrainedTokenizerFast

    # The best path is the one with the largest sum of scores: a whole word before its letters, letters before bytes.
    # Byte pieces must lose against any spelling in letters, or a text that spells "<0x41>" would decode to "A".
    pieces = [(token, -1000.0) for token in SPECIAL_TOKENS]
    pieces += [(f"<0x{byte:02X}>", -1000.0) for byte in range(256)]
    pieces += [(chr(code), -10.0) for code in range(0x20, 0x7F)]
    pieces += [(word, -1.0) for word in words()]
    tokenizer = Tokenizer(Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.decoder = Decoders([ByteFallback(), Fuse()])
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=END,
        bos_token=BEGIN,
        extra_special_tokens=[f"<|{role}|>" for role in ROLES],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_max_length=512,
    )
