"""The embedded demo set keeps what the README says of it."""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from typing import Any

import pytest

from qlora_harness.data.oasst1 import build_conversations
from qlora_harness.data.sources import DEMO_ROWS
from qlora_harness.locations import demo_dir

Row = dict[str, Any]

# The columns of OpenAssistant/oasst1 that say something about a message.
COLUMNS = {
    "message_id", "parent_id", "user_id", "created_date", "text", "role", "lang", "review_count",
    "review_result", "deleted", "rank", "synthetic", "model_name", "message_tree_id", "tree_state",
}  # fmt: skip

QUESTION = re.compile(r"\A.+(?:\n.+)*?\nA\. .+\nB\. .+\nC\. .+\nD\. .+\nAnswer:(?: [ABCD])?\Z")


def json_lines(name: str) -> list[Row]:
    text = (demo_dir() / name).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(scope="module")
def rows() -> list[Row]:
    return json_lines(DEMO_ROWS)


@pytest.fixture(scope="module")
def questions() -> list[Row]:
    return json_lines("five_shot_mmlu_demo.json")


# --- conversations --------------------------------------------------------------------------------


def test_rows_have_the_schema_of_oasst1(rows: list[Row]) -> None:
    assert all(set(row) == COLUMNS for row in rows)
    by_id = {row["message_id"]: row for row in rows}
    assert len(by_id) == len(rows)
    for row in rows:
        parent = by_id.get(row["parent_id"])
        assert (row["parent_id"] is None) == (row["message_tree_id"] == row["message_id"])
        if parent is not None:
            assert parent["message_tree_id"] == row["message_tree_id"]
            assert parent["role"] != row["role"]


def test_conversations_and_a_drop_for_every_reason_a_newcomer_should_see(rows: list[Row]) -> None:
    corpus = build_conversations(rows)
    assert len(corpus.conversations) >= 60
    assert max(len(c.turns) for c in corpus.conversations) >= 4
    assert set(corpus.dropped) == {
        "deleted", "review_result false", "language", "orphan", "tree without assistant reply",
    }  # fmt: skip


def test_siblings_have_the_ranks_0_to_n_and_lone_replies_none(rows: list[Row]) -> None:
    siblings = defaultdict(list)
    for row in rows:
        if row["parent_id"] is not None:
            siblings[row["parent_id"]].append(row["rank"])
    ranked = [ranks for ranks in siblings.values() if len(ranks) > 1 and None not in ranks]
    assert len(ranked) >= 10
    assert all(sorted(ranks) == list(range(len(ranks))) for ranks in ranked)
    assert all(ranks == [None] for ranks in siblings.values() if len(ranks) == 1)


# --- questions ------------------------------------------------------------------------------------


def test_eight_subjects_of_twelve_questions(questions: list[Row]) -> None:
    assert all(set(question) == {"subject", "input", "output"} for question in questions)
    counts = Counter(question["subject"] for question in questions)
    assert len(counts) == 8
    assert set(counts.values()) == {12}


def test_every_prompt_has_the_form_of_qloras_files(questions: list[Row]) -> None:
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


def test_the_five_shots_are_those_of_the_subject_and_no_test_question(questions: list[Row]) -> None:
    shots = defaultdict(set)
    stems = defaultdict(set)
    for question in questions:
        *prefix, last = question["input"].split("\n\n")
        shots[question["subject"]].add(tuple(prefix))
        stems[question["subject"]].add(last.split("\nA. ")[0])
    for subject, prefixes in shots.items():
        (prefix,) = prefixes
        assert len(stems[subject]) == 12
        assert not stems[subject] & {block.split("\nA. ")[0] for block in prefix}


def test_answers_are_spread_over_the_letters(questions: list[Row]) -> None:
    counts = Counter(question["output"] for question in questions)
    assert set(counts) == {"A", "B", "C", "D"}
    assert min(counts.values()) >= 0.15 * len(questions)
    shots = Counter(
        letter for q in questions[::12] for letter in re.findall(r"Answer: ([ABCD])", q["input"])
    )
    assert set(shots) == {"A", "B", "C", "D"}
