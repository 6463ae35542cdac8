"""The embedded demo set keeps what the README says of it."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from typing import Any

import pytest

from qlora_harness.data.oasst1 import build_conversations
from qlora_harness.data.sources import DEMO_FILE
from qlora_harness.locations import demo_dir

# The columns of OpenAssistant/oasst1 that say something about a message.
COLUMNS = {
    "message_id",
    "parent_id",
    "user_id",
    "created_date",
    "text",
    "role",
    "lang",
    "review_count",
    "review_result",
    "deleted",
    "rank",
    "synthetic",
    "model_name",
    "message_tree_id",
    "tree_state",
}

QUESTION = re.compile(r"\A.+(?:\n.+)*?\nA\. .+\nB\. .+\nC\. .+\nD\. .+\nAnswer:(?: [ABCD])?\Z")


@pytest.fixture(scope="module")
def rows() -> list[dict[str, Any]]:
    text = (demo_dir() / DEMO_FILE).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def questions() -> list[dict[str, Any]]:
    path = demo_dir() / "five_shot_mmlu_demo.json"
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- conversations --------------------------------------------------------------------------------


def test_rows_have_the_schema_of_oasst1(rows: list[dict[str, Any]]) -> None:
    assert all(set(row) == COLUMNS for row in rows)
    by_id = {row["message_id"]: row for row in rows}
    assert len(by_id) == len(rows)
    for row in rows:
        parent = by_id.get(row["parent_id"])
        assert (row["parent_id"] is None) == (row["message_tree_id"] == row["message_id"])
        if parent is not None:
            assert parent["message_tree_id"] == row["message_tree_id"]
            assert parent["role"] != row["role"]


def test_at_least_60_trees_give_a_conversation(rows: list[dict[str, Any]]) -> None:
    corpus = build_conversations(rows)
    assert len(corpus.conversations) >= 60
    assert max(len(c.turns) for c in corpus.conversations) >= 4


def test_siblings_have_the_ranks_0_to_n_and_lone_replies_none(
    rows: list[dict[str, Any]],
) -> None:
    siblings = defaultdict(list)
    for row in rows:
        if row["parent_id"] is not None:
            siblings[row["parent_id"]].append(row["rank"])
    several = [ranks for ranks in siblings.values() if len(ranks) > 1]
    assert len(several) >= 10
    ranked = [ranks for ranks in several if None not in ranks]
    assert len(ranked) >= 10
    assert all(sorted(ranks) == list(range(len(ranks))) for ranks in ranked)
    assert all(ranks == [None] for ranks in siblings.values() if len(ranks) == 1)


def test_some_are_dropped_for_every_reason_a_newcomer_should_see(
    rows: list[dict[str, Any]],
) -> None:
    dropped = build_conversations(rows).dropped
    for reason in (
        "deleted",
        "review_result false",
        "language",
        "orphan",
        "tree without assistant reply",
    ):
        assert dropped[reason] > 0, reason
    assert "role order" not in dropped
    assert "duplicate row" not in dropped


# --- questions ------------------------------------------------------------------------------------


def test_eight_subjects_of_twelve_questions(questions: list[dict[str, Any]]) -> None:
    assert all(set(question) == {"subject", "input", "output"} for question in questions)
    counts = Counter(question["subject"] for question in questions)
    assert len(counts) == 8
    assert set(counts.values()) == {12}


def test_every_prompt_has_the_form_of_qloras_files(questions: list[dict[str, Any]]) -> None:
    for question in questions:
        header, *blocks = question["input"].split("\n\n")
        subject = question["subject"].replace("_", " ")
        # Two spaces, as in QLoRA's own files.
        assert header == (
            f"The following are multiple choice questions (with answers) about  {subject}."
        )
        assert len(blocks) == 6
        assert all(QUESTION.match(block) for block in blocks), blocks
        assert all(re.search(r"Answer: [ABCD]\Z", block) for block in blocks[:5])
        assert blocks[5].endswith("\nAnswer:")
        assert question["output"] in {"A", "B", "C", "D"}


def test_the_five_shots_are_those_of_the_subject_and_no_test_question(
    questions: list[dict[str, Any]],
) -> None:
    shots = defaultdict(set)
    asked = defaultdict(list)
    for question in questions:
        prefix, _, last = question["input"].rpartition("\n\n")
        shots[question["subject"]].add(prefix)
        asked[question["subject"]].append(last)
    assert all(len(prefixes) == 1 for prefixes in shots.values())
    for subject, last in asked.items():
        assert len(set(last)) == 12
        stems = {block.split("\nA. ")[0] for block in last}
        (prefix,) = shots[subject]
        assert not stems & {block.split("\nA. ")[0] for block in prefix.split("\n\n")}


def test_answers_are_spread_over_the_letters(questions: list[dict[str, Any]]) -> None:
    counts = Counter(question["output"] for question in questions)
    assert set(counts) == {"A", "B", "C", "D"}
    assert min(counts.values()) >= 0.15 * len(questions)
    shots = Counter(
        letter for q in questions[::12] for letter in re.findall(r"Answer: ([ABCD])", q["input"])
    )
    assert set(shots) == {"A", "B", "C", "D"}
