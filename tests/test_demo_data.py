"""The embedded demo set keeps what the README says of it."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from qlora_harness.data.oasst1 import build_conversations
from qlora_harness.data.sources import DEMO_ROWS
from qlora_harness.locations import demo_dir

Row = dict[str, Any]

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


def test_conversations_and_a_drop_for_every_reason_a_newcomer_should_see(rows: list[Row]) -> None:
    corpus = build_conversations(rows)
    assert len(corpus.conversations) >= 60
    assert max(len(c.turns) for c in corpus.conversations) >= 4
    assert set(corpus.dropped) == {
        "deleted", "review_result false", "language", "orphan", "tree without assistant reply",
    }  # fmt: skip


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
