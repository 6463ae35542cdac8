"""The forms of data: what a row becomes, how a form is recognised, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from qlora_harness.data.conversation import Conversation, Turn
from qlora_harness.data.forms import FORMS, recognise
from qlora_harness.data.reading import read_conversations
from qlora_harness.data.rows import DroppedRow, Row
from qlora_harness.data.sources import Split
from qlora_harness.errors import DataError
from qlora_harness.settings import DataSettings, setting_fields

Values = dict[str, Any]

PLACE = "rows.jsonl, line 7"


def user(text: str, context: str = "") -> Turn:
    return Turn("user", text, context=context)


def reply(text: str) -> Turn:
    return Turn("assistant", text, supervised=True)


def unlearned(text: str) -> Turn:
    return Turn("assistant", text)


def read(form: str, values: Values) -> Conversation:
    function = FORMS[form].read
    assert function is not None
    return function(Row(PLACE, values))


def said(who: str, text: object) -> Values:
    return {"from": who, "value": text}


def message(role: str, content: object, **more: object) -> Values:
    return {"role": role, "content": content, **more}


ALPACA = {"instruction": "Add", "input": "1, 2", "output": "3"}
SHAREGPT = {"conversations": [said("human", "q"), said("gpt", "r")]}
MESSAGES = {"messages": [message("user", "q"), message("assistant", "r")]}


# --- what a row becomes ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("form", "values", "turns", "system"),
    [
        ("alpaca", ALPACA, (user("Add", "1, 2"), reply("3")), ""),
        ("alpaca", ALPACA | {"input": None}, (user("Add"), reply("3")), ""),
        ("alpaca", {"instruction": " Hi\n", "output": "a "}, (user(" Hi\n"), reply("a ")), ""),
        (
            "dolly", {"instruction": "q", "context": "c", "response": "r", "category": "x"},
            (user("q", "c"), reply("r")), "",
        ),
        ("prompt-completion", {"prompt": "q", "completion": "r"}, (user("q"), reply("r")), ""),
        ("longform", {"input": "q", "output": "r"}, (user("q"), reply("r")), ""),
        (
            "alpaca", ALPACA | {"system": "s", "history": [["q", "r"]]},
            (user("q"), reply("r"), user("Add", "1, 2"), reply("3")), "s",
        ),
        (
            "question-answer", {"question": "q", "answer": "r", "context": "c"},
            (user("q", "c"), reply("r")), "",
        ),
        (
            "question-response", {"system_prompt": "s", "question": "q", "response": "r"},
            (user("q"), reply("r")), "s",
        ),
        (
            "prompt-completion",
            {
                "prompt": [message("user", "q"), message("assistant", "r"), message("user", "t")],
                "completion": [message("assistant", "u")],
            },
            (user("q"), unlearned("r"), user("t"), reply("u")), "",
        ),
        (
            "sharegpt",
            {
                "conversations": [
                    *(said("system", "s"), said("human", "q"), said("gpt", "r")),
                    *(said("user", "t"), said("assistant", "u"), said("human", "open")),
                ]
            },
            (user("q"), reply("r"), user("t"), reply("u")),
            "s",
        ),
        ("sharegpt", SHAREGPT | {"system": "s"}, (user("q"), reply("r")), "s"),
        (
            "sharegpt", {"conversations": [message("user", "q"), message("assistant", "r")]},
            (user("q"), reply("r")), "",
        ),
        (
            "messages", {"messages": [message("system", "s"), *MESSAGES["messages"]]},
            (user("q"), reply("r")), "s",
        ),
        (
            "messages", {"messages": [message("developer", "s"), *MESSAGES["messages"] * 2]},
            (user("q"), reply("r")) * 2, "s",
        ),
        (
            "messages", {"messages": [message("assistant", "hello"), *MESSAGES["messages"]]},
            (user("q"), reply("r")), "",
        ),
        (
            "messages",
            {
                "messages": [
                    message("user", [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]),
                    message("assistant", "r", weight=0),
                    message("user", "t", weight=1), message("assistant", "u", weight=1),
                    message("user", "v"), message("model", "w", train=False),
                ]
            },
            (user("q!"), unlearned("r"), user("t"), reply("u"), user("v"), unlearned("w")), "",
        ),
        (  # Arrow gives every message the keys of all
            "conversation",
            {
                "conversation": [
                    {"from": "human", "value": "q", "role": None, "content": None},
                    {"from": None, "value": None, "role": "assistant", "content": "r"},
                ]
            },
            (user("q"), reply("r")), "",
        ),
        ("sharegpt", {"conversations": ["q", "r", "open"]}, (user("q"), reply("r")), ""),  # LIMA
        ("guanaco", {"text": "\n### Human: q\n### Assistant: r"}, (user("q"), reply("r")), ""),
        (
            "guanaco",
            {"text": "### Human: q?### Assistant: r\n### Human: t ### Assistant: u### Human: open"},
            (user("q?"), reply("r"), user("t"), reply("u")),
            "",
        ),
        ("text", {"text": "Once "}, (Turn("text", "Once ", supervised=True),), ""),
    ],
)  # fmt: skip
def test_rows_become_conversations(
    form: str, values: Values, turns: tuple[Turn, ...], system: str
) -> None:
    made = read(form, values)
    assert (made.turns, made.system, made.place) == (turns, system, PLACE)


def test_rows_with_the_same_beginning_are_one_tree() -> None:
    trees = [
        read("alpaca", ALPACA | change).tree
        for change in ({}, {"output": "4"}, {"input": "1"}, {"instruction": "Sum"})
    ]
    assert trees[0] == trees[1]
    assert len(set(trees)) == 3


@pytest.mark.parametrize(
    ("form", "values", "reason"),
    [
        ("alpaca", ALPACA | {"output": " \n"}, "no reply"),
        ("alpaca", {"instruction": "q", "output": None}, "no reply"),
        ("alpaca", {"instruction": "", "output": "r"}, "empty prompt"),
        ("sharegpt", {"conversations": []}, "no reply"),
        ("sharegpt", {"conversations": [said("human", "q")]}, "no reply"),
        ("sharegpt", {"conversations": [said("gpt", "r")]}, "no reply"),
        ("sharegpt", {"conversations": [said("human", "q"), said("gpt", None)]}, "no reply"),
        ("prompt-completion", {"prompt": "q", "completion": "r", "label": False}, "label false"),
        ("sharegpt", {"conversations": [said("human", "q"), said("user", "q")]}, "role order"),
        ("messages", {"messages": [*MESSAGES["messages"], message("system", "s")]}, "role order"),
        ("messages", {"messages": [message("user", "q"), message("assistant", "")]}, "no reply"),
        ("guanaco", {"text": "Hello ### Human: q### Assistant: r"}, "text before the first turn"),
        ("text", {"text": "\n"}, "empty text"),
    ],
)  # fmt: skip
def test_rows_that_are_left_out(form: str, values: Values, reason: str) -> None:
    with pytest.raises(DroppedRow) as caught:
        read(form, values)
    assert caught.value.reason == reason


@pytest.mark.parametrize(
    ("form", "values", "problem"),
    [
        ("alpaca", ALPACA | {"output": 3}, "field 'output' is 3"),
        ("alpaca", ALPACA | {"input": ["1"]}, "field 'input' is ['1']"),
        ("text", {"text": "\ud800"}, "field 'text' has half of a surrogate pair as character 1"),
        ("sharegpt", {"conversations": "q"}, "field 'conversations' is 'q'"),
        ("sharegpt", {"conversations": [3]}, "conversations[0] is 3"),
        ("messages", {"messages": [{"user": "q"}]}, "messages[0] has the keys ['user']"),
        ("alpaca", ALPACA | {"history": ["q"]}, "field 'history' has 'q'"),
        ("sharegpt", {"conversations": [said("alien", "q")]}, "conversations[0].from is 'alien'"),
        (
            "sharegpt",
            {"conversations": [said("human", "q"), said("observation", "r")]},
            "conversations[1].from is 'observation': no template holds tool turns",
        ),
        (
            "messages",
            {"messages": [message("user", [{"type": "image_url"}])]},
            "messages[0].content[0] is {'type': 'image_url'}",
        ),
        (
            "messages",
            {"messages": [message("user", "q"), message("tool", "r")]},
            "messages[1].role is 'tool': no template holds tool turns",
        ),
        (
            "messages",
            {"messages": [message("user", "q"), message("assistant", None, tool_calls=[{}])]},
            "messages[1].tool_calls is [{}]: no template holds tool turns",
        ),
        (
            "messages",
            {"messages": [message("user", "q"), message("assistant", "r", weight=0.5)]},
            "messages[1].weight is 0.5",
        ),
        (
            "sharegpt",
            {"system": "s", "conversations": [said("system", "t"), *SHAREGPT["conversations"]]},
            "two system prompts, 's' and 't'",
        ),
    ],
)
def test_rows_that_are_refused_with_place_and_key(form: str, values: Values, problem: str) -> None:
    with pytest.raises(DataError) as caught:
        read(form, values)
    assert caught.value.problem.startswith(f"{PLACE}: {problem}")


# --- recognition ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "form"),
    [
        ({"message_id": "1", "text": "q", "role": "prompter"}, "oasst"),
        (ALPACA, "alpaca"),
        (ALPACA | {"text": "Below is an instruction"}, "alpaca"),  # as tatsu-lab/alpaca has it
        ({"instruction": "q", "output": "r"}, "alpaca"),
        ({"instruction": "", "context": "", "response": "", "category": ""}, "dolly"),
        (SHAREGPT | {"id": 1}, "sharegpt"),
        (MESSAGES | {"prompt": "q", "prompt_id": 1}, "messages"),
        ({"prompt": "", "completion": ""}, "prompt-completion"),
        ({"input": "", "output": "", "source": "", "subset": ""}, "longform"),
        ({"prompt": "", "response": "", "": 0}, "prompt-response"),
        ({"question": "", "answer": "", "id": 1}, "question-answer"),
        ({"query": "", "response": "", "type": ""}, "query-response"),
        ({"inputs": "", "targets": ""}, "inputs-targets"),
        ({"conversation": [], "model": ""}, "conversation"),
        ({"message_tree_id": "1", "prompt": {}}, "oasst-trees"),
        (MESSAGES | {"chosen": [], "rejected": []}, "messages"),
        ({"text": "### Human: q### Assistant: r"}, "guanaco"),
        ({"text": "Once upon a time"}, "text"),
    ],
)
def test_forms_are_recognised_by_their_columns(values: Values, form: str) -> None:
    assert recognise(Row(PLACE, values)).name == form
    assert recognise(Row(PLACE, values), form).name == form


@pytest.mark.parametrize(
    ("values", "name", "facts"),
    [
        ({"prompt": "", "chosen": "", "rejected": ""}, "auto", ["'chosen'", "'rejected'"]),
        ({"foo": "", "bar": ""}, "auto", ["foo, bar"]),
        ({}, "auto", ["none"]),
        (MESSAGES | {"tools": "[{}]"}, "messages", ["field 'tools'"]),
        (MESSAGES | SHAREGPT, "auto", ["sharegpt and messages", "--format"]),
        (MESSAGES | {"text": "q"}, "auto", ["messages and text"]),
        (ALPACA, "messages", ["field 'messages'", "--format messages", "instruction, input"]),
    ],
)
def test_rows_without_one_form_are_refused(values: Values, name: str, facts: list[str]) -> None:
    with pytest.raises(DataError) as caught:
        recognise(Row(PLACE, values), name)
    assert all(fact in str(caught.value) for fact in (PLACE, *facts))


def test_every_form_is_a_choice_of_the_settings() -> None:
    assert {"auto", *FORMS} == set(setting_fields()["format"][1].metadata["choices"])


# --- reading --------------------------------------------------------------------------------------


def test_what_is_left_out_is_counted_with_its_first_place() -> None:
    outputs = ["r", "", "s", None, "t"]
    rows = [Row(f"row {i}", ALPACA | {"output": text}) for i, text in enumerate(outputs)]
    reading = read_conversations(Split(rows), DataSettings(), "rows")
    assert [c.turns[1].text for c in reading.conversations] == ["r", "s", "t"]
    assert (reading.form.name, reading.corpus.messages, reading.corpus.trees) == ("alpaca", 5, 3)
    assert dict(reading.corpus.dropped) == {"no reply": 2}
    assert reading.first == {"no reply": "row 1"}


def test_turns_cut_from_both_ends_are_counted() -> None:
    turns = [said("gpt", "hello"), *SHAREGPT["conversations"], said("human", "t")]
    rows = [Row("row", {"conversations": turns})]
    reading = read_conversations(Split(rows), DataSettings(), "rows")
    assert [len(c.turns) for c in reading.conversations] == [2]
    assert dict(reading.corpus.resolved) == {
        "reply cut from the start and user turn cut from the end": 1
    }


def test_nested_trees_are_read_as_their_messages() -> None:
    def node(name: str, role: str, *replies: Values, rank: int | None = None) -> Values:
        return {
            **{"message_id": name, "role": role, "text": name},
            **{"rank": rank, "replies": list(replies)},
        }

    tree = node(
        "q", "prompter", node("worse", "assistant", rank=1),
        node("r", "assistant", node("t", "prompter", node("u", "assistant")), rank=0),
    )  # fmt: skip
    rows = [Row("row", {"message_tree_id": "q", "prompt": tree})]
    reading = read_conversations(Split(rows), DataSettings(languages="all"), "rows")
    assert [c.turns for c in reading.conversations] == [
        (user("q"), reply("r"), user("t"), reply("u"))
    ]
    assert (reading.corpus.messages, reading.corpus.trees) == (5, 1)
    for damaged in ({}, {"prompt": {"replies": 1}}):
        split = Split([*rows, Row("damaged", damaged)])
        reading = read_conversations(split, DataSettings(), "rows")
        with pytest.raises(DataError, match="damaged"):
            list(reading.conversations)


@pytest.mark.parametrize("suffix", ["jsonl", "csv", "parquet"])
def test_files_of_every_kind_hold_forms(tmp_path: Path, suffix: str) -> None:
    import pandas

    from qlora_harness.data.files import read_rows

    frame = pandas.DataFrame([ALPACA, ALPACA | {"input": "", "output": "None"}])
    path = tmp_path / f"rows.{suffix}"
    if suffix == "jsonl":
        path.write_text("\n".join(json.dumps(row) for row in frame.to_dict("records")))
    elif suffix == "csv":
        frame.to_csv(path, index=False)
    else:
        frame.to_parquet(path)
    made = [read("alpaca", dict(row.values)).turns for row in read_rows(path)]
    assert made == [(user("Add", "1, 2"), reply("3")), (user("Add"), reply("None"))]
