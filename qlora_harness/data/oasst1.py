"""Builds conversations from rows in the schema of OpenAssistant/oasst1.

https://huggingface.co/datasets/OpenAssistant/oasst1: one row per message, `parent_id` null at the
root of a tree, `rank` 0 for the best of several siblings and null for an only child.
"""

from __future__ import annotations

import hashlib
import math
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timezone
from decimal import Decimal
from typing import Any

from dateutil import parser

from qlora_harness.data.conversation import Conversation, Corpus, Turn
from qlora_harness.data.rows import Row, check_text
from qlora_harness.errors import DataError, shown

REQUIRED = frozenset({"message_id", "text", "role"})
FIELDS = REQUIRED | {"parent_id", "lang", "rank", "created_date", "deleted", "review_result"}
_ROLES = {"prompter": "user", "assistant": "assistant"}
_SCHEMA_REMEDY = (
    "Rows need OASST1's columns: message_id, parent_id, text, role, and lang unless --languages all"
)
_TRUTH_WORDS = {"true": True, "yes": True, "false": False, "no": False}

_Row = Mapping[str, Any]


@dataclass(slots=True, eq=False)
class _Message:
    """What is needed of a row; there may be millions."""

    identity: str
    parent: str | None
    role: str
    text: str
    rank: float | None
    created: Any


def check_row(row: _Row, place: str) -> _Row:
    """Returns the schema's fields of a row; raises DataError, with `place`, if one is unusable.

    An absent field, None, NaN and "" all become None. Numbers and booleans may be strings, as in
    csv. An unreadable `rank` only costs the order of siblings: it becomes None, and `unreadable`
    names it.
    """
    for name in ("message_id", "text", "role"):
        if name not in row:
            raise DataError(f"{place}: field '{name}' is missing", _SCHEMA_REMEDY)
    checked: dict[str, Any] = {
        "message_id": _parse_id(row, "message_id", place),
        "parent_id": _parse_id(row, "parent_id", place),
        "text": check_text(row["text"], f"{place}: field 'text'"),
        "role": row["role"],
    }
    for name in ("lang", "created_date"):
        checked[name] = None if _is_null(row.get(name)) else row[name]
    if checked["message_id"] is None:
        raise DataError(f"{place}: field 'message_id' is null", _SCHEMA_REMEDY)
    if not isinstance(checked["role"], str) or checked["role"] not in _ROLES:
        raise DataError(
            f"{place}: field 'role' is {shown(checked['role'])}",
            "It must be 'prompter' or 'assistant'",
        )
    for name in ("review_result", "deleted"):
        checked[name] = _parse_truth(row.get(name), name, place)
    checked["rank"], readable = _parse_number(row.get("rank"))
    if not readable:
        checked["unreadable"] = "rank"
    return checked


def messages_of(row: Row) -> Iterator[Row]:
    """Yields the messages of a row that is a tree, nested in `prompt`, each before its replies."""
    stack: list[tuple[Any, Any]] = [(row.values.get("prompt"), None)]
    while stack:
        message, parent = stack.pop()
        if not isinstance(message, Mapping):
            raise DataError(f"{row.place}: a message is {shown(message)}", _SCHEMA_REMEDY)
        yield Row(row.place, {**message, "parent_id": parent})
        replies = message.get("replies") or []
        if not isinstance(replies, list):
            raise DataError(f"{row.place}: 'replies' is {shown(replies)}", "It must be a list")
        stack += [(reply, message.get("message_id")) for reply in reversed(replies)]


def _is_null(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _parse_id(row: _Row, name: str, place: str) -> str | None:
    """Returns an id as text: "7" for "7", 7 and 7.0."""
    value = row.get(name)
    if _is_null(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) or (isinstance(value, int) and abs(value) < 10**40):
        return str(value)
    raise DataError(f"{place}: field '{name}' is {shown(value)}", _SCHEMA_REMEDY)


def _parse_truth(value: Any, name: str, place: str) -> bool | None:
    if _is_null(value):
        return None
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _TRUTH_WORDS:
        return _TRUTH_WORDS[value.strip().lower()]
    number, _ = _parse_number(value)
    if number in (0, 1):
        return bool(number)
    raise DataError(f"{place}: field '{name}' is {shown(value)}", "It must be true, false or null")


def _parse_number(value: Any) -> tuple[float | None, bool]:
    """Returns a number or None, and whether the value could be read as either."""
    if _is_null(value):
        return None, True
    if isinstance(value, bool) or not isinstance(value, int | float | str | Decimal):
        return None, False
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None, False
    if not math.isfinite(number):
        return None, isinstance(value, str) and value.strip().lower() == "nan"
    return (value if isinstance(value, int) else number), True


def _parse_date(value: Any) -> float | None:
    """Returns a date as seconds since 1970, or None if it can't be read.

    The size of a number tells seconds from milliseconds, microseconds and nanoseconds.
    """
    if isinstance(value, datetime):
        moment = value
    elif isinstance(value, date):
        moment = datetime(value.year, value.month, value.day)
    else:
        number, _ = _parse_number(value)
        if number is not None:
            thousands = (len(str(abs(int(number)))) - 10 + 2) // 3
            return float(number / 1000.0 ** min(3, max(0, thousands)))
        if not isinstance(value, str):
            return None
        try:
            moment = datetime.fromisoformat(value.strip().replace("Z", "+00:00"))
        except ValueError:
            try:
                moment = parser.parse(value, default=datetime(1970, 1, 1))
            except (ValueError, OverflowError):
                return None
    if moment.tzinfo is None:
        moment = moment.replace(tzinfo=timezone.utc)
    return float(moment.timestamp())


def build_conversations(
    rows: Iterable[_Row], languages: Sequence[str] | None = ("en",), paths: str = "best-path"
) -> Corpus:
    """Returns the conversations of `read_trees` in a list, with their counts."""
    corpus = Corpus([])
    corpus.conversations.extend(read_trees(rows, languages, paths, corpus))
    return corpus


def read_trees(
    rows: Iterable[_Row], languages: Sequence[str] | None, paths: str, corpus: Corpus
) -> Iterator[Conversation]:
    """Builds conversations from checked message rows in any order, and counts in `corpus`.

    `best-path` follows each root down through the best-ranked reply, or the earliest if none has a
    rank. `all-paths` turns every path from a root to an assistant message into a conversation and
    supervises only its last turn, so that shared prefixes are learned once. `languages` are the
    codes to keep, None for all.

    `dropped` counts messages as `duplicate row`, `deleted`, `review_result false`, `language`,
    `empty text`, `orphan` (the parent is missing or was dropped) or `role order` (two turns in a
    row have one role), and trees as `tree without assistant reply`. Raises DataError if two
    different rows share a message_id.
    """
    remaining = _select(rows, languages, corpus)
    children = _children(remaining, corpus)
    reached = 0
    for root in remaining:
        if root.parent is not None:
            continue
        if root.role != "prompter":
            corpus.dropped["role order"] += 1
            reached += 1
            continue
        reached += _count_below(root, children, corpus)
        if paths == "best-path":
            conversations = _best_path(root, children, corpus)
        else:
            conversations = list(_all_paths(root, children))
        yield from conversations
        if not conversations:
            corpus.dropped["tree without assistant reply"] += 1
    if orphans := len(remaining) - reached:
        corpus.dropped["orphan"] += orphans


def _children(messages: Iterable[_Message], corpus: Corpus) -> Mapping[str, list[_Message]]:
    """Returns the answers to each message that has any, best first."""
    children: dict[str, list[_Message]] = defaultdict(list)
    for message in messages:
        if message.parent is not None:
            children[message.parent].append(message)
    for siblings in children.values():
        if len(siblings) > 1:
            siblings.sort(key=lambda message: _preference(message, corpus))
    return children


def _select(
    rows: Iterable[_Row], languages: Sequence[str] | None, corpus: Corpus
) -> list[_Message]:
    """Returns the messages that stay, in file order."""
    remaining: list[_Message] = []
    seen: dict[str, bytes] = {}
    for row in rows:
        identity = row["message_id"]
        corpus.messages += 1
        content = _digest(row)
        if identity in seen:
            if content != seen[identity]:
                raise DataError(
                    f"two different rows have the message_id {identity!r}", "Remove one of them"
                )
            corpus.dropped["duplicate row"] += 1
            continue
        seen[identity] = content
        if name := row.get("unreadable"):
            corpus.resolved[f"unreadable {name}"] += 1
        corpus.trees += row["parent_id"] is None
        if reason := _drop_reason(row, languages):
            corpus.dropped[reason] += 1
        else:
            remaining.append(_message(row))
    return remaining


def _digest(row: _Row) -> bytes:
    """Returns what tells a row from others with its id; 1 and 1.0 are one rank."""
    rank = row.get("rank")
    values = {**row, "rank": None if rank is None else float(rank)}
    return hashlib.blake2b(repr(sorted(values.items())).encode(), digest_size=8).digest()


def _message(row: _Row) -> _Message:
    return _Message(
        row["message_id"],
        row["parent_id"],
        sys.intern(row["role"]),
        row["text"],
        row.get("rank"),
        row.get("created_date"),
    )


def _drop_reason(row: _Row, languages: Sequence[str] | None) -> str | None:
    if row.get("deleted"):
        return "deleted"
    if row.get("review_result") is False:
        return "review_result false"
    if languages is not None and row["lang"] not in languages:
        return "language"
    if not row["text"].strip():
        return "empty text"
    return None


def _preference(message: _Message, corpus: Corpus) -> tuple[float, float]:
    """Sorts siblings by rank (unranked last), then date; a tie leaves them in file order."""
    rank, created = message.rank, message.created
    moment = None if created is None else _parse_date(created)
    if created is not None and moment is None:
        corpus.resolved["unreadable created_date"] += 1
    return math.inf if rank is None else float(rank), -math.inf if moment is None else moment


def _replies(message: _Message, children: Mapping[str, list[_Message]]) -> list[_Message]:
    """Returns the children of the other role, best first."""
    return [c for c in children.get(message.identity, ()) if c.role != message.role]


def _count_below(root: _Message, children: Mapping[str, list[_Message]], corpus: Corpus) -> int:
    """Counts a tree's messages; one of the wrong role, and all below it, count as `role order`."""
    count = 0
    stack = [(root, True)]
    while stack:
        message, in_order = stack.pop()
        count += 1
        if not in_order:
            corpus.dropped["role order"] += 1
        for child in children.get(message.identity, ()):
            stack.append((child, in_order and child.role != message.role))
    return count


def _best_path(
    root: _Message, children: Mapping[str, list[_Message]], corpus: Corpus
) -> list[Conversation]:
    path = [root]
    while replies := _replies(path[-1], children):
        if len(replies) > 1 and replies[0].rank == replies[1].rank:
            unranked = replies[0].rank is None
            kind = "unranked siblings" if unranked else "siblings of the same best rank"
            corpus.resolved[f"earliest of several {kind}"] += 1
        path.append(replies[0])
    if path[-1].role == "prompter":
        path.pop()
        if path:
            corpus.resolved["prompter turn cut from the end"] += 1
    return [_conversation(path, supervise_all=True)] if path else []


def _all_paths(root: _Message, children: Mapping[str, list[_Message]]) -> Iterator[Conversation]:
    stack = [[root]]
    while stack:
        path = stack.pop()
        if path[-1].role == "assistant":
            yield _conversation(path, supervise_all=False)
        stack.extend([*path, reply] for reply in reversed(_replies(path[-1], children)))


def _conversation(path: Sequence[_Message], supervise_all: bool) -> Conversation:
    turns = [
        Turn("assistant", message.text, supervised=supervise_all or message is path[-1])
        if message.role == "assistant"
        else Turn("user", message.text)
        for message in path
    ]
    tree = path[0].identity
    return Conversation(tree, tuple(turns), place=f"tree {tree}")
