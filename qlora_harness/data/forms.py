"""The forms of data: each is one function from a row to a Conversation, recognised by its columns.

To add one, write the function and list it in `FORMS`. It gets a `Row`, whose accessors raise
DataError for a value that can't be used, and raises DroppedRow for a row to leave out and count.
OASST's trees, which take many rows each, are in oasst1.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from qlora_harness.data import oasst1
from qlora_harness.data.conversation import Conversation, Turn
from qlora_harness.data.rows import DroppedRow, Row, check_text
from qlora_harness.errors import DataError, shown


def exchange(row: Row, prompt: str, reply: str, context: str = "") -> Conversation:
    """Returns a conversation of one prompt and its reply, after what its row has before them."""
    earlier = [turn for pair in _history(row) for turn in _turns(*pair)]
    return _checked((*earlier, *_turns(prompt, reply, context)), _system(row), row)


def _turns(prompt: str, reply: str, context: str = "") -> tuple[Turn, Turn]:
    return Turn("user", prompt, context=context), Turn("assistant", reply, supervised=True)


def pair(prompt: str, reply: str, context: str = "") -> Callable[[Row], Conversation]:
    """Returns a reader of rows with a prompt, its reply and perhaps what the prompt comes with."""

    def read(row: Row) -> Conversation:
        return exchange(
            row, row.text(prompt), row.text(reply), row.text(context) if context else ""
        )

    return read


def prompt_completion(row: Row) -> Conversation:
    """A prompt and its completion, as texts or, as in TRL, as messages.

    A completion that people rejected, of KTO's data, is left out.
    """
    if str(row.values.get("label")).lower() == "false":
        raise DroppedRow("label false")
    if not isinstance(row.values.get("prompt"), list):
        return exchange(row, row.text("prompt"), row.text("completion"))
    prompt = [said._replace(learned=False) for said in _messages(row, "prompt")]
    return _conversation(row, prompt + _messages(row, "completion"))


def chat(column: str) -> Callable[[Row], Conversation]:
    """Returns a reader of rows with a list of messages: ShareGPT's, OpenAI's, or texts in turn."""

    def read(row: Row) -> Conversation:
        return _conversation(row, _messages(row, column))

    return read


def guanaco(row: Row) -> Conversation:
    """A text of turns that begin with "### Human:" or "### Assistant:"."""
    parts = _MARKER.split(row.text("text"))
    if parts[0].strip():
        raise DroppedRow("text before the first turn")
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return _conversation(row, [_Said(_ROLES[who.lower()], text.strip()) for who, text in pairs])


def plain_text(row: Row) -> Conversation:
    """A text without turns, all of which is learned."""
    text = row.text("text")
    return _checked((Turn("text", text, supervised=True),), "", row)


@dataclass(frozen=True)
class Form:
    """A form: its rows have `columns` and may have `optional` ones, and `read` reads one of them.

    `read` is None for OASST's trees. `begins` is how the text of the first row begins, where
    columns alone don't tell.
    """

    name: str
    columns: frozenset[str]
    read: Callable[[Row], Conversation] | None
    optional: frozenset[str] = frozenset()
    begins: str = ""

    @property
    def all_columns(self) -> frozenset[str]:
        """Every column that is read."""
        return self.columns | self.optional

    def matches(self, row: Mapping[str, Any]) -> bool:
        """Returns whether a row has this form."""
        return self.columns <= row.keys() and str(row.get("text")).lstrip().startswith(self.begins)

    def is_narrower(self, other: Form) -> bool:
        """Returns whether this form, where both match, is the one meant."""
        if self.all_columns == other.all_columns:
            return len(self.begins) > len(other.begins)
        return self.all_columns > other.all_columns


_MARKER = re.compile(r"### (Human|Assistant):")
_ROLES = {
    **dict.fromkeys(("user", "human", "prompter"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant"),
    **dict.fromkeys(("system", "developer"), "system"),
}
# Columns that belong to a conversation wherever they are; others, such as an id, don't.
_SYSTEM = ("system", "system_prompt")
_BEFORE = frozenset({*_SYSTEM, "history"})
TURN_COLUMNS = _BEFORE | {"tools"}
PREFERENCE = frozenset({"chosen", "rejected"})
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")
_PAIRS = {
    "alpaca": ("instruction", "output", "input"),
    "dolly": ("instruction", "response", "context"),
    "longform": ("input", "output"),
    "prompt-response": ("prompt", "response"),
    "question-answer": ("question", "answer", "context"),
    "question-response": ("question", "response"),
    "query-response": ("query", "response"),
    "inputs-targets": ("inputs", "targets"),
}


def _pair_form(name: str, columns: tuple[str, ...]) -> Form:
    # tatsu-lab/alpaca also has its columns in one, as `text`.
    optional = {*columns, *_BEFORE, *(("text",) if name == "alpaca" else ())}
    return Form(name, frozenset(columns[:2]), pair(*columns), frozenset(optional))


FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("oasst", oasst1.REQUIRED, None, oasst1.FIELDS),
        Form("oasst-trees", frozenset({"message_tree_id", "prompt"}), None),
        *(_pair_form(name, columns) for name, columns in _PAIRS.items()),
        Form(
            "prompt-completion",
            frozenset({"prompt", "completion"}),
            prompt_completion,
            _BEFORE | {"label"},
        ),
        Form("sharegpt", frozenset({"conversations"}), chat("conversations"), frozenset(_SYSTEM)),
        Form("messages", frozenset({"messages"}), chat("messages"), frozenset(_SYSTEM)),
        Form("conversation", frozenset({"conversation"}), chat("conversation"), frozenset(_SYSTEM)),
        Form("guanaco", frozenset({"text"}), guanaco, begins="### Human:"),
        Form("text", frozenset({"text"}), plain_text),
    )
}


def recognise(first: Row, name: str = "auto") -> Form:
    """Returns the form of a data set by its first row, or the named one.

    Raises DataError if no form has these columns, two have, or the named one has not.
    """
    row, place, columns = first.values, first.place, _columns(first)
    if name != "auto":
        check_columns(first, FORMS[name])
        return FORMS[name]
    matching = [form for form in FORMS.values() if form.matches(row)]
    chosen = [f for f in matching if not any(other.is_narrower(f) for other in matching)]
    if len(chosen) > 1:
        names = " and ".join(form.name for form in chosen)
        raise DataError(
            f"{place}: the fields {columns} fit two forms, {names}", "Choose one with --format"
        )
    if not chosen and row.keys() >= PREFERENCE:
        raise DataError(
            f"{place}: 'chosen' and 'rejected' are preferences, and this trains on replies",
            "Write the chosen replies as prompt and completion, or as messages",
        )
    if not chosen:
        raise DataError(
            f"{place}: no form has the fields {columns}",
            "Rename them, such as to prompt and completion, or messages; docs/data.md lists all",
        )
    return chosen[0]


def check_columns(row: Row, form: Form) -> None:
    """Raises DataError if a row lacks a column of the form, or has turns in one of another form.

    A column of nulls isn't missing, and holds no turns.
    """
    if missing := sorted(form.columns - row.values.keys()):
        raise DataError(
            f"{row.place}: field '{missing[0]}' is missing, which --format {form.name} needs; the "
            f"fields are {_columns(row)}",
            "Name another --format, or rename the columns; all rows have one form",
        )
    for key in sorted(TURN_COLUMNS - form.all_columns):
        if row.values.get(key) not in (None, "", "[]", [], {}):
            raise DataError(
                f"{row.place}: field '{key}' is {shown(row.values[key])}, and --format {form.name} "
                "has no place for it",
                "Put it into the turns, or remove the column",
            )


def _columns(row: Row) -> str:
    return ", ".join(shown(str(column), 30)[1:-1] for column in list(row.values)[:12]) or "none"


class _Said(NamedTuple):
    """A message: `role` is user, assistant or system, and a reply is `learned` or not."""

    role: str
    text: str
    learned: bool = True


def _messages(row: Row, column: str) -> list[_Said]:
    """Returns a list of messages; texts without roles, as in LIMA, alternate from the user's."""
    items = row.values.get(column)
    if isinstance(items, list) and items and isinstance(items[0], str):
        texts = [check_text(item, f"{row.place}: {column}[{n}]") for n, item in enumerate(items)]
        return [_Said(("user", "assistant")[n % 2], text) for n, text in enumerate(texts)]
    return [_message(where, item) for where, item in row.objects(column)]


def _message(where: str, item: Mapping[str, Any]) -> _Said:
    """Reads a message of ShareGPT (from, value) or OpenAI (role, content)."""
    # In Arrow, every message has the keys of all.
    role_key = "role" if item.get("from") is None and "role" in item else "from"
    text_key = "content" if item.get("value") is None and "content" in item else "value"
    if role_key not in item or text_key not in item:
        raise DataError(
            f"{where} has the keys {shown(list(item))}",
            "A message has role and content, or from and value",
        )
    role = item[role_key]
    name = role.lower() if isinstance(role, str) else ""
    calls = [key for key in ("tool_calls", "function_call") if item.get(key)]
    if name in _TOOL_ROLES or calls:
        key = calls[0] if calls else role_key
        raise DataError(
            f"{where}.{key} is {shown(item[key])}: no template holds tool turns",
            "Remove the rows with tool turns",
        )
    if name not in _ROLES:
        known = "human, gpt or system" if role_key == "from" else "user, assistant or system"
        raise DataError(f"{where}.{role_key} is {shown(role)}", f"It must be {known}")
    text = _text_of(item[text_key], f"{where}.{text_key}")
    return _Said(_ROLES[name], text, _is_learned(where, item))


def _is_learned(where: str, item: Mapping[str, Any]) -> bool:
    """Reads OpenAI's `weight` of a reply, and `train`, which means the same."""
    weight = item.get("weight")
    if weight not in (None, 0, 1):
        raise DataError(f"{where}.weight is {shown(weight)}", "It must be 0 (not learned) or 1")
    return weight != 0 and item.get("train") is not False


def _text_of(content: object, where: str) -> str:
    """Returns the text of a message, whose content may be a list of parts."""
    if not isinstance(content, list):
        return check_text(content, where)
    return "".join(_part(part, f"{where}[{number}]") for number, part in enumerate(content))


def _part(part: object, where: str) -> str:
    if not isinstance(part, Mapping) or part.get("type", "text") != "text":
        raise DataError(f"{where} is {shown(part)}", "Each part must be a text")
    return check_text(part.get("text"), where)


def _history(row: Row) -> Iterator[tuple[str, str]]:
    """Yields the exchanges before a pair: [[prompt, reply], …] in LLaMA-Factory's Alpaca rows."""
    pairs = row.values.get("history") or []
    for texts in pairs if isinstance(pairs, list) else [pairs]:
        where = f"{row.place}: field 'history'"
        if not isinstance(texts, list) or len(texts) != 2:
            raise DataError(f"{where} has {shown(texts)}", "It must be [[prompt, reply], …]")
        yield check_text(texts[0], where), check_text(texts[1], where)


def _system(row: Row) -> str:
    return next((text for key in _SYSTEM if (text := row.text(key))), "")


def _conversation(row: Row, messages: list[_Said]) -> Conversation:
    """Builds a conversation that begins with a user's turn and ends with a reply.

    A reply at its start, which answers nothing, and a user's turn at its end are cut and counted.
    """
    system = _system(row)
    if messages and messages[0].role == "system":
        if system not in ("", messages[0].text):
            raise DataError(
                f"{row.place}: two system prompts, {shown(system)} and {shown(messages[0].text)}",
                "Remove the column or the message",
            )
        system = messages[0].text
        messages = messages[1:]
    cut = []
    if messages and messages[0].role == "assistant":
        cut.append("reply cut from the start")
        messages = messages[1:]
    if messages and messages[-1].role == "user":
        cut.append("user turn cut from the end")
        messages = messages[:-1]
    turns = tuple(
        Turn("assistant", text, supervised=learned) if role == "assistant" else Turn("user", text)
        for role, text, learned in messages
    )
    expected = ["user", "assistant"] * (len(messages) // 2)
    if [said.role for said in messages] != expected:
        raise DroppedRow("role order")
    return replace(_checked(turns, system, row), resolved=" and ".join(cut))


_BLANK = {"user": "empty prompt", "assistant": "no reply", "text": "empty text"}


def _checked(turns: tuple[Turn, ...], system: str, row: Row) -> Conversation:
    """Returns a conversation that can be learned; raises DroppedRow if a turn is blank.

    Conversations that begin with the same prompt are one tree: training never sees the prompts
    that it is evaluated on.
    """
    if not turns:
        raise DroppedRow("no reply")
    for turn in turns:
        if not turn.text.strip() and not turn.context.strip():
            raise DroppedRow(_BLANK[turn.role])
    prompt = "\0".join((system, turns[0].text, turns[0].context))
    tree = hashlib.blake2b(prompt.encode(), digest_size=8).hexdigest()
    return Conversation(tree, turns, system, row.place)
