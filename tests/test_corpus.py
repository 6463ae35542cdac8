"""A run's data from name to examples: the split by tree, and the report that is stored."""

from __future__ import annotations

import gc
import json
import random
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from conftest import BOS, EOS, token_ids
from transformers import AutoTokenizer

from qlora_harness.data.corpus import TrainingData, load_training_data, split_by_tree
from qlora_harness.data.examples import IGNORE, Example, fingerprint
from qlora_harness.data.reading import parse_languages
from qlora_harness.errors import DataError
from qlora_harness.settings import DataSettings

Row = dict[str, Any]
Loader = Callable[..., TrainingData]


def forest(trees: int, per_tree: int = 1) -> Any:
    return np.repeat(np.arange(trees), per_tree)


def hashed(examples: Iterable[Example]) -> str:
    return fingerprint((np.array(e.input_ids), np.array(e.labels)) for e in examples)


# --- the split ------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(5))
def test_no_tree_stands_on_both_sides(seed: int) -> None:
    trees = forest(20, per_tree=3)
    train, held_out = split_by_tree(trees, 0.25, seed)
    assert set(trees[train]) & set(trees[held_out]) == set()
    assert (len(train), len(held_out)) == (45, 15)
    # Both sides keep the order of the file, and together they are everything.
    assert train.tolist() == sorted(train)
    assert held_out.tolist() == sorted(held_out)
    assert sorted([*train, *held_out]) == list(range(60))


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
        *pair("t1", "q", "yes"), *pair("t2", "q", "x" * 100), *pair("t3", "q" * 100, "no"),
        *pair("t4", "Frage", "ja", lang="de"), *pair("t5", "q", "gone", deleted=True),
        pair("t6", "q", "")[0],
    ]  # fmt: skip
    data = load(rows)
    # " ### Human: q### Assistant:" is 26 tokens, so a reply has room for 64 - 1 - 26 = 37.
    assert len(token_ids(" ### Human: q### Assistant:")) == 26
    examples = [example_ids("q", "yes"), example_ids("q", "x" * 100)[:64]]
    assert [e.input_ids for e in data.train] == examples
    assert list(data.evaluation) == []
    split = {
        "conversations": 2, "turns": 4, "tokens": (1 + 26 + 4 + 1) + 64,
        "supervised_tokens": (4 + 1) + 37, "truncated": 1, "without_supervised_token": 1,
        "fingerprint": hashed(data.train),
    }  # fmt: skip
    assert data.report == {
        "dataset": str(tmp_path / "rows.jsonl"), "revision": None,
        "source": str(tmp_path / "rows.jsonl"), "languages": "en", "conversations": "best-path",
        "evaluation_source": "0 of the trees", "template": "guanaco", "mask": "prompt",
        "leading_bos": [BOS], "commit": None, "form": "oasst", "messages": 11, "trees": 6,
        "dropped": {"deleted": 2, "language": 2, "tree without assistant reply": 1},
        "resolved": {}, "train": split,
        "eval": dict.fromkeys(split, 0) | {"fingerprint": hashed([])},
    }  # fmt: skip
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
    every = {tuple(e.input_ids) for e in (*data.train, *data.evaluation)}
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
        "messages": 4, "trees": 2, "dropped": {"language": 2}, "resolved": {},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("rows", "facts"),
    [
        (
            [*pair("t1", "Frage", "ja", lang="de"), *pair("t2", "q" * 100, "no")],
            ["of 4 rows", "2 language", "token: 1", "--languages", "--max-length"],
        ),
        ([], ["no rows"]),
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


# --- forms and mixtures ---------------------------------------------------------------------------


def write_rows(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def alpaca_rows(count: int, word: str = "q") -> list[Row]:
    return [{"instruction": f"{word}{i}", "input": "", "output": f"r{i}"} for i in range(count)]


def test_data_of_which_nothing_is_left_names_the_first_row(load: Loader, tmp_path: Path) -> None:
    said = [{"from": "gpt", "value": "r"}, {"from": "human", "value": "q"}]
    path = write_rows(tmp_path / "rows.jsonl", [{"conversations": said}] * 2)
    with pytest.raises(DataError) as caught:
        load(path)
    assert f"of 2 rows; dropped: 2 no reply, first {path}, line 1;" in str(caught.value)


def test_other_forms_take_the_same_way(load: Loader, tmp_path: Path) -> None:
    rows = [*alpaca_rows(3), {"instruction": "q", "input": "", "output": ""}]
    data = load(write_rows(tmp_path / "alpaca.jsonl", rows))
    assert [e.input_ids for e in data.train] == [example_ids(f"q{i}", f"r{i}") for i in range(3)]
    report = data.report
    assert (report["form"], report["rows"], report["trees"]) == ("alpaca", 4, 3)
    assert report["dropped"] == {"no reply": 1}


def test_rows_of_another_form_are_no_rows_without_a_reply(load: Loader, tmp_path: Path) -> None:
    folder = tmp_path / "two forms"
    folder.mkdir()
    write_rows(folder / "a.jsonl", alpaca_rows(3))
    path = write_rows(folder / "b.jsonl", [{"instruction": "q", "response": "r"}])
    with pytest.raises(DataError) as caught:
        load(folder)
    assert f"{path}, line 1: field 'output' is missing" in str(caught.value)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
def test_columns_beside_a_pair(load: Loader, tmp_path: Path, suffix: str) -> None:
    def write(column: str, *values: Any) -> Path:
        rows = [row | {column: each} for row, each in zip(alpaca_rows(2), values, strict=True)]
        path = tmp_path / f"rows{suffix}"
        if suffix == ".jsonl":
            return write_rows(path, rows)
        datasets.Dataset.from_list(rows).to_parquet(path)
        return path

    assert len(load(write("tools", "[]", None)).train) == 2
    with pytest.raises(DataError, match=r"(line|row) 2: field 'tools'"):
        load(write("tools", "[]", "[{}]"))
    train = load(write("history", [], [["q", "r"]])).train
    assert [example.turns for example in train] == [2, 4]
    assert load(write("system", "", None)).train[0].input_ids == train[0].input_ids
    with pytest.raises(DataError, match=r"(line|row) 2: .* system prompt"):  # guanaco has none
        load(write("system", None, "S"))


@pytest.fixture
def mixed(load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Loader:
    """Loads a mixture of a.jsonl, 40 rows, b.jsonl, 30 rows, and trees.jsonl, 10 trees."""
    monkeypatch.chdir(tmp_path)
    write_rows(Path("a.jsonl"), alpaca_rows(40, "a"))
    write_rows(Path("b.jsonl"), [{"prompt": f"b{i}", "completion": "r"} for i in range(30)])
    write_rows(Path("trees.jsonl"), numbered(*"0123456789"))
    return lambda dataset, **options: load(Path(dataset), **options)


def test_mixture_has_the_proportion_of_its_weights(mixed: Loader) -> None:
    data = mixed("a.jsonl:0.75,b.jsonl:0.15,trees.jsonl:0.1", eval_fraction=0.1)
    # Training has 36, 27 and 9 conversations: 36 / 0.75 = 48 are the most in this proportion.
    report = data.report
    assert report["train"]["mixture"] == [
        {"dataset": "a.jsonl", "conversations": 36, "available": 36},
        {"dataset": "b.jsonl", "conversations": 7, "available": 27},
        {"dataset": "trees.jsonl", "conversations": 4, "available": 9},
    ]
    assert [m["conversations"] for m in report["eval"]["mixture"]] == [4, 1, 1]
    assert (len(data.train), len(data.evaluation)) == (47, 6)
    assert [(m["dataset"], m["weight"], m["form"]) for m in report["mixture"]] == [
        ("a.jsonl", 0.75, "alpaca"),
        ("b.jsonl", 0.15, "prompt-completion"),
        ("trees.jsonl", 0.1, "oasst"),
    ]
    assert (report["rows"], report["form"]) == (90, "alpaca, prompt-completion, oasst")
    assert report["train"]["fingerprint"] == hashed(data.train)
    every = {tuple(e.input_ids) for e in (*data.train, *data.evaluation)}
    assert len(every) == 53
    json.dumps(report)


def test_prompts_held_out_of_one_part_are_not_trained_on_in_another(mixed: Loader) -> None:
    write_rows(
        Path("b.jsonl"), [{"prompt": f" a{i}\n", "completion": "r"} for i in range(39, -1, -1)]
    )
    rows = [{"prompt": f"a{i}", "completion": "r"} for i in range(40)]
    write_rows(Path("a.jsonl"), rows)
    data = mixed("a.jsonl:0.5,b.jsonl:0.5", eval_fraction=0.25)
    # Each part holds out 10 prompts, 10 to 20 different ones in all.
    available = [part["available"] for part in data.report["train"]["mixture"]]
    assert available[0] == available[1] < 30
    assert [part["available"] for part in data.report["eval"]["mixture"]] == [10, 10]
    alone = mixed("a.jsonl", eval_fraction=0.25)
    assert (len(alone.train), len(alone.evaluation)) == (30, 10)


def test_mixture_is_seeded(mixed: Loader) -> None:
    name = "a.jsonl:0.5,b.jsonl:0.5"
    fingerprints = [
        mixed(name, eval_seed=seed, eval_fraction=0).report["train"]["fingerprint"]
        for seed in (0, 0, 1)
    ]
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


@pytest.mark.parametrize(
    ("dataset", "fact"),
    [
        ("a.jsonl:0.5,b.jsonl:0.4", "sum to 0.9"),
        ("a.jsonl:0.5,b.jsonl", "'b.jsonl' has no weight"),
        ("a.jsonl:x,b.jsonl:0.5", "the weight 'x'"),
        ("a.jsonl:-1,b.jsonl:2", "the weight '-1'"),
        ("a.jsonl:nan,b.jsonl:1", "the weight 'nan'"),
        ("a.jsonl:0.5,a.jsonl:0.5", "a.jsonl appears twice"),
        ("a.jsonl:0.5,c.jsonl:0.5", "c.jsonl does not exist"),
        ("a.jsonl:0.5,./a.jsonl:0.5", "a.jsonl and ./a.jsonl are the same data"),
        ("a.jsonl:0.5,empty.jsonl:0.5", "empty.jsonl: no conversation is left"),
    ],
)
def test_mixtures_that_are_refused(mixed: Loader, dataset: str, fact: str) -> None:
    write_rows(Path("empty.jsonl"), [{"prompt": "q", "completion": ""}])
    with pytest.raises(DataError) as caught:
        mixed(dataset)
    assert fact in str(caught.value)


@pytest.mark.parametrize("option", [{"languages": "de"}, {"conversations": "all-paths"}])
def test_settings_of_trees_are_refused_without_trees(mixed: Loader, option: dict[str, str]) -> None:
    [(name, value)] = option.items()
    for dataset in ("a.jsonl", "a.jsonl:0.5,b.jsonl:0.5"):
        with pytest.raises(DataError, match=f"--{name} {value}: it is for trees"):
            mixed(dataset, **option)
    write_rows(Path("trees.jsonl"), numbered(*"0123456789", lang="de"))
    mixture = mixed("a.jsonl:0.5,trees.jsonl:0.5", **{"languages": "de"} | option)
    assert mixture.report["train"]["conversations"] == 20
    assert len(mixed("a.jsonl", languages="all").train) == 40


def test_file_whose_name_looks_like_a_mixture(load: Loader, tmp_path: Path) -> None:
    assert len(load(write_rows(tmp_path / "a:1,b", alpaca_rows(3))).train) == 3


# --- the cache ------------------------------------------------------------------------------------


def test_second_load_reads_no_row(
    load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(20))
    first = load(path, eval_fraction=0.1)
    moved = path.rename(tmp_path / "moved.jsonl")
    with monkeypatch.context() as patch:
        patch.setattr(
            "qlora_harness.data.encoded.read_conversations", lambda *_: pytest.fail("read again")
        )
        again = load(moved, eval_fraction=0.1)
        load(moved, eval_seed=1, eval_fraction=0.2)
    assert list(again.train) == list(first.train)
    assert list(again.evaluation) == list(first.evaluation)
    names = {"dataset": str(path), "source": str(path)}
    assert again.report | names == first.report
    # Whatever changes the examples is in the key.
    for options in ({"template": "alpaca"}, {"max_length": 32}, {"mask": "none"}):
        assert load(moved, **options).report["train"] != load(moved).report["train"]
    write_rows(moved, alpaca_rows(21))
    assert load(moved).report["rows"] == 21


@pytest.mark.parametrize("batch", [1, 7])
def test_batches_encoded_at_once_keep_their_order_and_special_tokens_as_text(
    load: Loader, tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    rows = [
        {"instruction": f"q {i} {tokenizer.eos_token} q" * (i % 5), "input": "", "output": f"r{i}"}
        for i in range(60)
    ]
    whole = load(write_rows(tmp_path / "rows.jsonl", rows), eval_fraction=0.1)
    monkeypatch.setattr("qlora_harness.data.encoded._BATCH", batch)
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", str(tmp_path / "other"))
    thresholds = gc.get_threshold()
    parts = load(tmp_path / "rows.jsonl", eval_fraction=0.1)
    assert (parts.report, list(parts.train)) == (whole.report, list(whole.train))
    assert {list(example.input_ids).count(EOS) for example in parts.train} == {1}
    assert tokenizer.backend_tokenizer.encode_special_tokens is False
    assert gc.get_threshold() == thresholds


def test_a_cache_that_cannot_be_written(
    load: Loader, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = write_rows(tmp_path / "rows.jsonl", alpaca_rows(20))
    cached = load(path, eval_fraction=0.1)
    other = write_rows(tmp_path / "others.jsonl", alpaca_rows(9))
    with monkeypatch.context() as patch:
        patch.setattr("qlora_harness.data.encoded.why_not_writable", lambda _: "read-only")
        assert load(path, eval_fraction=0.1).report == cached.report
        assert not caplog.records
        alone = load(other)
        assert "read-only: every process" in caplog.text
        patch.undo()
        patch.setattr("datasets.config.HF_DATASETS_CACHE", str(path))  # a file
        again = load(other)
    assert alone.report == again.report == load(other).report
