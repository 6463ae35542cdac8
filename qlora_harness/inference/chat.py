"""`qlora-harness chat`: a conversation with a trained adapter, in a terminal or from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import TextStreamer

from qlora_harness.data.rows import check_text
from qlora_harness.errors import DataError, SettingsError, printable
from qlora_harness.inference.chat_model import ChatModel, Message, Sampling, choose_adapter

_HELP = "/reset begins a new conversation, /exit ends."


class _ReplyStreamer(TextStreamer):
    """Prints a reply as it grows, without leading space, up to the marker of the next turn."""

    def __init__(self, tokenizer: Any, marker: str) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self._marker = marker
        self._pending = ""
        self._begun = False

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Prints the part of the text so far that belongs to the reply."""
        self._pending += text
        if not self._begun:
            self._pending = self._pending.lstrip()
        before, marker, _ = self._pending.partition(self._marker or "\0")
        held = 0  # characters that may begin the marker
        if not stream_end and not marker:
            ends = range(min(len(before), len(self._marker)), 0, -1)
            held = next((n for n in ends if self._marker.startswith(before[-n:])), 0)
        shown = before[: len(before) - held]
        self._begun = self._begun or bool(shown)
        self._pending = "" if marker else before[len(before) - held :]
        print(printable(shown, keep="\n\t"), end="\n" if stream_end else "", flush=True)


def chat(run: Path, sampling: Sampling, *, seed: int) -> None:
    """Answers the lines of standard input, each with the conversation before it."""
    model = ChatModel(choose_adapter(run))
    if model.is_plain_text:
        raise SettingsError(
            f"{run} was trained on plain text, which has no turns", "Use qlora-harness generate"
        )
    model.load()
    torch.manual_seed(seed)
    print(f"{printable(model.title)}. {_HELP}")
    messages: list[Message] = []
    for line in _lines():
        if line == "/exit":
            return
        if line == "/reset":
            messages = []
        elif line.startswith("/"):
            print(_HELP)
        elif line:
            messages = _answered(model, [*messages, {"role": "user", "content": line}], sampling)


def _lines() -> Iterator[str]:
    if hasattr(sys.stdin, "reconfigure"):  # bytes that aren't UTF-8 cost a turn, not the chat
        sys.stdin.reconfigure(errors="surrogateescape")
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            yield input(prompt).strip()
        except EOFError:
            return


def _answered(model: ChatModel, messages: list[Message], sampling: Sampling) -> list[Message]:
    """Prints the reply and returns the conversation, without the turn if that can't be answered."""
    try:
        check_text(messages[-1]["content"], "the turn")
        ids = model.encode(messages)
        model.check_length(ids, sampling, "the conversation")
    except DataError as error:
        print(f"{error} {_HELP}")
        return messages[:-1]
    streamer = _ReplyStreamer(model.tokenizer, model.ends[1])
    [reply] = model.reply([ids], sampling, streamer)
    return [*messages, {"role": "assistant", "content": reply}]
