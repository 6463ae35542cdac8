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
from collections.abc import Iterable, Mapping
from datetime import date, datetime, timezone
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest

from qlora_harness.data.conversation import Conversation, Corpus, Turn
from qlora_harness.data.oasst1 import build_conversations, check_row
from qlora_harness.data.sources import read_rows
from qlora_harness.errors import DataError

Row = dict[str, Any]


def message(
    identity: str, parent: str | None, role: str, rank: int | None = None, **more: Any
) -> Row:
    return {
        "message_id": identity,
        "parent_id": parent,
        "role": {"P": "prompter", "A": "assistant"}[role],
        "rank": rank,
        "text": identity,
        "lang": "en",
        "deleted": False,
        "review_result": True,
    } | more


def rows(*lines: str, **changes: Mapping[str, Any]) -> list[Row]:
    """Returns the rows of "id parent role rank" lines ("-" for null); changes go by id."""
    made = []
    for line in lines:
        identity, parent, role, *rank = line.split()
        made.append(
            message(
                identity,
                None if parent == "-" else parent,
                role,
                int(rank[0]) if rank and rank[0] != "-" else None,
            )
            | changes.get(identity, {})
        )
    return made


def paths(corpus: Corpus) -> list[str]:
    return [" ".join(turn.text for turn in c.turns) for c in corpus.conversations]


def build(made: Iterable[Row], **options: Any) -> Corpus:
    return build_conversations(made, **options)


# --- best-path ------------------------------------------------------------------------------------


def test_lone_pair_becomes_one_supervised_conversation() -> None:
    corpus = build(rows("q - P", "a q A"))
    assert corpus.conversations == [
        Conversation("q", (Turn("user", "q", False), Turn("assistant", "a", True)))
    ]
    assert (corpus.trees, corpus.messages) == (1, 2)
    assert (dict(corpus.dropped), dict(corpus.resolved)) == ({}, {})


def test_best_rank_is_taken_at_every_level() -> None:
    corpus = build(
        rows(
            "q - P",
            "a2 q A 2",
            "a0 q A 0",
            "a1 q A 1",
            "p1 a0 P 1",
            "p0 a0 P 0",
            "b1 p0 A 1",
            "b0 p0 A 0",
            "better a1 P 0",
        )
    )
    assert paths(corpus) == ["q a0 p0 b0"]
    assert [turn.supervised for turn in corpus.conversations[0].turns] == [False, True, False, True]
    assert dict(corpus.resolved) == {}


def test_without_rank_0_the_lowest_remaining_rank_wins() -> None:
    deleted = rows("q - P", "a0 q A 0", "a2 q A 2", "a1 q A 1", a0={"deleted": True})
    assert paths(build(deleted)) == ["q a1"]
    assert paths(build(rows("q - P", "a3 q A 3", "a2 q A 2"))) == ["q a2"]


def test_ranked_reply_goes_before_unranked_ones() -> None:
    corpus = build(
        rows("q - P", "x q A -", "y q A 2", x={"created_date": "2020"}, y={"created_date": "2024"})
    )
    assert paths(corpus) == ["q y"]
    assert dict(corpus.resolved) == {}


def test_lone_unranked_reply_is_not_counted_as_a_choice() -> None:
    corpus = build(rows("q - P", "a q A -", "p a P -", "b p A -"))
    assert paths(corpus) == ["q a p b"]
    assert dict(corpus.resolved) == {}


def test_several_unranked_replies_give_the_earliest_counted() -> None:
    made = rows(
        "q - P",
        "late q A",
        "early q A",
        "later q A",
        late={"created_date": "2023-02-05T14:23:50.983374+00:00"},
        early={"created_date": "2023-02-05T14:23:49.999999+00:00"},
        later={"created_date": "2023-02-06T00:00:00.000000+00:00"},
    )
    corpus = build(made)
    assert paths(corpus) == ["q early"]
    assert dict(corpus.resolved) == {"earliest of several unranked siblings": 1}


def test_siblings_of_one_best_rank_give_the_earliest_counted() -> None:
    made = rows("q - P", "b q A 0", "a q A 0", b={"created_date": "2"}, a={"created_date": "1"})
    corpus = build(made)
    assert paths(corpus) == ["q a"]
    assert dict(corpus.resolved) == {"earliest of several siblings of the same best rank": 1}


def test_only_choices_on_the_path_are_counted() -> None:
    made = rows("q - P", "a q A 0", "b q A 1", "p1 b P", "p2 b P")
    assert dict(build(made).resolved) == {}


def test_prompter_turn_at_the_end_is_cut() -> None:
    corpus = build(rows("q - P", "a q A", "thanks a P"))
    assert paths(corpus) == ["q a"]
    assert dict(corpus.resolved) == {"prompter turn cut from the end": 1}


def test_tree_without_a_reply_is_dropped_and_counted() -> None:
    corpus = build(rows("q - P", "r - P", "a r A"))
    assert paths(corpus) == ["r a"]
    assert corpus.trees == 2
    assert dict(corpus.dropped) == {"tree without assistant reply": 1}
    assert dict(corpus.resolved) == {}


def test_tree_whose_only_reply_was_deleted_is_one_without_reply() -> None:
    corpus = build(rows("q - P", "a q A", a={"deleted": True}))
    assert paths(corpus) == []
    assert dict(corpus.dropped) == {"deleted": 1, "tree without assistant reply": 1}


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


@pytest.mark.parametrize("change", [{"review_result": None}, {"deleted": None}])
def test_unreviewed_messages_stay(change: Row) -> None:
    assert paths(build(rows("q - P", "a q A", a=change))) == ["q a"]


def test_fields_that_rows_may_lack() -> None:
    made = rows("q - P", "a q A")
    for row in made:
        for name in ("review_result", "deleted", "rank"):
            del row[name]
    assert paths(build(made)) == ["q a"]


def test_languages() -> None:
    made = rows("q - P", "a q A", "f - P", "b f A", f={"lang": "pt-BR"}, b={"lang": "pt-BR"})
    assert paths(build(made)) == ["q a"]
    assert paths(build(made, languages=("pt-BR",))) == ["f b"]
    assert paths(build(made, languages=("pt",))) == []
    assert paths(build(made, languages=("pt-BR", "en"))) == ["q a", "f b"]
    everything = build(made, languages=None)
    assert paths(everything) == ["q a", "f b"]
    assert dict(everything.dropped) == {}


def test_orphans_cascade() -> None:
    corpus = build(
        rows(
            "q - P",
            "a q A 1",
            "gone q A 0",
            "p gone P",
            "b p A",
            "lost nowhere A",
            "deeper lost P",
            gone={"deleted": True},
        )
    )
    assert paths(corpus) == ["q a"]
    # p and b lie below a deleted message; lost and deeper below one that is not there.
    assert dict(corpus.dropped) == {"deleted": 1, "orphan": 4}


def test_replies_to_a_dropped_root_are_orphans() -> None:
    corpus = build(rows("q - P", "a q A", q={"review_result": False}))
    assert paths(corpus) == []
    assert corpus.trees == 1
    assert dict(corpus.dropped) == {"review_result false": 1, "orphan": 1}


@pytest.mark.parametrize("rule", ["best-path", "all-paths"])
def test_cycles_are_orphans(rule: str) -> None:
    corpus = build(rows("q - P", "a q A", "x y A", "y x P", "me me A"), paths=rule)
    assert paths(corpus) == ["q a"]
    assert dict(corpus.dropped) == {"orphan": 3}


def test_two_turns_of_one_role_in_a_row_are_dropped_with_all_below() -> None:
    corpus = build(rows("q - P", "q2 q P 0", "a2 q2 A", "a q A 1", "b a A", "c b P"))
    assert paths(corpus) == ["q a"]
    assert dict(corpus.dropped) == {"role order": 4}


def test_tree_that_starts_with_an_assistant_is_dropped() -> None:
    corpus = build(rows("a - A", "q - P", "b q A"))
    assert paths(corpus) == ["q b"]
    assert dict(corpus.dropped) == {"role order": 1}


def test_the_same_row_twice_counts_once() -> None:
    made = rows("q - P", "a q A")
    corpus = build([*made, dict(made[1]), dict(made[0])])
    assert paths(corpus) == ["q a"]
    assert (corpus.trees, corpus.messages) == (1, 4)
    assert dict(corpus.dropped) == {"duplicate row": 2}


def test_two_different_rows_of_one_id_are_refused() -> None:
    made = rows("q - P", "a q A")
    with pytest.raises(DataError) as caught:
        build([*made, made[1] | {"text": "something else"}])
    assert str(caught.value) == (
        "message_id 'a' is in two rows that differ. Remove one of the two rows."
    )


def test_every_message_is_kept_or_counted_once() -> None:
    made = rows(
        "q - P", "a q A 0", "b q A 1", "c nowhere A", "d q P", "e d A", "f q A 2", "g f P",
        f={"deleted": True},
    )  # fmt: skip
    corpus = build(made, paths="all-paths")
    in_paths = {turn.text for c in corpus.conversations for turn in c.turns}
    assert in_paths == {"q", "a", "b"}
    assert sum(corpus.dropped.values()) == len(made) - len(in_paths)


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


def test_all_paths_without_reply() -> None:
    corpus = build(rows("q - P"), paths="all-paths")
    assert (paths(corpus), dict(corpus.dropped)) == ([], {"tree without assistant reply": 1})


# --- order of the rows ----------------------------------------------------------------------------


@pytest.mark.parametrize("rule", ["best-path", "all-paths"])
def test_order_of_the_rows_below_a_root_does_not_matter(rule: str) -> None:
    made = rows("q - P", "a0 q A 0", "a1 q A 1", "p a0 P -", "o a0 P -", "b p A", "c o A",
                p={"created_date": "2"}, o={"created_date": "1"})  # fmt: skip
    expected = build(made, paths=rule)
    for order in itertools.permutations(made):
        corpus = build(order, paths=rule)
        assert corpus == expected


# --- the schema of a row --------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["message_id", "text", "role"])
def test_missing_field_is_told_with_those_that_are_there(name: str) -> None:
    row = message("q", None, "P")
    del row[name]
    with pytest.raises(DataError) as caught:
        check_row(row, "rows.jsonl, line 7")
    assert caught.value.problem == (
        f"rows.jsonl, line 7: field '{name}' is missing; the fields are {', '.join(row)}"
    )


@pytest.mark.parametrize(
    ("row", "form"),
    [
        ({"instruction": "", "input": "", "output": ""}, "Alpaca's form"),
        ({"conversations": [], "id": 1}, "ShareGPT's form"),
        ({"messages": []}, "chat messages"),
        ({"prompt": "", "completion": ""}, "prompts with completions"),
        ({"chosen": "", "rejected": ""}, "pairs of preference"),
        ({"text": "", "source": ""}, "plain text"),
    ],
)
def test_rows_of_another_form_are_told_by_its_name(row: Row, form: str) -> None:
    with pytest.raises(DataError) as caught:
        check_row(row, "rows.jsonl, line 7")
    assert caught.value.problem.endswith(f"the fields are {', '.join(row)}, as in {form}")


@pytest.mark.parametrize("null", [None, math.nan, ""])
@pytest.mark.parametrize(
    "name", ["parent_id", "lang", "rank", "deleted", "review_result", "created_date"]
)
def test_null_is_null_in_any_form(name: str, null: object) -> None:
    row = message("q", None, "P")
    absent = {key: value for key, value in row.items() if key != name}
    assert check_row(row | {name: null}, "")[name] is None
    assert check_row(row | {name: null}, "") == check_row(absent, "")


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
    checked = check_row(message("q", None, "P") | change, "")
    assert checked[field] == value and type(checked[field]) is type(value)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"text": 5}, "field 'text' is 5"),
        ({"message_id": None}, "field 'message_id' is null"),
        ({"message_id": ["q"]}, "field 'message_id' is ['q']"),
        ({"message_id": 10**400}, "field 'message_id' is 10"),
        ({"parent_id": 1.5}, "field 'parent_id' is 1.5"),
        ({"deleted": "perhaps"}, "field 'deleted' is 'perhaps'"),
        ({"review_result": 2}, "field 'review_result' is 2"),
        ({"text": "ab\ud800"}, "character 3 of field 'text' is half of a surrogate pair"),
    ],
)
def test_field_that_cannot_be_understood(change: Row, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        check_row(message("q", None, "P") | change, "rows.jsonl, line 7")
    assert caught.value.problem.startswith(f"rows.jsonl, line 7: {problem}")
    assert len(str(caught.value)) <= 500


def test_nan_rank_is_no_rank() -> None:
    rows = [
        message("q", None, "P"),
        message("bad", "q", "A") | {"rank": 1},
        message("unranked", "q", "A") | {"rank": math.nan},
        message("best", "q", "A") | {"rank": 0},
    ]
    for order in itertools.permutations(rows):
        corpus = build([check_row(row, "") for row in order])
        assert corpus.conversations[0].turns[1].text == rows[3]["text"]


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
    def rows(first: object, second: object) -> list[Row]:
        replies = [message("a", "q", "A"), message("b", "q", "A")]
        return [
            message("q", None, "P"),
            replies[0] | {"created_date": first, "rank": None},
            replies[1] | {"created_date": second, "rank": None},
        ]

    for given, best in ((rows(early, late), "a"), (rows(late, early), "b")):
        corpus = build([check_row(row, "") for row in given])
        assert corpus.conversations[0].turns[1].text == message(best, "q", "A")["text"]
        assert corpus.resolved == {"earliest of several unranked siblings": 1}


def test_what_cannot_be_read_where_it_only_orders_is_null_and_counted() -> None:
    rows = [
        message("q", None, "P"),
        message("a", "q", "A") | {"rank": "first", "created_date": "yesterday"},
        message("b", "q", "A") | {"rank": None, "created_date": {"day": 1}},
    ]
    corpus = build([check_row(row, "") for row in rows])
    assert corpus.resolved["unreadable rank"] == 1
    assert corpus.resolved["unreadable created_date"] == 2
    assert corpus.conversations[0].turns[1].text == rows[1]["text"]


def test_unknown_role_and_no_object() -> None:
    with pytest.raises(DataError) as role:
        check_row(message("q", None, "P") | {"role": "user"}, "rows.jsonl, line 7")
    assert str(role.value) == (
        "rows.jsonl, line 7: field 'role' is 'user'. It must be 'prompter' or 'assistant'."
    )
    with pytest.raises(DataError) as kind:
        check_row(["q"], "rows.jsonl, line 7")
    assert kind.value.problem == "rows.jsonl, line 7: expected an object, found list"


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

    replies = [row for row in made if row["role"] == "assistant"]
    assert len(every.conversations) == len(replies) == 1388
    assert Counter(tuple(t.text for t in c.turns) for c in every.conversations) == Counter(
        texts_up_to(row) for row in replies
    )
    # Each of the 953 leaves is a reply, so none of the file's conversations is missing.
    inner = {row["parent_id"] for row in made}
    assert sum(row["message_id"] not in inner for row in replies) == 953

    english = build(read_rows(path))
    assert len(english.conversations) == 338
    assert dict(english.dropped) == {"language": sum(row["lang"] != "en" for row in made)}


def test_real_oasst2_trees(shared_data: Path) -> None:
    path = shared_data / "oasst" / "oasst2_trees_sample.jsonl"
    corpus = build(read_rows(path), languages=None)
    # 27 of the 787 rows stand there twice, 8 of them roots.
    assert (corpus.messages, corpus.trees, len(corpus.conversations)) == (787, 267, 57)
    assert dict(corpus.dropped) == {
        "deleted": 12,
        "review_result false": 16,
        "duplicate row": 27,
        "tree without assistant reply": 200,
    }
    assert dict(corpus.resolved) == {
        "earliest of several unranked siblings": 9,
        "prompter turn cut from the end": 18,
    }
    for conversation in corpus.conversations:
        roles = [turn.role for turn in conversation.turns]
        assert roles == ["user", "assistant"] * (len(roles) // 2)
        assert [t.supervised for t in conversation.turns] == [r == "assistant" for r in roles]

    shuffled = list(read_rows(path))
    random.Random(0).shuffle(shuffled)
    again = build(shuffled, languages=None)
    assert set(paths(again)) == set(paths(corpus))
    assert (again.dropped, again.resolved) == (corpus.dropped, corpus.resolved)
