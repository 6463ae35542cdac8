"""The tokenizer's own chat template: --template tokenizer."""

from __future__ import annotations

import re
from bisect import bisect_left
from collections.abc import Callable, Sequence
from itertools import groupby
from typing import Any, TypeVar, cast

from qlora_harness.data.conversation import Conversation
from qlora_harness.data.spelling import Exchange, Spelling
from qlora_harness.data.templates import Template
from qlora_harness.data.text_ids import Tokenizer
from qlora_harness.errors import DataError, SettingsError, first_line

_REMEDY = "Use another --template, such as chatml"
_GENERATION = re.compile(r"\{%[-+]?\s*generation\b")  # as spaced as Jinja permits
_JOIN = Template("", "", "")  # how a text and its context become one message


Spans = list[tuple[int, int]]
Offsets = Sequence[tuple[int, int]]
Rendered = TypeVar("Rendered", str, list[int])


class OwnTemplate:
    """Spells conversations as `apply_chat_template` does.

    A reply is what the template's {% generation %} encloses. Without that, it is what the template
    adds to the rendering of the messages before it with `add_generation_prompt`, up to its last
    special token. What follows belongs to the next prompt. Raises SettingsError if the tokenizer
    has no template.
    """

    def __init__(self, tokenizer: Tokenizer, leading_bos: list[int]) -> None:
        if not tokenizer.chat_template:
            raise SettingsError(
                "--template tokenizer: this model's tokenizer has no chat template", _REMEDY
            )
        self._tokenizer = cast(Any, tokenizer)
        self._bos = leading_bos
        self._special = frozenset(self._tokenizer.all_special_ids)
        self._marks_replies = _GENERATION.search(str(tokenizer.chat_template)) is not None

    def spell(self, conversations: Sequence[Conversation]) -> list[Spelling]:
        """Spells conversations; raises DataError for one that the template refuses or rewrites."""
        if self._marks_replies:
            marked = [self._checked(c, self._marked) for c in conversations]
            return [self._spelling(c, *pair) for c, pair in zip(conversations, marked, strict=True)]
        rendered = [self._checked(c, self._measured) for c in conversations]
        encoded = self._tokenizer(
            [text for text, _ in rendered],
            add_special_tokens=False,
            return_attention_mask=False,
            return_offsets_mapping=True,
        )
        tokens = zip(encoded["input_ids"], encoded["offset_mapping"], strict=True)
        return [
            self._spelling(conversation, ids, self._token_spans(ids, offsets, spans))
            for conversation, (_, spans), (ids, offsets) in zip(
                conversations, rendered, tokens, strict=True
            )
        ]

    def _spelling(self, conversation: Conversation, ids: list[int], spans: Spans) -> Spelling:
        lead = self._bos if ids[: len(self._bos)] == self._bos else []
        exchanges, done = [], len(lead)
        for turn, (begin, end) in zip(conversation.turns[1::2], spans, strict=True):
            exchanges.append(Exchange(ids[done:begin], ids[begin:end], turn.supervised))
            done = end
        return Spelling(list(lead), exchanges)

    def _checked(
        self,
        conversation: Conversation,
        render: Callable[[list[dict[str, str]], range], tuple[Rendered, Spans]],
    ) -> tuple[Rendered, Spans]:
        """Renders a conversation; raises DataError, with its place, if the template can't."""
        messages = [{"role": "system", "content": conversation.system}]
        messages = messages if conversation.system else []
        start = len(messages)
        messages += [{"role": t.role, "content": _JOIN.user_text(t)} for t in conversation.turns]
        replies = range(start + 1, len(messages), 2)
        try:
            rendered, spans = render(messages, replies)
        except DataError as error:
            raise self._refusal(conversation, error.problem) from None
        except Exception as error:  # noqa: BLE001
            # Templates raise errors of their own, for example for a system prompt, and Python's.
            raise self._refusal(conversation, first_line(error)) from None
        if len(spans) != len(replies):
            reason = f"it marks {len(spans)} replies of {len(replies)}"
            raise self._refusal(conversation, reason)
        return rendered, spans

    def _refusal(self, conversation: Conversation, reason: str) -> DataError:
        return DataError(
            f"{conversation.place}: the tokenizer's chat template can't hold this row: {reason}",
            _REMEDY,
        )

    def _marked(self, messages: list[dict[str, str]], _: range) -> tuple[list[int], Spans]:
        """Returns the ids, and the borders of the replies as the template marks them."""
        applied = self._tokenizer.apply_chat_template(
            messages, return_dict=True, return_assistant_tokens_mask=True
        )
        spans, at = [], 0
        for learned, run in groupby(applied["assistant_masks"]):
            length = len(list(run))
            if learned:
                spans.append((at, at + length))
            at += length
        return list(applied["input_ids"]), spans

    def _measured(self, messages: list[dict[str, str]], replies: range) -> tuple[str, Spans]:
        """Returns the text, and the borders of the replies from renderings of fewer messages."""
        whole = self._render(messages)
        spans = []
        for index in replies:
            prompt = self._render(messages[:index], add_generation_prompt=True)
            is_last = index + 1 == len(messages)
            through = whole if is_last else self._render(messages[: index + 1])
            if not whole.startswith(prompt) or not whole.startswith(through):
                raise DataError("earlier messages look different when later ones follow", _REMEDY)
            spans.append((len(prompt), len(through)))
        return whole, spans

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
        last = max((i for i in range(begin, end) if ids[i] in self._special), default=None)
        if last is None or self._tokenizer.decode(ids[last + 1 : end]).strip():
            return end
        return last + 1

    def _render(self, messages: list[dict[str, str]], **options: bool) -> str:
        return cast(str, self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
