"""Encodes conversations turn by turn, so that no reply has to be searched for in the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

from qlora_harness.data.conversation import Conversation
from qlora_harness.data.examples import Example, SpannedIds
from qlora_harness.data.own_template import OwnTemplate
from qlora_harness.data.spelling import Spelling, TemplateSpeller, TextSpeller
from qlora_harness.data.templates import NO_TEMPLATE, TEMPLATES, TOKENIZERS_OWN, check_fits
from qlora_harness.data.text_ids import Tokenizer, identity_of, leading_bos
from qlora_harness.errors import SettingsError


class Speller(Protocol):
    """Gives conversations as token ids, exchange by exchange."""

    def spell(self, conversations: Sequence[Conversation]) -> list[Spelling]: ...  # noqa: D102


class ChatEncoder:
    """Encodes conversations without adding to the tokenizer's vocabulary.

    `template` is a name of `TEMPLATES`, "tokenizer" or "none". `max_length` is in tokens. With
    `mask` "prompt" the supervised turns and their ends are learned, with "none" everything but BOS.
    Raises SettingsError if the tokenizer lacks EOS, a token of the template or a template.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, max_length: int, mask: str) -> None:
        self._learn_all = mask == "none"
        self._template = template
        self._max_length = max_length
        self.leading_bos = leading_bos(tokenizer)
        self.identity = identity_of(tokenizer)  # None if it is not known
        self._speller = _speller(tokenizer, template, self.leading_bos)

    def encode(self, conversation: Conversation) -> Example | None:
        """Encodes one conversation; None if no supervised token is left."""
        encoded = self.encode_all([conversation])[0]
        return None if encoded is None else encoded.example()

    def encode_all(self, conversations: Sequence[Conversation]) -> list[SpannedIds | None]:
        """Encodes conversations; None stands for one without a supervised token.

        One that is too long loses whole exchanges: from the end back to its first supervised turn,
        then from the start up to it. If that exchange alone is too long, its reply is cut and has
        no end of turn. Raises DataError for one that the template can't hold.
        """
        for conversation in conversations:
            check_fits(conversation, self._template)
        spellings = self._speller.spell(conversations)
        return [self._fit(*pair) for pair in zip(conversations, spellings, strict=True)]

    def _fit(self, conversation: Conversation, spelling: Spelling) -> SpannedIds | None:
        exchanges, longest = spelling.exchanges, self._max_length
        total = len(spelling)
        truncated = total > longest
        anchor = next((i for i, exchange in enumerate(exchanges) if exchange.supervised), 0)
        first, last = 0, len(exchanges)
        while total > longest and last > anchor + 1:
            last -= 1
            total -= len(exchanges[last])
        while total > longest and first < anchor:
            total -= len(exchanges[first])
            first += 1
        shorter = replace(spelling, exchanges=exchanges[:last])
        if first:
            shorter = self._spell_part(conversation, first, last)
            while len(shorter) > longest and first < anchor:
                first += 1
                shorter = self._spell_part(conversation, first, last)
        turns = min(2 * (last - first), len(conversation.turns))  # a text is one turn
        return self._example(shorter, truncated, turns)

    def _spell_part(self, conversation: Conversation, first: int, last: int) -> Spelling:
        """Spells some exchanges; the first has no separator before it, but a system prompt."""
        turns = conversation.turns[2 * first : 2 * last]
        return self._speller.spell([replace(conversation, turns=turns)])[0]

    def _example(self, spelling: Spelling, truncated: bool, turns: int) -> SpannedIds | None:
        ids = list(spelling.lead)
        spans: list[int] = []
        for exchange in spelling.exchanges:
            start = len(ids)
            ids += exchange.prompt
            if self._learn_all:
                start += exchange.unlearned
            else:
                start = len(ids)
            ids += exchange.reply
            if self._learn_all or exchange.supervised:
                spans += [start, len(ids)]
        length = self._max_length
        if len(ids) > length:
            del ids[length:]
            inside = [border for border in spans if border < length]
            spans = [*inside, length] if len(inside) % 2 else inside
        # Nothing predicts the first token of a row.
        return SpannedIds(ids, spans, truncated, turns) if spans and spans[-1] > 1 else None


def _speller(tokenizer: Tokenizer, template: str, bos: list[int]) -> Speller:
    if template == TOKENIZERS_OWN:
        return OwnTemplate(tokenizer, bos)
    if tokenizer.eos_token_id is None:
        raise SettingsError(
            "the tokenizer has no end-of-sequence token", "Use a model whose tokenizer has one"
        )
    if template == NO_TEMPLATE:
        return TextSpeller(tokenizer, bos)
    return TemplateSpeller(tokenizer, template, TEMPLATES[template], bos)
