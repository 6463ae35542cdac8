"""OASST1 rows to conversations: which path of a tree is taken, what is dropped, and why.

Trees are written as lines "id parent role rank": `P` is a prompter, `A` an assistant; the text of a
message is its id, so a path reads like "q a".
"""

from __future__ import annotations

import itertools
import json
import math
import random
from collections import Counter
from collections.abc import Mapping
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from qlora_harness.data import files
from qlora_harness.data.conversation import Conversation, Corpus, Turn
from qlora_harness.data.oasst1 import build_conversations as build
from qlora_harness.data.oasst1 import check_row
from qlora_harness.errors import DataError

Row = dict[str, Any]

NO_REPLY = "tree without assistant reply"
UNRANKED = "earliest of several unranked siblings"
SAME_RANK = "earliest of several siblings of the same best rank"
CUT = "prompter turn cut from the end"


def message(
    identity: str, parent: str | None, role: str, rank: int | None = None, **more: Any
) -> Row:
    return {
        "message_id": identity, "parent_id": parent,
        "role": {"P": "prompter", "A": "assistant"}[role], "rank": rank, "text": identity,
        "lang": "en", "deleted": False, "review_result": True,
    } | more  # fmt: skip


def rows(*lines: str, **changes: Mapping[str, Any]) -> list[Row]:
    """Returns the rows of "id parent role rank" lines ("-" for null); changes go by id."""
    made = []
    for line in lines:
        identity, parent, role, *rank = line.split()
        number = int(rank[0]) if rank else None
        row = message(identity, None if parent == "-" else parent, role, number)
        made.append(row | changes.get(identity, {}))  # type: ignore[operator]
    return made


def paths(corpus: Corpus) -> list[str]:
    return [" ".join(turn.text for turn in c.turns) for c in corpus.conversations]


def dated(**dates: object) -> dict[str, Row]:
    return {identity: {"created_date": moment} for identity, moment in dates.items()}


# --- best-path ------------------------------------------------------------------------------------


def test_lone_pair_becomes_one_supervised_conversation() -> None:
    corpus = build(rows("q - P", "a q A"))
    assert corpus.conversations == [
        Conversation("q", (Turn("user", "q", False), Turn("assistant", "a", True)))
    ]
    assert (corpus.trees, corpus.messages) == (1, 2)


@pytest.mark.parametrize(
    ("made", "path", "resolved"),
    [
        # The best rank wins at every level; without rank 0 the lowest that remains.
        (
            rows("q - P", "a2 q A 2", "a0 q A 0", "a1 q A 1", "p1 a0 P 1", "p0 a0 P 0",
                 "b1 p0 A 1", "b0 p0 A 0", "better a1 P 0"),
            "q a0 p0 b0",
            {},
        ),
        (rows("q - P", "a0 q A 0", "a2 q A 2", "a1 q A 1", a0={"deleted": True}), "q a1", {}),
        (rows("q - P", "a3 q A 3", "a2 q A 2"), "q a2", {}),
        # A ranked reply goes before unranked ones; a lone unranked one is no choice.
        (rows("q - P", "x q A", "y q A 2", **dated(x="2020", y="2024")), "q y", {}),
        (rows("q - P", "a q A", "p a P", "b p A"), "q a p b", {}),
        (
            rows("q - P", "late q A", "early q A", "later q A",
                 **dated(late="2023-02-05T14:23:50.983374+00:00",
                         early="2023-02-05T14:23:49.999999+00:00",
                         later="2023-02-06T00:00:00.000000+00:00")),
            "q early",
            {UNRANKED: 1},
        ),
        (rows("q - P", "b q A 0", "a q A 0", **dated(b="2", a="1")), "q a", {SAME_RANK: 1}),
        # Only choices on the path count.
        (rows("q - P", "a q A 0", "b q A 1", "p1 b P", "p2 b P"), "q a", {}),
        (rows("q - P", "a q A", "thanks a P"), "q a", {CUT: 1}),
    ],
)  # fmt: skip
def test_best_path(made: list[Row], path: str, resolved: dict[str, int]) -> None:
    corpus = build(made)
    assert paths(corpus) == [path]
    assert dict(corpus.resolved) == resolved
    turns = corpus.conversations[0].turns
    assert [turn.supervised for turn in turns] == [False, True] * (len(turns) // 2)


def test_conversations_come_in_the_order_of_their_roots() -> None:
    corpus = build(rows("b r2 A", "r2 - P", "r1 - P", "a r1 A"))
    assert [c.tree for c in corpus.conversations] == ["r2", "r1"]


# --- what is dropped ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"deleted": True}, "deleted"),
        ({"review_result": False}, "review_result false"),
        ({"lang": "de"}, "language"),
        ({"text": " \n\t"}, "empty text"),
        ({"text": ""}, "empty text"),
        # One reason a message, the first of these.
        ({"text": "", "lang": "de", "review_result": False, "deleted": True}, "deleted"),
        ({"text": "", "lang": "de", "review_result": False}, "review_result false"),
        ({"text": "", "lang": "de"}, "language"),
    ],
)
def test_a_message_is_dropped_for_one_reason(change: Row, reason: str) -> None:
    corpus = build(rows("q - P", "bad q A 0", "good q A 1", bad=change))
    assert paths(corpus) == ["q good"]
    assert dict(corpus.dropped) == {reason: 1}


def test_messages_without_a_review_stay() -> None:
    for change in ({"review_result": None}, {"deleted": None}):
        assert paths(build(rows("q - P", "a q A", a=change))) == ["q a"]
    made = rows("q - P", "a q A")
    for row in made:
        for name in ("review_result", "deleted", "rank"):
            del row[name]
    assert paths(build(made)) == ["q a"]


@pytest.mark.parametrize(
    ("languages", "expected"),
    [
        (("en",), ["q a"]),
        (("pt-BR",), ["f b"]),
        (("pt",), []),
        (("pt-BR", "en"), ["q a", "f b"]),
        (None, ["q a", "f b"]),
    ],
)
def test_languages(languages: tuple[str, ...] | None, expected: list[str]) -> None:
    made = rows("q - P", "a q A", "f - P", "b f A", f={"lang": "pt-BR"}, b={"lang": "pt-BR"})
    corpus = build(made, languages=languages)
    assert paths(corpus) == expected
    assert corpus.dropped["language"] == 4 - 2 * len(expected)


@pytest.mark.parametrize("rule", ["best-path", "all-paths"])
@pytest.mark.parametrize(
    ("made", "expected", "trees", "dropped"),
    [
        (rows("q - P", "r - P", "a r A"), ["r a"], 2, {NO_REPLY: 1}),
        (rows("q - P", "a q A", a={"deleted": True}), [], 1, {"deleted": 1, NO_REPLY: 1}),
        # p and b lie below a deleted message; lost and deeper below one that is not there.
        (
            rows("q - P", "a q A 1", "gone q A 0", "p gone P", "b p A", "lost nowhere A",
                 "deeper lost P", gone={"deleted": True}),
            ["q a"],
            1,
            {"deleted": 1, "orphan": 4},
        ),
        (
            rows("q - P", "a q A", q={"review_result": False}), [], 1,
            {"review_result false": 1, "orphan": 1},
        ),
        # Cycles never end at a root.
        (rows("q - P", "a q A", "x y A", "y x P", "me me A"), ["q a"], 1, {"orphan": 3}),
        # Two turns of one role in a row go with all below; so does a tree begun by an assistant.
        (
            rows("q - P", "q2 q P 0", "a2 q2 A", "a q A 1", "b a A", "c b P"), ["q a"], 1,
            {"role order": 4},
        ),
        (rows("a - A", "q - P", "b q A"), ["q b"], 2, {"role order": 1}),
        # The same row twice counts once.
        (rows("q - P", "a q A", "a q A", "q - P"), ["q a"], 1, {"duplicate row": 2}),
    ],
)  # fmt: skip
def test_what_is_dropped_is_counted(
    made: list[Row], expected: list[str], trees: int, dropped: dict[str, int], rule: str
) -> None:
    corpus = build(made, paths=rule)
    assert paths(corpus) == expected
    assert (corpus.trees, corpus.messages) == (trees, len(made))
    assert (dict(corpus.dropped), dict(corpus.resolved)) == (dropped, {})


def test_two_different_rows_of_one_id_are_refused() -> None:
    made = rows("q - P", "a q A")
    with pytest.raises(DataError, match="message_id 'a'"):
        build([*made, made[1] | {"text": "something else"}])


# --- all-paths ------------------------------------------------------------------------------------


def test_all_paths_supervise_each_reply_once_as_the_last_turn() -> None:
    made = rows("q - P", "a0 q A 0", "a1 q A 1", "p a0 P", "b p A", "end b P")
    corpus = build(made, paths="all-paths")
    assert paths(corpus) == ["q a0", "q a0 p b", "q a1"]
    assert [[t.supervised for t in c.turns] for c in corpus.conversations] == [
        [False, True],
        [False, False, False, True],
        [False, True],
    ]
    assert {c.tree for c in corpus.conversations} == {"q"}
    assert dict(corpus.resolved) == {}


def test_every_message_is_in_a_path_or_counted_once() -> None:
    made = rows(
        "q - P", "a q A 0", "b q A 1", "c nowhere A", "d q P", "e d A", "f q A 2", "g f P",
        f={"deleted": True},
    )  # fmt: skip
    corpus = build(made, paths="all-paths")
    in_paths = {turn.text for c in corpus.conversations for turn in c.turns}
    assert in_paths == {"q", "a", "b"}
    assert sum(corpus.dropped.values()) == len(made) - len(in_paths)


@pytest.mark.parametrize("rule", ["best-path", "all-paths"])
def test_order_of_the_rows_below_a_root_does_not_matter(rule: str) -> None:
    made = rows("q - P", "a0 q A 0", "a1 q A 1", "p a0 P", "o a0 P", "b p A", "c o A",
                **dated(p="2", o="1"))  # fmt: skip
    expected = build(made, paths=rule)
    for order in itertools.permutations(made):
        assert build(order, paths=rule) == expected


# --- the schema of a row --------------------------------------------------------------------------

QUESTION = message("q", None, "P")
PLACE = "rows.jsonl, line 7"


def read_rows(path: Path) -> list[Row]:
    return [dict(check_row(row.values, row.place)) for row in files.read_rows(path)]


def without(row: Row, name: str) -> Row:
    return {key: value for key, value in row.items() if key != name}


@pytest.mark.parametrize("name", ["message_id", "text", "role"])
def test_missing_field_is_told(name: str) -> None:
    with pytest.raises(DataError) as caught:
        check_row(without(QUESTION, name), PLACE)
    assert caught.value.problem == f"{PLACE}: field '{name}' is missing"


@pytest.mark.parametrize("null", [None, math.nan, ""])
@pytest.mark.parametrize(
    "name", ["parent_id", "lang", "rank", "deleted", "review_result", "created_date"]
)
def test_null_is_null_in_any_form(name: str, null: object) -> None:
    checked = check_row(QUESTION | {name: null}, "")
    assert checked[name] is None
    assert checked == check_row(without(QUESTION, name), "")


@pytest.mark.parametrize(
    ("change", "field", "value"),
    [
        ({"text": None}, "text", ""),
        ({"message_id": 1}, "message_id", "1"),
        ({"parent_id": 7.0}, "parent_id", "7"),
        ({"rank": "0"}, "rank", 0.0),
        ({"rank": "nan"}, "rank", None),
        ({"rank": 10**400}, "rank", None),
        ({"rank": "best"}, "rank", None),
        ({"rank": [0]}, "rank", None),
        ({"rank": True}, "rank", None),
        ({"deleted": "no"}, "deleted", False),
        ({"deleted": "True"}, "deleted", True),
        ({"review_result": 1}, "review_result", True),
        ({"review_result": 0.0}, "review_result", False),
        ({"review_result": "1.0"}, "review_result", True),
        ({"deleted": "0.0"}, "deleted", False),
        ({"rank": Decimal("0")}, "rank", 0.0),
        ({"rank": Decimal("NaN")}, "rank", None),
        ({"emojis": object(), "labels": {"a": math.nan}}, "rank", None),
    ],
)
def test_values_as_other_forms_have_them(change: Row, field: str, value: object) -> None:
    checked = check_row(QUESTION | change, "")
    assert checked[field] == value
    assert type(checked[field]) is type(value)


@pytest.mark.parametrize(
    ("row", "facts"),
    [
        (QUESTION | {"text": 5}, "field 'text' is 5"),
        (QUESTION | {"message_id": None}, "field 'message_id' is null"),
        (QUESTION | {"message_id": ["q"]}, "field 'message_id' is ['q']"),
        (QUESTION | {"message_id": 10**400}, "field 'message_id' is 10"),
        (QUESTION | {"parent_id": 1.5}, "field 'parent_id' is 1.5"),
        (QUESTION | {"deleted": "perhaps"}, "field 'deleted' is 'perhaps'"),
        (QUESTION | {"review_result": 2}, "field 'review_result' is 2"),
        (QUESTION | {"role": "user"}, "field 'role' is 'user'"),
        (QUESTION | {"text": "ab\ud800"}, "field 'text' has half of a surrogate pair as"),
    ],
)
def test_field_that_cannot_be_understood(row: Row, facts: str) -> None:
    with pytest.raises(DataError) as caught:
        check_row(row, PLACE)
    assert caught.value.problem.startswith(f"{PLACE}: {facts}")
    assert len(str(caught.value)) <= 500


def replies(*changes: Row) -> list[Row]:
    """Returns a question and unranked replies a, b, … with these changes, checked."""
    made = [
        QUESTION,
        *(message(c, "q", "A") | more for c, more in zip("abc", changes, strict=False)),
    ]
    return [dict(check_row(row, "")) for row in made]


def test_nan_rank_is_no_rank() -> None:
    for order in itertools.permutations(replies({"rank": 1}, {"rank": math.nan}, {"rank": 0})):
        assert paths(build(order)) == ["q c"]


@pytest.mark.parametrize(
    ("early", "late"),
    [
        ("2023-02-05T14:23:47+00:00", "2023-02-05T14:23:47.5+00:00"),
        ("2023-02-05T15:23:47+02:00", "2023-02-05T14:23:47Z"),
        ("2023-02-05 14:23:47", datetime(2023, 2, 5, 14, 23, 48)),
        (1675607027, "2023-02-05T14:23:48+00:00"),
        (1675607027983, 1675607028),
        ("1675607027983", 1675607028983000),
        (1675607027983000000, datetime(2023, 2, 5, 14, 23, 48, tzinfo=timezone.utc)),
        (1675607027.5, 1675607028),
        (date(2023, 2, 4), "2023-02-05"),
        ("2023-02-05 14:23:47 UTC", "Sun, 05 Feb 2023 14:23:48 +0000"),
        ("2023-02-05T14:23:47+0000", "Feb 6, 2023"),
    ],
)
def test_dates_of_any_kind_order_siblings_by_the_moment(early: object, late: object) -> None:
    for first, second, best in ((early, late, "q a"), (late, early, "q b")):
        corpus = build(replies({"created_date": first}, {"created_date": second}))
        assert paths(corpus) == [best]
        assert corpus.resolved == {UNRANKED: 1}


def test_what_cannot_be_read_where_it_only_orders_is_null_and_counted() -> None:
    unreadable = {"rank": "first", "created_date": "yesterday"}
    corpus = build(replies(unreadable, {"created_date": {"day": 1}}))
    assert corpus.resolved["unreadable rank"] == 1
    assert corpus.resolved["unreadable created_date"] == 2
    assert paths(corpus) == ["q a"]


# --- real rows ------------------------------------------------------------------------------------


def best_path_lengths(made: list[Row]) -> dict[str, int]:
    """Turns of each tree's best path, worked out from the rule in another way than the source."""
    lengths = {}
    for root in (r for r in made if r["parent_id"] is None):
        here, turns = root, 1
        while True:
            below = [r for r in made if r["parent_id"] == here["message_id"]]
            if not below:
                break
            here = min(below, key=lambda r: (r["rank"] is None, r["rank"] or 0, r["created_date"]))
            turns += 1
        lengths[root["message_id"]] = turns - turns % 2
    return {tree: turns for tree, turns in lengths.items() if turns}


def test_real_oasst1_validation(shared_data: Path) -> None:
    path = shared_data / "oasst" / "oasst1_validation_best.jsonl"
    made = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    best = build(read_rows(path), languages=None)
    assert (best.messages, best.trees, len(best.conversations)) == (2650, 804, 804)
    assert dict(best.dropped) == {}
    assert {c.tree: len(c.turns) for c in best.conversations} == best_path_lengths(made)

    every = build(read_rows(path), languages=None, paths="all-paths")
    by_id = {row["message_id"]: row for row in made}

    def texts_up_to(row: Row) -> tuple[str, ...]:
        above = by_id.get(row["parent_id"])
        return (*(texts_up_to(above) if above else ()), row["text"])

    assistants = [row for row in made if row["role"] == "assistant"]
    assert len(every.conversations) == len(assistants) == 1388
    assert Counter(tuple(t.text for t in c.turns) for c in every.conversations) == Counter(
        texts_up_to(row) for row in assistants
    )
    # Each of the 953 leaves is a reply, so none of the file's conversations is missing.
    inner = {row["parent_id"] for row in made}
    assert sum(row["message_id"] not in inner for row in assistants) == 953

    english = build(read_rows(path))
    assert len(english.conversations) == 338
    assert dict(english.dropped) == {"language": sum(row["lang"] != "en" for row in made)}


def test_real_oasst2_trees(shared_data: Path) -> None:
    path = shared_data / "oasst" / "oasst2_trees_sample.jsonl"
    corpus = build(read_rows(path), languages=None)
    # 27 of the 787 rows stand there twice, 8 of them roots.
    assert (corpus.messages, corpus.trees, len(corpus.conversations)) == (787, 267, 57)
    assert dict(corpus.dropped) == {
        "deleted": 12, "review_result false": 16, "duplicate row": 27, NO_REPLY: 200,
    }  # fmt: skip
    assert dict(corpus.resolved) == {UNRANKED: 9, CUT: 18}
    for conversation in corpus.conversations:
        roles = [turn.role for turn in conversation.turns]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert [t.supervised for t in conversation.turns] == [r == "assistant" for r in roles]

    shuffled = list(read_rows(path))
    random.Random(0).shuffle(shuffled)
    again = build(shuffled, languages=None)
    assert set(paths(again)) == set(paths(corpus))
    assert (again.dropped, again.resolved) == (corpus.dropped, corpus.resolved)
