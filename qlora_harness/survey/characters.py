"""Characters instead of tokens, for a survey without a model."""

from __future__ import annotations

import re
from typing import Any

_FIRST = 0x110000  # above every code point
_CONTROL = ("<s>", "</s>", "<|im_start|>", "<|im_end|>")
_IDS = {text: _FIRST + number for number, text in enumerate(_CONTROL)}
_TEXTS = {number: text for text, number in _IDS.items()}
_SPLIT = re.compile("(" + "|".join(map(re.escape, _CONTROL)) + ")")


class Characters:
    """A tokenizer with a token for each character and each control token of the templates."""

    chat_template: Any = None
    bos_token_id: int | None = None
    eos_token_id: int | None = _IDS["</s>"]

    def encode(self, text: str, /, **options: Any) -> list[int]:
        """Returns code points; control tokens count as one unless `split_special_tokens`."""
        if options.get("split_special_tokens"):
            return list(map(ord, text))
        ids: list[int] = []
        for piece in _SPLIT.split(text):
            ids += [_IDS[piece]] if piece in _IDS else map(ord, piece)
        return ids

    def decode(self, token_ids: Any, skip_special_tokens: bool = False) -> str:
        """Returns the text."""
        return "".join(_TEXTS[number] if number >= _FIRST else chr(number) for number in token_ids)
