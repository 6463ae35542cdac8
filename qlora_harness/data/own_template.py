"""The tokenizer's own chat template: --template tokenizer."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any, cast

from qlora_harness.data.conversation import Conversation
from qlora_harness.data.spelling import Exchange, Spelling
from qlora_harness.data.templates import Template
from qlora_harness.data.text_ids import Tokenizer
from qlora_harness.errors import DataError, SettingsError, first_line

_REMEDY = "Use another --template, such as chatml"
_JOIN = Template("", "", "")  # how a text and its context become one message


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
        template = tokenizer.chat_template
        self._marks_replies = "{% generation" in str(template) or "{%- generation" in str(template)

    def spell(self, conversations: Sequence[Conversation]) -> list[Spelling]:
        """Spells conversations; raises DataError for one that the template refuses or rewrites."""
        return [self._spell(conversation) for conversation in conversations]

    def _spell(self, conversation: Conversation) -> Spelling:
        messages = [{"role": "system", "content": conversation.system}]
        messages = messages if conversation.system else []
        start = len(messages)
        messages += [{"role": t.role, "content": _JOIN.user_text(t)} for t in conversation.turns]
        replies = range(start + 1, len(messages), 2)
        try:
            ids, spans = (self._marked if self._marks_replies else self._measured)(
                messages, replies
            )
        except Exception as error:
            if isinstance(error, DataError):
                raise self._refusal(conversation, error.problem) from None
            # Templates raise errors of their own, for example for a system prompt.
            if type(error).__module__.startswith("jinja2"):
                raise self._refusal(conversation, first_line(error)) from None
            raise
        if len(spans) != len(replies):
            reason = f"it marks {len(spans)} replies of {len(replies)}"
            raise self._refusal(conversation, reason)
        lead = self._bos if ids[: len(self._bos)] == self._bos else []
        exchanges, done = [], len(lead)
        for turn, (begin, end) in zip(conversation.turns[1::2], spans, strict=True):
            exchanges.append(Exchange(ids[done:begin], ids[begin:end], turn.supervised))
            done = end
        return Spelling(list(lead), exchanges)

    def _refusal(self, conversation: Conversation, reason: str) -> DataError:
        return DataError(
            f"{conversation.place}: the tokenizer's chat template can't hold this row: {reason}",
            _REMEDY,
        )

    def _marked(
        self, messages: list[dict[str, str]], _: range
    ) -> tuple[list[int], list[tuple[int, int]]]:
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

    def _measured(
        self, messages: list[dict[str, str]], replies: range
    ) -> tuple[list[int], list[tuple[int, int]]]:
        """Returns the ids, and the borders of the replies from renderings of fewer messages."""
        whole = self._render(messages)
        encoded = self._tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
        ids, starts = list(encoded["input_ids"]), [start for start, _ in encoded["offset_mapping"]]
        spans, token = [], 0
        for index in replies:
            prompt = self._render(messages[:index], add_generation_prompt=True)
            through = self._render(messages[: index + 1])
            if not whole.startswith(prompt) or not whole.startswith(through):
                raise DataError("earlier messages look different when later ones follow", _REMEDY)
            while token < len(ids) and starts[token] < len(prompt):
                token += 1
            begin = token
            while token < len(ids) and starts[token] < len(through):
                token += 1
            spans.append((begin, self._end_of_turn(ids, begin, token)))
        return ids, spans

    def _end_of_turn(self, ids: list[int], begin: int, end: int) -> int:
        """Leaves out white space after a last special token, such as ChatML's line break."""
        last = max((i for i in range(begin, end) if ids[i] in self._special), default=None)
        if last is None or self._tokenizer.decode(ids[last + 1 : end]).strip():
            return end
        return last + 1

    def _render(self, messages: list[dict[str, str]], **options: bool) -> str:
        return cast(str, self._tokenizer.apply_chat_template(messages, tokenize=False, **options))
