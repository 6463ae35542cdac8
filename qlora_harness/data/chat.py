"""Conversations to token ids and labels, turn by turn: no text is searched for afterwards."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from qlora_harness.data.conversation import Conversation, Turn
from qlora_harness.errors import SettingsError

IGNORE = -100


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any

    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, **options: Any) -> list[int]:
        """Returns the ids of a text."""
        ...

    def decode(self, ids: Sequence[int], **options: Any) -> str:
        """Returns the text of ids."""
        ...


@dataclass(frozen=True)
class Template:
    """The text around the turns of a conversation.

    An exchange reads: user_start, the user's text, assistant_start, reply_lead, the reply, and the
    end of turn, which is the tokenizer's EOS or `end_token`. `between` follows every end of turn
    but the last. Each of `control_tokens` must be one token of the tokenizer.
    """

    user_start: str
    assistant_start: str
    reply_lead: str
    end_token: str | None = None
    between: str = ""
    control_tokens: tuple[str, ...] = ()


TEMPLATES: dict[str, Template] = {
    # As in the text of timdettmers/openassistant-guanaco, which QLoRA trains on.
    "guanaco": Template("### Human: ", "### Assistant:", " "),
    "alpaca": Template("### Instruction:\n", "\n\n### Response:\n", ""),
    "chatml": Template(
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n",
        "",
        "<|im_end|>",
        "\n",
        ("<|im_start|>", "<|im_end|>"),
    ),
}


@dataclass(frozen=True)
class Example:
    """One conversation as the model sees it.

    `input_ids` begin with BOS if the tokenizer uses one. `labels` are the same ids where they are
    learned and -100 elsewhere. `turns` counts those that were not cut.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    turns: int = field(default=0, compare=False)

    @property
    def supervised_tokens(self) -> int:
        """How many tokens are learned; the first token of a row is never predicted."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass
class EncodedSet:
    """The examples of a split, how many were cut, and how many had no supervised token left."""

    examples: list[Example] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    turns: int = 0


def chat_template(name: str, tokenizer: Tokenizer) -> str:
    """Returns a template of `TEMPLATES` as a Jinja chat template for transformers.

    `apply_chat_template` then gives the ids of `ChatEncoder` and marks the replies as what is
    learned. The last user turn ends where the reply begins, so `add_generation_prompt` adds
    nothing. Two kinds of text differ: one that spells out a special token, which training reads as
    text, and, in alpaca and chatml, a reply that begins with a newline, which some tokenizers join
    with the template's.
    """
    template = TEMPLATES[name]
    user = [_quoted(template.user_start), "message['content']", _quoted(template.assistant_start)]
    end = _quoted(template.end_token) if template.end_token else "eos_token"
    reply = [_quoted(template.reply_lead), "message['content']", end]
    between = f"{{% if not loop.first %}}{{{{ {_quoted(template.between)} }}}}{{% endif %}}"
    return "".join(
        [
            "{{ bos_token }}" if leading_bos(tokenizer) else "",
            "{% for message in messages %}{% if message['role'] == 'user' %}",
            between if template.between else "",
            f"{{{{ {' + '.join(user)} }}}}",
            "{% elif message['role'] == 'assistant' %}",
            f"{{% generation %}}{{{{ {' + '.join(reply)} }}}}{{% endgeneration %}}",
            "{% else %}{{ raise_exception('this model was trained on user and assistant turns, ",
            "not on ' + message['role']) }}{% endif %}{% endfor %}",
        ]
    )


def _quoted(text: str) -> str:
    """Jinja's string escapes are Python's."""
    return json.dumps(text)


def leading_bos(tokenizer: Tokenizer) -> list[int]:
    """Returns the BOS that the tokenizer itself puts before a text: one id or none.

    LLaMA's does, Qwen's and SmolLM2's don't. Scoring leaves this to the tokenizer, so training must
    do the same.
    """
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer.encode("a"))[:1] == [bos] else []


class ChatEncoder:
    """Encodes conversations; nothing is added to the tokenizer's vocabulary.

    `max_length` is in tokens. `mask` "prompt" learns supervised turns and their end, "none"
    everything but BOS. Raises SettingsError if the template needs tokens that the tokenizer doesn't
    have, or the tokenizer has no EOS.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, max_length: int, mask: str) -> None:
        self._tokenizer = tokenizer
        self.template_name = template
        self.mask = mask
        self._template = TEMPLATES[template]
        self._max_length = max_length
        for token in self._template.control_tokens:
            if len(self._ids(token, control=True)) != 1:
                raise SettingsError(
                    f"--template {template} needs the token {token!r}, which this model's "
                    "tokenizer does not have",
                    "Choose --template guanaco; tokens are never added to a vocabulary",
                )
        if tokenizer.eos_token_id is None:
            raise SettingsError(
                "the tokenizer has no end-of-sequence token", "Use a model whose tokenizer has one"
            )
        end = self._template.end_token
        self._end = self._ids(end, control=True) if end else [tokenizer.eos_token_id]
        self.leading_bos = leading_bos(tokenizer)

    def encode_all(self, conversations: Iterable[Conversation]) -> EncodedSet:
        """Encodes conversations and counts what was cut and dropped."""
        encoded = EncodedSet()
        for conversation in conversations:
            example = self.encode(conversation)
            if example is None:
                encoded.dropped += 1
                continue
            encoded.examples.append(example)
            encoded.truncated += example.truncated
            encoded.turns += example.turns
        return encoded

    def encode(self, conversation: Conversation) -> Example | None:
        """Encodes one conversation; None if no supervised token is left.

        A conversation that is too long loses whole exchanges, first from the end down to its first
        supervised turn, then from the start up to it. If that one exchange is still too long, the
        reply is cut, and then has no end-of-turn token.
        """
        pairs = [
            self._encode_exchange(conversation.turns[i], conversation.turns[i + 1])
            for i in range(0, len(conversation.turns), 2)
        ]
        anchor = next((i for i, pair in enumerate(pairs) if pair.supervised), 0)
        between = self._ids(self._template.between) if self._template.between else []
        pairs = [
            _Exchange(between + pair.prompt if i else pair.prompt, pair.reply, pair.supervised)
            for i, pair in enumerate(pairs)
        ]
        total = len(self.leading_bos) + sum(len(pair) for pair in pairs)
        truncated = total > self._max_length
        first, last = 0, len(pairs)
        while total > self._max_length and last > anchor + 1:
            last -= 1
            total -= len(pairs[last])
        while total > self._max_length and first < anchor:
            total -= len(pairs[first])
            first += 1
        ids = list(self.leading_bos)
        labels = [IGNORE] * len(ids)
        for pair in pairs[first:last]:
            ids += pair.prompt + pair.reply
            learned = self.mask == "none"
            labels += pair.prompt if learned else [IGNORE] * len(pair.prompt)
            labels += pair.reply if learned or pair.supervised else [IGNORE] * len(pair.reply)
        if first:  # what stood between the exchanges would now stand at the start
            del ids[len(self.leading_bos) : len(self.leading_bos) + len(between)]
            del labels[len(self.leading_bos) : len(self.leading_bos) + len(between)]
        example = Example(
            ids[: self._max_length],
            labels[: self._max_length],
            truncated,
            turns=2 * (last - first),
        )
        return example if example.supervised_tokens else None

    def _encode_exchange(self, user: Turn, assistant: Turn) -> _Exchange:
        template = self._template
        head = self._with_control(template.user_start)
        # User text and the marker after it are one piece, as in the training text of QLoRA.
        if template.control_tokens:
            prompt = head + self._ids(user.text) + self._with_control(template.assistant_start)
        else:
            prompt = self._ids(template.user_start + user.text + template.assistant_start)
        reply = self._continuation(template.assistant_start, template.reply_lead + assistant.text)
        return _Exchange(prompt, reply + self._end, assistant.supervised)

    def _continuation(self, before: str, text: str) -> list[int]:
        """Returns the ids of a text as it follows another.

        A SentencePiece tokenizer puts a space before every text it sees alone, so the two are
        encoded together and split.
        """
        context = self._with_control(before)
        whole = self._with_control(before, text)
        if whole[: len(context)] == context:
            return whole[len(context) :]
        return self._ids(text)

    def _with_control(self, control: str, text: str = "") -> list[int]:
        """Recognises control tokens in `control` but not in `text`."""
        if not self._template.control_tokens:
            return self._ids(control + text)
        return self._ids(control, control=True) + (self._ids(text) if text else [])

    def _ids(self, text: str, control: bool = False) -> list[int]:
        # A "</s>" typed by a user stays text: it must not end the turn.
        return list(
            self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=not control)
        )


@dataclass(frozen=True)
class _Exchange:
    prompt: list[int]
    reply: list[int]
    supervised: bool

    def __len__(self) -> int:
        return len(self.prompt) + len(self.reply)


def fingerprint(examples: Iterable[Example]) -> str:
    """Returns "sha256:" and the hash of all token ids and labels, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(4, "little"))
        for value in (*example.input_ids, *example.labels):
            digest.update(value.to_bytes(4, "little", signed=True))
    return f"sha256:{digest.hexdigest()}"


def show(example: Example, tokenizer: Tokenizer) -> str:
    """Returns an example as text, with each learned span between ⟦ and ⟧."""
    pieces: list[str] = []
    start = 0
    for end in range(1, len(example.labels) + 1):
        at_border = end == len(example.labels) or (example.labels[end] == IGNORE) != (
            example.labels[start] == IGNORE
        )
        if at_border:
            text = tokenizer.decode(example.input_ids[start:end], skip_special_tokens=False)
            pieces.append(text if example.labels[start] == IGNORE else f"⟦{text}⟧")
            start = end
    return "".join(pieces)
