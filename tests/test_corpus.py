"""A run's data from name to examples: the split by tree, and the report that is stored."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import BOS, EOS, token_ids
from transformers import AutoTokenizer

from qlora_harness.data.chat_encoder import IGNORE, fingerprint
from qlora_harness.data.conversation import Conversation, Turn
from qlora_harness.data.corpus import (
    TrainingData,
    load_training_data,
    parse_languages,
    split_by_tree,
)
from qlora_harness.errors import DataError
from qlora_harness.settings import DataSettings

Row = dict[str, Any]
Loader = Callable[..., TrainingData]


def forest(trees: int, per_tree: int = 1) -> list[Conversation]:
    turns = (Turn("user", "q"), Turn("assistant", "a", True))
    return [Conversation(f"t{tree}", turns) for tree in range(trees) for _ in range(per_tree)]


# --- the split ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_no_tree_stands_on_both_sides(seed: int) -> None:
    conversations = forest(20, per_tree=3)
    train, held_out = split_by_tree(conversations, 0.25, seed)
    assert {c.tree for c in train} & {c.tree for c in held_out} == set()
    assert (len(train), len(held_out)) == (45, 15)
    # Both sides keep the order of the file, and together they are everything.
    assert train == [c for c in conversations if c in train]
    assert sorted(c.tree for c in train + held_out) == sorted(c.tree for c in conversations)


@pytest.mark.parametrize(
    ("trees", "fraction", "held_out"),
    [
        (100, 0.05, 5),
        (953, 0.05, 48),
        (10, 0.05, 1),  # at least one
        (2, 0.05, 1),
        (1, 0.5, 0),  # but never all
        (2, 0.5, 1),
        (10, 0.0, 0),
        (0, 0.05, 0),
    ],
)
def test_sizes(trees: int, fraction: float, held_out: int) -> None:
    train, evaluation = split_by_tree(forest(trees), fraction, 0)
    assert (len(train), len(evaluation)) == (trees - held_out, held_out)


def test_split_is_seeded() -> None:
    def chosen(seed: int) -> set[str]:
        return {c.tree for c in split_by_tree(forest(100), 0.05, seed)[1]}

    assert chosen(0) == chosen(0)
    assert chosen(0) != chosen(1)


@pytest.mark.parametrize(
    ("text", "codes"),
    [("en", ("en",)), ("en,de", ("en", "de")), (" en , pt-BR,", ("en", "pt-BR")), ("all", None)],
)
def test_languages(text: str, codes: tuple[str, ...] | None) -> None:
    assert parse_languages(text) == codes


def test_all_languages_beside_others_is_refused() -> None:
    with pytest.raises(DataError, match="--languages all,en: 'all'"):
        parse_languages("all,en")


# --- the report -----------------------------------------------------------------------------------


def pair(tree: str, question: str, answer: str, **more: Any) -> list[Row]:
    common = {"lang": "en"} | more
    return [
        {"message_id": tree, "parent_id": None, "role": "prompter", "text": question} | common,
        {"message_id": f"{tree}-a", "parent_id": tree, "role": "assistant", "text": answer}
        | common,
    ]


def numbered(*answers: str, **more: Any) -> list[Row]:
    return [row for i, answer in enumerate(answers) for row in pair(f"t{i}", "q", answer, **more)]


@pytest.fixture
def tokenizer(tiny_tokenizer: Path) -> Any:
    return AutoTokenizer.from_pretrained(str(tiny_tokenizer))


@pytest.fixture
def load(tokenizer: Any, tmp_path: Path) -> Loader:
    def run(rows: list[Row] | Path, **options: Any) -> TrainingData:
        path = rows if isinstance(rows, Path) else tmp_path / "rows.jsonl"
        if isinstance(rows, list):
            path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        options = {"max_length": 64, "eval_fraction": 0.0} | options
        return load_training_data(tokenizer, DataSettings(dataset=str(path), **options))

    return run


def example_ids(question: str, answer: str) -> list[int]:
    return [BOS, *token_ids(f" ### Human: {question}### Assistant: {answer}"), EOS]


def test_report_counts_everything_by_hand(load: Loader, tmp_path: Path) -> None:
    rows = [
        *pair("t1", "q", "yes"),
        *pair("t2", "q", "x" * 100),
        *pair("t3", "q" * 100, "no"),
        *pair("t4", "Frage", "ja", lang="de"),
        *pair("t5", "q", "gone", deleted=True),
        pair("t6", "q", "")[0],
    ]
    data = load(rows)
    # " ### Human: q### Assistant:" is 26 tokens, so a reply has room for 64 - 1 - 26 = 37.
    assert len(token_ids(" ### Human: q### Assistant:")) == 26
    examples = [example_ids("q", "yes"), example_ids("q", "x" * 100)[:64]]
    assert [e.input_ids for e in data.train] == examples
    assert data.evaluation == []
    split = {
        "conversations": 2,
        "turns": 4,
        "tokens": (1 + 26 + 4 + 1) + 64,
        "supervised_tokens": (4 + 1) + 37,
        "truncated": 1,
        "without_supervised_token": 1,
        "fingerprint": fingerprint(data.train),
    }
    assert data.report == {
        "dataset": str(tmp_path / "rows.jsonl"),
        "revision": None,
        "source": str(tmp_path / "rows.jsonl"),
        "languages": "en",
        "conversations": "best-path",
        "evaluation_source": "0 of the trees",
        "template": "guanaco",
        "mask": "prompt",
        "leading_bos": [BOS],
        "messages": 11,
        "trees": 6,
        "dropped": {"deleted": 2, "language": 2, "tree without assistant reply": 1},
        "resolved": {},
        "train": split,
        "eval": dict.fromkeys(split, 0) | {"fingerprint": fingerprint([])},
    }
    assert json.loads(json.dumps(data.report)) == data.report


def test_every_setting_of_the_data_is_heeded(
    tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = numbered(*(f"antwort {i}" for i in range(4)), lang="de")
    requests = []

    def load_dataset(path: str, revision: str | None) -> dict[str, list[Row]]:
        requests.append((path, revision))
        return {"train": rows}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    encoding: dict[str, Any] = {"template": "alpaca", "max_length": 40, "mask": "none"}
    shared = {"languages": "de", "eval_fraction": 0.5}
    source = {"dataset": "someone/rows", "dataset_revision": "abc", "conversations": "all-paths"}
    data = load_training_data(tokenizer, DataSettings(**(encoding | shared | source)))
    assert requests == [("someone/rows", "abc")]
    assert data.train[0].labels[:4] == [IGNORE, *data.train[0].input_ids[1:4]]
    assert (len(data.train), len(data.evaluation)) == (2, 2)
    assert data.report["train"]["truncated"] == 2


def test_share_of_the_trees_is_held_out(load: Loader) -> None:
    rows = numbered(*(f"answer {i}" for i in range(20)))
    data = load(rows, eval_fraction=0.1)
    assert (len(data.train), len(data.evaluation)) == (18, 2)
    assert data.report["evaluation_source"] == "0.1 of the trees"
    assert load(rows, eval_fraction=0.1).report == data.report
    every = {tuple(e.input_ids) for e in data.train + data.evaluation}
    assert every == {tuple(example_ids("q", f"answer {i}")) for i in range(20)}
    assert "validation" not in data.report


def test_seed_chooses_the_held_out_trees(load: Loader) -> None:
    rows = numbered(*(f"answer {i}" for i in range(20)))

    def held_out(**settings: Any) -> list[int]:
        data = load(rows, eval_fraction=0.1, **settings)
        seed = settings.get("eval_seed", 0)
        source = f"0.1 of the trees, seed {seed}" if seed else "0.1 of the trees"
        assert data.report["evaluation_source"] == source
        replies = [example_ids("q", f"answer {i}") for i in range(20)]
        return [replies.index(e.input_ids) for e in data.evaluation]

    # What Python's Random draws: 0 is the seed of every earlier run.
    for seed in (0, 1, 2**32 - 1):
        assert held_out(eval_seed=seed) == sorted(random.Random(seed).sample(range(20), 2))
    assert held_out() == held_out(eval_seed=0) == [12, 13]


def test_all_paths_of_a_held_out_tree_are_held_out(load: Loader) -> None:
    rows = []
    for i in range(10):
        rows += pair(f"t{i}", f"question {i}", "first")
        rows.append(rows[-1] | {"message_id": f"t{i}-b", "text": "second"})
    data = load(rows, conversations="all-paths", eval_fraction=0.2)
    assert (len(data.train), len(data.evaluation)) == (16, 4)
    held_out = {tuple(e.input_ids) for e in data.evaluation}
    both = [
        {tuple(example_ids(f"question {i}", answer)) for answer in ("first", "second")}
        for i in range(10)
    ]
    assert sum(replies <= held_out for replies in both) == 2


def test_validation_split_of_the_data_set_is_used_whole(load: Loader, tmp_path: Path) -> None:
    german = pair("v2", "q", "vielleicht", lang="de")
    splits = {"train": numbered("yes", "no"), "validation": [*pair("v1", "q", "maybe"), *german]}
    datasets.DatasetDict(
        {name: datasets.Dataset.from_list(rows) for name, rows in splits.items()}
    ).save_to_disk(str(tmp_path / "saved"))
    data = load(tmp_path / "saved", eval_fraction=0.5)
    assert [e.input_ids for e in data.train] == [example_ids("q", "yes"), example_ids("q", "no")]
    assert [e.input_ids for e in data.evaluation] == [example_ids("q", "maybe")]
    assert data.report["evaluation_source"] == "validation split"
    assert data.report["dropped"] == {}
    assert data.report["validation"] == {
        "messages": 4,
        "trees": 2,
        "dropped": {"language": 2},
        "resolved": {},
    }


@pytest.mark.parametrize(
    ("rows", "facts"),
    [
        (
            [*pair("t1", "Frage", "ja", lang="de"), *pair("t2", "q" * 100, "no")],
            ["of 4 messages", "2 language", "token: 1", "--languages", "--max-length"],
        ),
        ([], ["of 0 messages", "dropped: none"]),
        # Two rows that differ share an id.
        ([*pair("t1", "q", "yes"), pair("t1", "q", "no")[1]], ["'t1-a'"]),
    ],
)
def test_data_that_cannot_be_trained_on_says_why(
    load: Loader, tmp_path: Path, rows: list[Row], facts: list[str]
) -> None:
    with pytest.raises(DataError) as caught:
        load(rows)
    assert all(fact in str(caught.value) for fact in (str(tmp_path / "rows.jsonl"), *facts))
