"""The forms of data: each is one function from a row to a Conversation, recognised by its columns.

To add one, write the function and list it in `FORMS`. It gets a `Row`, whose accessors raise
DataError for a value that can't be used, and raises DroppedRow for a row to leave out and count.
OASST's trees, which take many rows each, are in oasst1.py.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from qlora_harness.data import oasst1
from qlora_harness.data.conversation import Conversation, Turn
from qlora_harness.data.rows import DroppedRow, Row, check_text
from qlora_harness.errors import DataError, shown


def exchange(row: Row, prompt: str, reply: str, context: str = "") -> Conversation:
    """Returns a conversation of one prompt and its reply."""
    turns = (Turn("user", prompt, context=context), Turn("assistant", reply, supervised=True))
    return _checked(turns, "", row)


def alpaca(row: Row) -> Conversation:
    """An instruction, the input that it comes with or "", and the output."""
    return exchange(row, row.text("instruction"), row.text("output"), row.text("input"))


def dolly(row: Row) -> Conversation:
    """Alpaca with other names: instruction, context, response."""
    return exchange(row, row.text("instruction"), row.text("response"), row.text("context"))


def prompt_completion(row: Row) -> Conversation:
    """A prompt and its completion."""
    return exchange(row, row.text("prompt"), row.text("completion"))


def longform(row: Row) -> Conversation:
    """An input, which is the whole prompt, and its output."""
    return exchange(row, row.text("input"), row.text("output"))


def sharegpt(row: Row) -> Conversation:
    """A list `conversations` of messages with `from` and `value`; `system` may be a column."""
    messages = row.objects("conversations")
    turns = [_message(where, item, *_names(item)) for where, item in messages]
    return _conversation(row, turns, row.text("system"))


def messages(row: Row) -> Conversation:
    """OpenAI's list `messages` of messages with `role` and `content`."""
    turns = [_message(where, item, "role", "content") for where, item in row.objects("messages")]
    return _conversation(row, turns)


def guanaco(row: Row) -> Conversation:
    """A text of turns that begin with "### Human:" or "### Assistant:"."""
    parts = _MARKER.split(row.text("text"))
    if parts[0].strip():
        raise DroppedRow("text before the first turn")
    pairs = zip(parts[1::2], parts[2::2], strict=True)
    return _conversation(row, [(_ROLES[who.lower()], text.strip()) for who, text in pairs])


def plain_text(row: Row) -> Conversation:
    """A text without turns, all of which is learned."""
    text = row.text("text")
    return _checked((Turn("text", text, supervised=True),), "", row)


@dataclass(frozen=True)
class Form:
    """A form: its rows have `columns` and may have `optional` ones, and `read` reads one of them.

    `read` is None for trees, which take many rows. `begins` is how the text of the first row
    begins, where columns alone don't tell.
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
        return self.columns <= row.keys() and str(row.get("text")).startswith(self.begins or "")

    def is_narrower(self, other: Form) -> bool:
        """Returns whether this form, where both match, is the one meant."""
        if self.all_columns == other.all_columns:
            return len(self.begins) > len(other.begins)
        return self.all_columns > other.all_columns


_MARKER = re.compile(r"### (Human|Assistant):")
_ROLES = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "assistant": "assistant",
    "system": "system",
    "developer": "system",
}
# Columns that belong to a conversation wherever they are; others, such as an id, don't.
TURN_COLUMNS = frozenset({"system", "system_prompt", "history"})
_TOOL_ROLES = ("tool", "function", "function_call", "observation", "ipython")

FORMS: dict[str, Form] = {
    form.name: form
    for form in (
        Form("oasst", oasst1.REQUIRED, None, oasst1.FIELDS),
        # tatsu-lab/alpaca also has the three columns in one, as `text`.
        Form("alpaca", frozenset({"instruction", "output"}), alpaca, frozenset({"input", "text"})),
        Form("dolly", frozenset({"instruction", "response"}), dolly, frozenset({"context"})),
        Form("sharegpt", frozenset({"conversations"}), sharegpt, frozenset({"system"})),
        Form("messages", frozenset({"messages"}), messages),
        Form("prompt-completion", frozenset({"prompt", "completion"}), prompt_completion),
        Form("longform", frozenset({"input", "output"}), longform),
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
    if not chosen:
        raise DataError(f"{place}: no form has the fields {columns}", _known_forms())
    return chosen[0]


def check_columns(row: Row, form: Form) -> None:
    """Raises DataError if a row lacks a column of the form, or has turns in one that it has not.

    A null is no missing column, and holds no turns.
    """
    if missing := sorted(form.columns - row.values.keys()):
        raise DataError(
            f"{row.place}: field '{missing[0]}' is missing, which --format {form.name} needs; the "
            f"fields are {_columns(row)}",
            "Name another --format, or rename the columns; all rows have one form",
        )
    for key in sorted(TURN_COLUMNS - form.all_columns):
        if row.values.get(key):
            raise DataError(
                f"{row.place}: field '{key}' is {shown(row.values[key])}, and --format {form.name} "
                "has no place for it",
                "Write the rows as --format messages, or remove the column",
            )


def _columns(row: Row) -> str:
    return ", ".join(shown(str(column), 30)[1:-1] for column in list(row.values)[:12]) or "none"


def _known_forms() -> str:
    forms = (f"{form.name} ({', '.join(sorted(form.columns))})" for form in FORMS.values())
    return f"The forms are {', '.join(forms)}"


def _names(item: Mapping[str, Any]) -> tuple[str, str]:
    """Returns the keys of a ShareGPT message; some data sets of this form use OpenAI's."""
    return ("role", "content") if "role" in item and "from" not in item else ("from", "value")


def _message(where: str, item: Mapping[str, Any], role_key: str, text_key: str) -> tuple[str, str]:
    """Returns the role, as user, assistant or system, and the text of a message."""
    role = item.get(role_key)
    name = role.lower() if isinstance(role, str) else ""
    calls = [key for key in ("tool_calls", "function_call") if item.get(key)]
    if name in _TOOL_ROLES or calls:
        key = calls[0] if calls else role_key
        raise DataError(
            f"{where}.{key} is {shown(item[key])}: no template holds tool turns",
            "Remove the rows with tool turns",
        )
    if item.get("weight") not in (None, 1):  # of OpenAI's fine-tuning: 0 is not learned
        raise DataError(
            f"{where}.weight is {shown(item['weight'])}: every reply is learned",
            "Remove the key, or the row",
        )
    if name not in _ROLES:
        known = "human, gpt or system" if role_key == "from" else "user, assistant or system"
        raise DataError(f"{where}.{role_key} is {shown(role)}", f"It must be {known}")
    text = item.get(text_key)
    if not isinstance(text, str):
        raise DataError(f"{where}.{text_key} is {shown(text)}", "It must be a text")
    return _ROLES[name], check_text(text, f"{where}.{text_key}")


def _conversation(row: Row, messages: list[tuple[str, str]], system: str = "") -> Conversation:
    """Builds a conversation; a user's turn at its end, which has no reply, is left out."""
    if messages and messages[0][0] == "system":
        if system not in ("", messages[0][1]):
            raise DataError(
                f"{row.place}: two system prompts, {shown(system)} and {shown(messages[0][1])}",
                "Remove the column or the message",
            )
        system = messages[0][1]
        messages = messages[1:]
    is_open = bool(messages) and messages[-1][0] == "user"
    messages = messages[:-1] if is_open else messages
    turns = tuple(
        Turn("assistant", text, supervised=True) if role == "assistant" else Turn("user", text)
        for role, text in messages
    )
    expected = ["user", "assistant"] * (len(messages) // 2)
    if [role for role, _ in messages] != expected:
        raise DroppedRow("role order")
    conversation = _checked(turns, system, row)
    return replace(conversation, resolved="user turn cut from the end" if is_open else "")


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
