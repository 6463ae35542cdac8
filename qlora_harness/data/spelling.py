"""Conversations as token ids, exchange by exchange, in a template of ours or in none."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from qlora_harness.data.conversation import Conversation, Turn
from qlora_harness.data.templates import Template
from qlora_harness.data.text_ids import TextIds, Tokenizer
from qlora_harness.errors import SettingsError


@dataclass(frozen=True)
class Exchange:
    """The ids of a user's turn and its reply, each with the template's text around it.

    `unlearned` ids at the start of `prompt` are BOS, which no mask learns.
    """

    prompt: list[int]
    reply: list[int]
    supervised: bool
    unlearned: int = 0

    def __len__(self) -> int:
        return len(self.prompt) + len(self.reply)


@dataclass(frozen=True)
class Spelling:
    """A conversation as token ids; `lead` are those before the first exchange, never learned."""

    lead: list[int]
    exchanges: list[Exchange]

    def __len__(self) -> int:
        return len(self.lead) + sum(map(len, self.exchanges))


@dataclass(frozen=True)
class _Piece:
    """A text to encode as it continues `after`, which is encoded with it and cut off."""

    text: str
    after: str = ""


class TemplateSpeller:
    """Spells conversations in a template of `TEMPLATES`.

    Raises SettingsError if the tokenizer lacks a token of the template.
    """

    def __init__(
        self, tokenizer: Tokenizer, name: str, template: Template, leading_bos: list[int]
    ) -> None:
        self._ids = TextIds(tokenizer)
        self._template = template
        for token in template.control_tokens:
            if len(self._ids.control(token)) != 1:
                raise SettingsError(
                    f"--template {name} needs the token {token!r}, which this model's tokenizer "
                    "does not have",
                    "Use --template guanaco; tokens are never added to the vocabulary",
                )
        eos = tokenizer.eos_token_id
        end = template.end_token
        self._end = self._ids.control(end) if end else [eos] if eos is not None else []
        self._lead = [] if template.bos_each else leading_bos
        self._bos = leading_bos if template.bos_each else []
        self._between = self._ids.plain([template.between])[0] if template.between else []
        self._context = self._ids.plain([template.assistant_start])[0]
        # The texts of a template with control tokens that stand before, between and after others.
        self._control = {
            text: self._ids.control(text)
            for text in (
                template.user_start,
                template.assistant_start,
                template.system_start,
                template.system_end + template.user_start,
            )
        }

    def spell(self, conversations: Sequence[Conversation]) -> list[Spelling]:
        """Spells conversations of alternating turns; each exchange is BOS or none, prompt, reply.

        All texts are encoded in one call, and then put together.
        """
        pieces = [piece for c in conversations for piece in self._pieces(c)]
        encoded = iter(self._encode(pieces))
        return [Spelling(self._lead, self._exchanges(c, encoded)) for c in conversations]

    def _pieces(self, conversation: Conversation) -> Iterator[_Piece]:
        """Yields the texts to encode, in the order in which `_exchanges` takes their ids."""
        template = self._template
        system = template.system_of(conversation)
        before = template.system_start + system + template.system_end if system else ""
        for user, assistant in _exchanges(conversation):
            text = template.user_text(user)
            if template.control_tokens:
                if before:
                    yield _Piece(system)
                yield _Piece(text)
                yield _Piece(assistant.text)
            else:
                # The markers are tokenized together with the user's text, as in QLoRA's training
                # text.
                start = template.user_start
                start = start + before if template.system_inside else before + start
                yield _Piece(start + text + template.assistant_start)
                reply = template.reply_lead + assistant.text + template.reply_end
                yield _Piece(reply, after=template.assistant_start)
            before = ""

    def _encode(self, pieces: Sequence[_Piece]) -> list[list[int]]:
        """Encodes pieces.

        SentencePiece puts a space before a text on its own, so a piece is encoded together with
        what comes before it, and split off.
        """
        encoded = self._ids.plain([piece.after + piece.text for piece in pieces])
        start = self._context
        for index, piece in enumerate(pieces):
            if not piece.after:
                continue
            whole = encoded[index]
            if whole[: len(start)] == start:
                encoded[index] = whole[len(start) :]
            else:
                encoded[index] = self._ids.plain([piece.text])[0]
        return encoded

    def _exchanges(
        self, conversation: Conversation, encoded: Iterator[list[int]]
    ) -> list[Exchange]:
        template, control = self._template, self._control
        has_system = bool(template.system_of(conversation))
        exchanges: list[Exchange] = []
        for _, assistant in _exchanges(conversation):
            prompt = self._bos + (self._between if exchanges else [])
            if not template.control_tokens:
                prompt = prompt + next(encoded)
            else:
                start = template.user_start
                if has_system and not exchanges:
                    prompt = prompt + control[template.system_start] + next(encoded)
                    start = template.system_end + start
                prompt = prompt + control[start] + next(encoded) + control[template.assistant_start]
            reply = next(encoded) + self._end
            exchanges.append(Exchange(prompt, reply, assistant.supervised, len(self._bos)))
        return exchanges


def _exchanges(conversation: Conversation) -> Iterator[tuple[Turn, Turn]]:
    turns = conversation.turns
    return zip(turns[::2], turns[1::2], strict=True)


class TextSpeller:
    """Spells plain texts: BOS, the text and EOS, as one reply without a prompt."""

    def __init__(self, tokenizer: Tokenizer, leading_bos: list[int]) -> None:
        self._ids = TextIds(tokenizer)
        self._lead = leading_bos
        self._end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]

    def spell(self, conversations: Sequence[Conversation]) -> list[Spelling]:
        """Spells conversations of one turn."""
        encoded = self._ids.plain([conversation.turns[0].text for conversation in conversations])
        return [Spelling(self._lead, [Exchange([], ids + self._end, True)]) for ids in encoded]
