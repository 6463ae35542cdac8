"""OASST1 message rows to conversations.

The row schema is that of OpenAssistant/oasst1
(https://huggingface.co/datasets/OpenAssistant/oasst1): one row a message, `parent_id` null at the
root of a tree, `rank` 0 for the best of several siblings and null for a lone one.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import date, datetime, timezone
from decimal import Decimal
from typing import Any

from dateutil import parser

from qlora_harness.data.conversation import Conversation, Corpus, Turn
from qlora_harness.errors import DataError, shown

REQUIRED = frozenset({"message_id", "text", "role"})
FIELDS = REQUIRED | {"parent_id", "lang", "rank", "created_date", "deleted", "review_result"}
_ROLES = {"prompter": "user", "assistant": "assistant"}
_SCHEMA_REMEDY = (
    "Rows need OASST1's columns: message_id, parent_id, text, role, and lang unless --languages all"
)
# Other forms that people have, by columns that only they have.
_OTHER_FORMS = {
    "Alpaca's form": {"instruction", "output"},
    "ShareGPT's form": {"conversations"},
    "chat messages": {"messages"},
    "prompts with completions": {"prompt", "completion"},
    "pairs of preference": {"chosen", "rejected"},
    "plain text": {"text"},
}
_WORDS = {"true": True, "yes": True, "false": False, "no": False}

_Row = Mapping[str, Any]


def check_row(row: object, place: str) -> _Row:
    """Returns a row with the fields of the schema only, or raises DataError.

    Null is null in any form: an absent field, None, NaN or an empty text. Numbers and truth values
    may be texts, as in csv. What can't be read in `rank`, which only orders siblings, is null and
    noted under `unreadable`. `place` is the file and line, or the data set and row number.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: expected an object, found {type(row).__name__}", _SCHEMA_REMEDY)
    if not row.keys() >= REQUIRED:
        raise _wrong_columns(row, place)
    checked: dict[str, Any] = {
        "message_id": _identity(row, "message_id", place),
        "parent_id": _identity(row, "parent_id", place),
        "text": _text(row, place),
        "role": row["role"],
        "lang": None if _is_null(row.get("lang")) else row["lang"],
        "created_date": None if _is_null(row.get("created_date")) else row["created_date"],
    }
    if checked["message_id"] is None:
        raise DataError(f"{place}: field 'message_id' is null", _SCHEMA_REMEDY)
    if not isinstance(checked["role"], str) or checked["role"] not in _ROLES:
        raise DataError(
            f"{place}: field 'role' is {shown(checked['role'])}",
            "It must be 'prompter' or 'assistant'",
        )
    for name in ("review_result", "deleted"):
        checked[name] = _truth(row.get(name), name, place)
    rank, readable = _number(row.get("rank"))
    checked["rank"] = rank
    if not readable:
        checked["unreadable"] = "rank"
    return checked


def _wrong_columns(row: _Row, place: str) -> DataError:
    missing = [name for name in ("message_id", "text", "role") if name not in row]
    columns = ", ".join(shown(str(name), 30)[1:-1] for name in list(row)[:12])
    foreign = len(missing) > 1
    form = next((f for f, marks in _OTHER_FORMS.items() if foreign and marks <= row.keys()), None)
    near = f", as in {form}" if form else ""
    return DataError(
        f"{place}: field '{missing[0]}' is missing; the fields are {columns or 'none'}{near}",
        _SCHEMA_REMEDY,
    )


def _is_null(value: object) -> bool:
    return value is None or value == "" or (isinstance(value, float) and math.isnan(value))


def _identity(row: _Row, name: str, place: str) -> str | None:
    """Returns an identifier; whole numbers become their digits."""
    value = row.get(name)
    if _is_null(value):
        return None
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if isinstance(value, str) or (isinstance(value, int) and abs(value) < 10**40):
        return str(value)
    raise DataError(f"{place}: field '{name}' is {shown(value)}", _SCHEMA_REMEDY)


def _text(row: _Row, place: str) -> str:
    value = row["text"]
    if _is_null(value):
        return ""
    if not isinstance(value, str):
        raise DataError(f"{place}: field 'text' is {shown(value)}", _SCHEMA_REMEDY)
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{place}: character {error.start + 1} of field 'text' is half of a surrogate pair, "
            "which no tokenizer can encode",
            "Correct or remove the row",
        ) from None
    return value


def _truth(value: Any, name: str, place: str) -> bool | None:
    if _is_null(value):
        return None
    if isinstance(value, bool):
        return value
    if isinstance(value, str) and value.strip().lower() in _WORDS:
        return _WORDS[value.strip().lower()]
    number, _ = _number(value)
    if number in (0, 1):
        return bool(number)
    raise DataError(f"{place}: field '{name}' is {shown(value)}", "It must be true, false or null")


def _number(value: Any) -> tuple[float | None, bool]:
    """Returns a number or None, and whether the value was readable as one of the two."""
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


def _moment(value: Any) -> float | None:
    """Returns a date as seconds since 1970, or None if it isn't one.

    Numbers are seconds, or the milliseconds, microseconds or nanoseconds of a date of our time.
    """
    if isinstance(value, date):
        day = datetime(value.year, value.month, value.day)
        moment = value if isinstance(value, datetime) else day
    else:
        number, _ = _number(value)
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
    """Builds conversations from checked message rows in any order.

    `best-path` walks from each root and takes at each level the best-ranked remaining message, or
    among unranked ones the earliest. `all-paths` makes a conversation of each path from a root to
    an assistant message and supervises its last turn only, so that shared prefixes are not learned
    several times. `languages` are codes to keep, None for all.

    What is dropped is counted by reason: `duplicate row`, `deleted`, `review_result false`,
    `language`, `empty text`, `orphan` (the parent is missing or was dropped), `role order` (two
    turns of one role in a row), and by tree `tree without assistant reply`. Raises DataError if two
    different rows share a message_id.
    """
    corpus = Corpus([])
    remaining, order = _select(rows, languages, corpus)
    roots = [row for row in remaining if row["parent_id"] is None]
    children: dict[str, list[_Row]] = defaultdict(list)
    for row in remaining:
        if row["parent_id"] is not None:
            children[row["parent_id"]].append(row)
    for siblings in children.values():
        if len(siblings) > 1:
            siblings.sort(key=lambda r: _preference(r, order, corpus))
    walk = _best_path if paths == "best-path" else _all_paths
    reached = 0
    for root in roots:
        if root["role"] != "prompter":
            corpus.dropped["role order"] += 1
            reached += 1
            continue
        reached += _count_below(root, children, corpus)
        conversations = list(walk(root, children, corpus))
        corpus.conversations.extend(conversations)
        if not conversations:
            corpus.dropped["tree without assistant reply"] += 1
    if orphans := len(remaining) - reached:
        corpus.dropped["orphan"] += orphans
    return corpus


def _select(
    rows: Iterable[_Row], languages: Sequence[str] | None, corpus: Corpus
) -> tuple[list[_Row], dict[str, int]]:
    """Returns the rows to build from and the place of each message in the file."""
    remaining: list[_Row] = []
    seen: dict[str, _Row] = {}
    for row in rows:
        identity = row["message_id"]
        corpus.messages += 1
        if identity in seen:
            if row != seen[identity]:
                raise DataError(
                    f"message_id {identity!r} is in two rows that differ",
                    "Remove one of the two rows",
                )
            corpus.dropped["duplicate row"] += 1
            continue
        seen[identity] = row
        if name := row.get("unreadable"):
            corpus.resolved[f"unreadable {name}"] += 1
        corpus.trees += row["parent_id"] is None
        if reason := _drop_reason(row, languages):
            corpus.dropped[reason] += 1
        else:
            remaining.append(row)
    return remaining, {identity: number for number, identity in enumerate(seen)}


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


def _preference(row: _Row, order: Mapping[str, int], corpus: Corpus) -> tuple[float, float, int]:
    """Sort key of siblings: rank (unranked last), then date, then order in the file."""
    rank, created = row.get("rank"), row.get("created_date")
    moment = None if created is None else _moment(created)
    if created is not None and moment is None:
        corpus.resolved["unreadable created_date"] += 1
    return (
        math.inf if rank is None else float(rank),
        -math.inf if moment is None else moment,
        order[row["message_id"]],
    )


def _replies(row: _Row, children: Mapping[str, list[_Row]]) -> list[_Row]:
    """The children of the other role, best first."""
    return [c for c in children.get(row["message_id"], ()) if c["role"] != row["role"]]


def _count_below(root: _Row, children: Mapping[str, list[_Row]], corpus: Corpus) -> int:
    """Counts the messages of a tree, and as `role order` those of the wrong role and below."""
    seen = 0
    stack = [(root, True)]
    while stack:
        row, in_order = stack.pop()
        seen += 1
        if not in_order:
            corpus.dropped["role order"] += 1
        for child in children.get(row["message_id"], ()):
            stack.append((child, in_order and child["role"] != row["role"]))
    return seen


def _best_path(
    root: _Row, children: Mapping[str, list[_Row]], corpus: Corpus
) -> Iterator[Conversation]:
    path = [root]
    while replies := _replies(path[-1], children):
        if len(replies) > 1 and replies[0].get("rank") == replies[1].get("rank"):
            unranked = replies[0].get("rank") is None
            kind = "unranked siblings" if unranked else "siblings of the same best rank"
            corpus.resolved[f"earliest of several {kind}"] += 1
        path.append(replies[0])
    if path[-1]["role"] == "prompter":
        path.pop()
        if path:
            corpus.resolved["prompter turn cut from the end"] += 1
    if path:
        yield _conversation(path, supervise_all=True)


def _all_paths(
    root: _Row, children: Mapping[str, list[_Row]], corpus: Corpus
) -> Iterator[Conversation]:
    del corpus
    stack: list[list[_Row]] = [[root]]
    while stack:
        path = stack.pop()
        if path[-1]["role"] == "assistant":
            yield _conversation(path, supervise_all=False)
        stack.extend([*path, reply] for reply in reversed(_replies(path[-1], children)))


def _conversation(path: Sequence[_Row], supervise_all: bool) -> Conversation:
    turns = []
    for index, row in enumerate(path):
        assistant = row["role"] == "assistant"
        learned = assistant and (supervise_all or index == len(path) - 1)
        turns.append(Turn("assistant" if assistant else "user", row["text"], learned))
    return Conversation(path[0]["message_id"], tuple(turns))
