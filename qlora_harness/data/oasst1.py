"""OASST1 message rows to conversations.

The row schema is that of OpenAssistant/oasst1 (https://huggingface.co/datasets/OpenAssistant/oasst1):
one row a message, `parent_id` null at the root of a tree, `rank` 0 for the best of several siblings
and null for a lone one.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from qlora_harness.data.conversation import Conversation, Corpus, Turn
from qlora_harness.errors import DataError

_FIELDS: dict[str, tuple[type, ...]] = {
    "message_id": (str,),
    "parent_id": (str, type(None)),
    "text": (str,),
    "role": (str,),
    "lang": (str,),
}
_OPTIONAL: dict[str, tuple[type, ...]] = {
    "review_result": (bool, type(None)),
    "deleted": (bool, type(None)),
    "rank": (int, float, type(None)),
    "created_date": (str, type(None)),
}
_ROLES = {"prompter": "user", "assistant": "assistant"}

_Row = Mapping[str, Any]


def check_row(row: object, place: str) -> _Row:
    """Checks one row against the schema.

    Args:
        row: What was read.
        place: The file and line, or data set and row number.

    Returns:
        The row.

    Raises:
        DataError: A field is missing, of the wrong type, or has an unknown role.
    """
    if not isinstance(row, Mapping):
        raise DataError(f"{place}: expected an object, found {type(row).__name__}", _SCHEMA_REMEDY)
    for name, kinds in _FIELDS.items():
        if name not in row:
            raise DataError(f"{place}: field '{name}' is missing", _SCHEMA_REMEDY)
        if not isinstance(row[name], kinds):
            raise DataError(f"{place}: field '{name}' is {row[name]!r}", _SCHEMA_REMEDY)
    for name, kinds in _OPTIONAL.items():
        if not isinstance(row.get(name), kinds):
            raise DataError(f"{place}: field '{name}' is {row[name]!r}", _SCHEMA_REMEDY)
    if row["role"] not in _ROLES:
        raise DataError(
            f"{place}: field 'role' is {row['role']!r}", "It must be 'prompter' or 'assistant'"
        )
    return row


_SCHEMA_REMEDY = "Rows must follow the schema of OpenAssistant/oasst1"


def build_conversations(
    rows: Iterable[_Row], languages: Sequence[str] | None = ("en",), paths: str = "best-path"
) -> Corpus:
    """Builds conversations from message rows.

    `best-path` walks from each root and takes at each level the best-ranked remaining message, or
    the only one where ranks are null, or among several unranked ones the earliest. `all-paths`
    makes one conversation of each path from a root to an assistant message and supervises its
    last turn only, so that shared prefixes are not learned several times.

    Args:
        rows: Checked rows in any order.
        languages: Codes to keep (exact match with `lang`), or None for all.
        paths: "best-path" or "all-paths".

    Returns:
        The conversations, with what was dropped and why: `duplicate row`, `deleted`,
        `review_result false`, `language`, `empty text`, `orphan` (the parent is missing or was
        dropped), `role order` (two turns of one role in a row), and by tree `tree without assistant
        reply`.

    Raises:
        DataError: Two different rows share a message_id.
    """
    corpus = Corpus([])
    kept: dict[str, _Row] = {}
    seen: dict[str, _Row] = {}
    order: dict[str, int] = {}
    for row in rows:
        identity = row["message_id"]
        corpus.messages += 1
        if identity in seen:
            if row != seen[identity]:
                raise DataError(
                    f"message_id {identity!r} stands in two rows that differ",
                    "Remove one of the two rows",
                )
            corpus.dropped["duplicate row"] += 1
            continue
        seen[identity] = row
        corpus.trees += row["parent_id"] is None
        order[identity] = len(order)
        reason = _drop_reason(row, languages)
        if reason:
            corpus.dropped[reason] += 1
        else:
            kept[identity] = row
    children: dict[str, list[_Row]] = defaultdict(list)
    roots: list[_Row] = []
    for row in kept.values():
        if row["parent_id"] is None:
            roots.append(row)
        else:
            children[row["parent_id"]].append(row)
    for siblings in children.values():
        siblings.sort(key=lambda r: _preference(r, order))
    reached = 0
    for root in roots:
        if root["role"] != "prompter":
            corpus.dropped["role order"] += 1
            reached += 1
            continue
        reached += _count_below(root, children, corpus)
        walk = _best_path if paths == "best-path" else _all_paths
        found = list(walk(root, children, corpus))
        corpus.conversations.extend(found)
        if not found:
            corpus.dropped["tree without assistant reply"] += 1
    orphans = len(kept) - reached
    if orphans:
        corpus.dropped["orphan"] += orphans
    return corpus


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


def _preference(row: _Row, order: Mapping[str, int]) -> tuple[float, str, int]:
    """Sort key of siblings: rank (unranked last), then date, then place in the file."""
    rank = row.get("rank")
    return (
        float("inf") if rank is None else float(rank),
        row.get("created_date") or "",
        order[row["message_id"]],
    )


def _replies(row: _Row, children: Mapping[str, list[_Row]]) -> list[_Row]:
    """The children that answer a message: those of the other role, best first."""
    return [c for c in children.get(row["message_id"], ()) if c["role"] != row["role"]]


def _count_below(root: _Row, children: Mapping[str, list[_Row]], corpus: Corpus) -> int:
    """Counts the messages of a tree and notes those of the wrong role (and all below them)."""
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
    for place, row in enumerate(path):
        assistant = row["role"] == "assistant"
        learned = assistant and (supervise_all or place == len(path) - 1)
        turns.append(Turn("assistant" if assistant else "user", row["text"], learned))
    return Conversation(path[0]["message_id"], tuple(turns))
