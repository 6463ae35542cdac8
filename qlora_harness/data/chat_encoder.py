"""Encodes conversations turn by turn, so that no reply has to be searched for in the tokens."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, Protocol

from qlora_harness.data.conversation import Conversation, Turn
from qlora_harness.errors import SettingsError

IGNORE = -100


class Tokenizer(Protocol):
    """The part of a transformers tokenizer that is used here."""

    chat_template: Any
    bos_token_id: int | None
    eos_token_id: int | None

    def encode(self, text: str, /, **options: Any) -> list[int]: ...  # noqa: D102

    def decode(self, token_ids: Any, skip_special_tokens: bool = ...) -> Any: ...  # noqa: D102


@dataclass(frozen=True)
class Template:
    """The text around the turns of a conversation.

    An exchange is user_start, the user's text, assistant_start, reply_lead, the reply and the end
    of turn: `end_token`, or the tokenizer's EOS. `between` separates exchanges. Each of
    `control_tokens` must be a single token.
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

    `input_ids` begin with BOS if the tokenizer uses one. `labels` are the ids that are learned,
    and -100 elsewhere. `turns` counts the turns that were not cut.
    """

    input_ids: list[int]
    labels: list[int]
    truncated: bool = False
    turns: int = field(default=0, compare=False)

    @property
    def supervised_tokens(self) -> int:
        """The number of learned tokens; nothing predicts the first token of a row."""
        return sum(label != IGNORE for label in self.labels[1:])


@dataclass
class EncodedSet:
    """The examples of a split; `dropped` conversations had no supervised token left."""

    examples: list[Example] = field(default_factory=list)
    truncated: int = 0
    dropped: int = 0
    turns: int = 0


def chat_template(name: str, tokenizer: Tokenizer) -> str:
    """Returns a template of `TEMPLATES` in Jinja, for `apply_chat_template`.

    It gives the ids and the learned spans of `ChatEncoder`. A user turn already ends with
    assistant_start, so `add_generation_prompt` adds nothing. Ids differ in two cases: a message
    spells out a special token, which training reads as text; or, in alpaca and chatml, a reply
    begins with a newline, which some tokenizers merge with the template's.
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


_quoted = json.dumps  # Jinja reads JSON's strings


def leading_bos(tokenizer: Tokenizer) -> list[int]:
    """Returns [BOS] if the tokenizer itself puts it before a text, else [].

    LLaMA's does, Qwen's and SmolLM2's don't. Scoring follows the tokenizer, so training must too.
    """
    bos = tokenizer.bos_token_id
    return [bos] if bos is not None and list(tokenizer.encode("a"))[:1] == [bos] else []


class ChatEncoder:
    """Encodes conversations without adding to the tokenizer's vocabulary.

    `max_length` is in tokens. With `mask` "prompt" the supervised turns and their ends are learned,
    with "none" everything but BOS. Raises SettingsError if the tokenizer lacks EOS or a token of
    the template.
    """

    def __init__(self, tokenizer: Tokenizer, template: str, max_length: int, mask: str) -> None:
        self._tokenizer = tokenizer
        self._learn_all = mask == "none"
        self._template = TEMPLATES[template]
        self._max_length = max_length
        for token in self._template.control_tokens:
            if len(self._ids(token, control=True)) != 1:
                raise SettingsError(
                    f"--template {template} needs the token {token!r}, which this model's "
                    "tokenizer does not have",
                    "Use --template guanaco; tokens are never added to the vocabulary",
                )
        if tokenizer.eos_token_id is None:
            raise SettingsError(
                "the tokenizer has no end-of-sequence token", "Use a model whose tokenizer has one"
            )
        end = self._template.end_token
        self._end = self._ids(end, control=True) if end else [tokenizer.eos_token_id]
        self.leading_bos = leading_bos(tokenizer)

    def encode_all(self, conversations: Iterable[Conversation]) -> EncodedSet:
        """Encodes the conversations of a split."""
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

        One that is too long loses whole exchanges: from the end back to its first supervised turn,
        then from the start up to it. If that exchange alone is too long, its reply is cut and has
        no end of turn.
        """
        turns = conversation.turns
        between = self._ids(self._template.between) if self._template.between else []
        exchanges = [
            self._encode_exchange(user, assistant, between if number else [])
            for number, (user, assistant) in enumerate(zip(turns[::2], turns[1::2], strict=True))
        ]
        anchor = next((i for i, exchange in enumerate(exchanges) if exchange.supervised), 0)
        total = len(self.leading_bos) + sum(map(len, exchanges))
        truncated = total > self._max_length
        first, last = 0, len(exchanges)
        while total > self._max_length and last > anchor + 1:
            last -= 1
            total -= len(exchanges[last])
        while total > self._max_length and first < anchor:
            total -= len(exchanges[first])
            first += 1
        ids = list(self.leading_bos)
        labels = [IGNORE] * len(ids)

        for number, exchange in enumerate(exchanges[first:last]):
            # An exchange that has become the first loses the separator before it.
            prompt = exchange.prompt[len(between) if first and number == 0 else 0 :]
            ids += prompt + exchange.reply
            labels += prompt if self._learn_all else [IGNORE] * len(prompt)
            learn_reply = self._learn_all or exchange.supervised
            labels += exchange.reply if learn_reply else [IGNORE] * len(exchange.reply)
        example = Example(
            ids[: self._max_length],
            labels[: self._max_length],
            truncated,
            turns=2 * (last - first),
        )
        return example if example.supervised_tokens else None

    def _encode_exchange(self, user: Turn, assistant: Turn, between: list[int]) -> _Exchange:
        template = self._template
        if template.control_tokens:
            prompt = self._with_control(template.user_start) + self._ids(user.text)
            prompt += self._with_control(template.assistant_start)
        else:
            # The markers are tokenized together with the user's text, as in QLoRA's training text.
            prompt = self._ids(template.user_start + user.text + template.assistant_start)
        reply = self._continuation(template.assistant_start, template.reply_lead + assistant.text)
        return _Exchange(between + prompt, reply + self._end, assistant.supervised)

    def _continuation(self, before: str, text: str) -> list[int]:
        """Returns the ids of `text` after `before`.

        SentencePiece puts a space before a text on its own, so both are encoded together and split.
        """
        context = self._with_control(before)
        whole = self._with_control(before, text)
        return whole[len(context) :] if whole[: len(context)] == context else self._ids(text)

    def _with_control(self, control: str, text: str = "") -> list[int]:
        """Recognises control tokens in `control` but not in `text`."""
        if not self._template.control_tokens:
            return self._ids(control + text)
        return self._ids(control, control=True) + (self._ids(text) if text else [])

    def _ids(self, text: str, control: bool = False) -> list[int]:
        # A "</s>" that a user typed must stay text and not end the turn.
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
    """Returns "sha256:" and a hash of all token ids and labels, in order."""
    digest = hashlib.sha256()
    for example in examples:
        digest.update(len(example.input_ids).to_bytes(4, "little"))
        for value in (*example.input_ids, *example.labels):
            digest.update(value.to_bytes(4, "little", signed=True))
    return f"sha256:{digest.hexdigest()}"


def show(example: Example, tokenizer: Tokenizer) -> str:
    """Returns an example as text, with each learned span between ⟦ and ⟧."""
    pieces = []
    pairs = zip(example.input_ids, example.labels, strict=True)
    for learned, span in groupby(pairs, lambda pair: pair[1] != IGNORE):
        text = tokenizer.decode([token for token, _ in span], skip_special_tokens=False)
        pieces.append(f"⟦{text}⟧" if learned else text)
    return "".join(pieces)
