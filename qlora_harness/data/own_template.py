"""The tokenizer's own chat template: --template tokenizer."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import groupby
from typing import Any, cast

from qlora_harness.data.conversation import Conversation
from qlora_harness.data.spelling import Exchange, Spelling
from qlora_harness.data.templates import Template
from qlora_harness.data.text_ids import TextIds, Tokenizer
from qlora_harness.errors import DataError, SettingsError, first_line

_REMEDY = "Use another --template, such as chatml"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")  # as spaced as Jinja permits
_JOIN = Template("", "", "")  # how a text and its context become one message
_HIDDEN = "\ue000"  # of Unicode's private use: stands for a character of a typed special token

Spans = list[tuple[int, int]]
Offsets = Sequence[tuple[int, int]]
Messages = list[dict[str, str]]


class TypedTokens:
    """Keeps special tokens that somebody typed in a message as text: they end no turn."""

    def __init__(self, tokenizer: Any) -> None:
        added = tokenizer.added_tokens_decoder
        self._tokens = {number: str(token) for number, token in added.items() if token.special}
        self._any = re.compile("|".join(map(re.escape, self._tokens.values())) or r"(?!)")
        self._texts = TextIds(tokenizer)

    def occur(self, messages: Iterable[Mapping[str, str]]) -> bool:
        """Returns whether a message has such a token."""
        return any(self._any.search(message["content"]) for message in messages)

    def as_text(
        self,
        messages: Sequence[Mapping[str, str]],
        render: Callable[[Messages], str],
        ids: list[int],
        offsets: Offsets,
    ) -> tuple[list[int], Offsets]:
        """Spells out such tokens in the ids and offsets of the rendered messages.

        Raises DataError if the template changes one of them.
        """
        plain = [dict(message) for message in messages]
        text = render([m | {"content": self._any.sub(_hide, m["content"])} for m in plain])
        if len(text) != len(render(plain)):
            raise DataError("the template changes a special token in a message", _REMEDY)
        spelled: list[tuple[int, tuple[int, int]]] = []
        for number, (begin, end) in zip(ids, offsets, strict=True):
            is_typed = number in self._tokens and _HIDDEN in text[begin:end]
            pieces = self._characters(number) if is_typed else [number]
            spelled += [(piece, (begin, end)) for piece in pieces]
        return [number for number, _ in spelled], [offset for _, offset in spelled]

    def _characters(self, number: int) -> list[int]:
        """Returns the ids of a special token's characters, after others."""
        before, whole = self._texts.plain(["a", "a" + self._tokens[number]])
        return whole[len(before) :]


def _hide(token: re.Match[str]) -> str:
    return _HIDDEN * len(token[0])


class OwnTemplate:
    """Spells conversations as `apply_chat_template` does.

    A reply is what the template's {% generation %} encloses. Without that, it is what the template
    adds to the rendering of the messages before it with `add_generation_prompt`, up to its last
    special token. What follows belongs to the next prompt. A special token that is typed in a
    message stays text. Raises SettingsError if the tokenizer has no template.
    """

    def __init__(self, tokenizer: Tokenizer, leading_bos: list[int]) -> None:
        if not tokenizer.chat_template:
            raise SettingsError(
                "--template tokenizer: this model's tokenizer has no chat template", _REMEDY
            )
        self._tokenizer = cast(Any, tokenizer)
        self._bos = leading_bos
        self._special = frozenset(self._tokenizer.all_special_ids)
        self._typed = TypedTokens(tokenizer)
        self._marks_replies = _GENERATION.search(str(tokenizer.chat_template)) is not None

    def spell(self, conversations: Sequence[Conversation]) -> list[Spelling]:
        """Spells conversations; raises DataError for one that the template refuses or rewrites."""
        rendered = list(map(self._rendered, conversations))
        encoded = self._tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
        )
        tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [
            self._spelling(conversation, spans, ids, offsets)
            for conversation, (_, spans), (ids, offsets) in zip(
                conversations, rendered, tokens, strict=True
            )
        ]

    def _spelling(
        self, conversation: Conversation, spans: Spans, ids: list[int], offsets: Offsets
    ) -> Spelling:
        messages = _messages(conversation)
        if self._typed.occur(messages):
            try:
                ids, offsets = self._typed.as_text(messages, self._render, ids, offsets)
            except DataError as error:
                raise self._refusal(conversation, error.problem) from None
        lead = self._bos if ids[: len(self._bos)] == self._bos else []
        exchanges, done = [], len(lead)
        borders = self._token_spans(ids, offsets, spans)
        for turn, (begin, end) in zip(conversation.turns[1::2], borders, strict=True):
            exchanges.append(Exchange(ids[done:begin], ids[begin:end], turn.supervised))
            done = end
        return Spelling(list(lead), exchanges)

    def _rendered(self, conversation: Conversation) -> tuple[str, Spans]:
        """Returns the text and the borders of the replies in it.

        Raises DataError, with the place of the conversation, if the template can't hold it.
        """
        messages = _messages(conversation)
        replies = range(len(messages) - len(conversation.turns) + 1, len(messages), 2)
        try:
            whole = self._render(messages)
            spans = (
                self._marked(messages)
                if self._marks_replies
                else self._measured(whole, messages, replies)
            )
        except DataError as error:
            raise self._refusal(conversation, error.problem) from None
        except Exception as error:  # noqa: BLE001
            # Templates raise errors of their own, for example for a system prompt, and Python's.
            raise self._refusal(conversation, first_line(error)) from None
        if len(spans) != len(replies):
            reason = f"it marks {len(spans)} replies of {len(replies)}"
            raise self._refusal(conversation, reason)
        return whole, spans

    def _refusal(self, conversation: Conversation, reason: str) -> DataError:
        return DataError(
            f"{conversation.place}: the tokenizer's chat template can't hold this row: {reason}",
            _REMEDY,
        )

    def _marked(self, messages: Messages) -> Spans:
        """Returns the borders of the replies as the template marks them."""
        applied = self._tokenizer.apply_chat_template(
            messages,
            return_dict=True,
            return_assistant_tokens_mask=True,
            tokenizer_kwargs={"return_offsets_mapping": True},
        )
        tokens = zip(applied["assistant_masks"], applied["offset_mapping"], strict=True)
        runs = [(learned, list(run)) for learned, run in groupby(tokens, lambda token: token[0])]
        return [(run[0][1][0], run[-1][1][1]) for learned, run in runs if learned]

    def _measured(self, whole: str, messages: Messages, replies: range) -> Spans:
        """Returns the borders of the replies from renderings of fewer messages."""
        spans = []
        for index in replies:
            prompt = self._render(messages[:index], add_generation_prompt=True)
            is_last = index + 1 == len(messages)
            through = whole if is_last else self._render(messages[: index + 1])
            if not whole.startswith(prompt) or not whole.startswith(through):
                raise DataError("earlier messages look different when later ones follow", _REMEDY)
            spans.append((len(prompt), len(through)))
        return spans

    def _token_spans(self, ids: list[int], offsets: Offsets, spans: Spans) -> Spans:
        """Returns the borders of replies in tokens; a token belongs to where it begins."""
        starts = [start for start, _ in offsets]
        borders = []
        for begin, end in spans:
            first, last = bisect_left(starts, begin), bisect_left(starts, end)
            borders.append((first, self._end_of_turn(ids, first, last)))
        return borders

    def _end_of_turn(self, ids: list[int], begin: int, end: int) -> int:
        """Leaves out white space after a last special token, such as ChatML's line break."""
        if self._marks_replies:
            return end
        last = max((i for i in range(begin, end) if ids[i] in self._special), default=None)
        if last is None or self._tokenizer.decode(ids[last + 1 : end]).strip():
            return end
        return last + 1

    def _render(self, messages: Messages, **options: bool) -> str:
        return cast(str, self._tokenizer.apply_chat_template(messages, tokenize=False, **options))


def _messages(conversation: Conversation) -> Messages:
    messages = [{"role": "system", "content": conversation.system}]
    messages = messages if conversation.system else []
    turns = conversation.turns
    return messages + [{"role": t.role, "content": _JOIN.user_text(t)} for t in turns]
