"""Where rows come from: JSON Lines, also compressed, folders of `datasets`, the embedded set."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
import random
from collections.abc import Iterable
from datetime import date
from decimal import Decimal
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pytest
from mutations import Reader, damaged_bytes, damaged_value
from pyarrow import parquet

from qlora_harness.data.files import read_rows
from qlora_harness.data.forms import recognise
from qlora_harness.data.oasst1 import build_conversations, check_row
from qlora_harness.data.rows import Row as PlacedRow
from qlora_harness.data.sources import KNOWN_SETS, Split, load_splits
from qlora_harness.errors import DataError

Row = dict[str, Any]

QUESTION: Row = {
    "message_id": "q", "parent_id": None, "created_date": "2023-02-05T14:23:50.983374+00:00",
    "text": "How are you? é\u2028", "role": "prompter", "lang": "en", "review_result": True,
    "deleted": False, "rank": None,
}  # fmt: skip
ANSWER = QUESTION | {
    "message_id": "a", "parent_id": "q", "created_date": "2023-02-05T14:24:50.983374+00:00",
    "text": "Fine.", "role": "assistant", "rank": 0,
}  # fmt: skip
ROWS = [QUESTION, ANSWER]
BAD_ROLE = ANSWER | {"message_id": "b", "role": "user"}


def lines(rows: Iterable[object] = ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


PACKED = gzip.compress(lines().encode() * 50)


FORMS = ["jsonl", "jsonl.gz", "jsonl.xz", "jsonl.bz2", "jsonl.zst", "json", "json.gz", "csv"]
FORMS += ["csv.zst", "parquet"]


def write_form(path: Path, rows: list[Row] = ROWS) -> Path:
    """Writes rows in the form that the file's name says."""
    name = path.name.split(".", 1)[1]
    if name == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if name.startswith("csv"):
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        text = out.getvalue()
    elif name.startswith("jsonl"):
        text = lines(rows)
    else:
        text = json.dumps(rows, indent=None if name == "json" else 1)
    if name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as stream:
            stream.write(text.encode())
        return path
    compress = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}
    path.write_bytes(compress.get(name.rsplit(".", 1)[-1], bytes)(text.encode()))  # type: ignore[operator]
    return path


def save(folder: Path, rows: list[Row] | None = None, **splits: list[Row]) -> Path:
    """Saves rows, or splits of rows, as `datasets` does."""
    saved: Any = datasets.Dataset.from_list(rows or ROWS)
    if splits:
        saved = datasets.DatasetDict(
            {name: datasets.Dataset.from_list(part) for name, part in splits.items()}
        )
    saved.save_to_disk(str(folder))
    return folder


def check(rows: Iterable[PlacedRow]) -> list[Row]:
    """The rows as OASST's form reads them."""
    checked: list[Row] = []
    for row in rows:
        if not checked:
            recognise(row)
        checked.append(dict(check_row(row.values, row.place)))
    return checked


def read(split: Split | None) -> list[Row] | None:
    return None if split is None else check(split.rows)


def check_splits(name: object, train: list[Row], validation: list[Row] | None = None) -> None:
    splits = load_splits(str(name))
    assert (read(splits.train), read(splits.validation)) == (train, validation)
    assert splits.source == str(name)


def problem(name: object, revision: str | None = None) -> str:
    """What is wrong with a data set, in one line."""
    with pytest.raises(DataError) as caught:
        read(load_splits(str(name), revision).train)
    assert "\n" not in str(caught.value)
    return caught.value.problem


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder and the home folder, empty."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


# --- files ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows_alone_and_in_a_folder(tmp_path: Path, form: str) -> None:
    check_splits(write_form(tmp_path / f"rows.{form}"), ROWS)
    folder = tmp_path / "rows[1]*"  # whose name is a pattern
    folder.mkdir()
    write_form(folder / f"train.{form}")
    write_form(folder / f"validation.{form}", ROWS[:1])
    (folder / "README.md").write_text("about")
    check_splits(folder, ROWS, ROWS[:1])


@pytest.mark.parametrize("form", ["jsonl", "json", "csv"])
def test_byte_order_mark_and_windows_line_ends(tmp_path: Path, form: str) -> None:
    path = write_form(tmp_path / f"rows.{form}")
    content = path.read_bytes().replace(b"\r\n", b"\n").replace(b"\n", b"\r\n")
    path.write_bytes(b"\xef\xbb\xbf" + content)
    assert check(read_rows(path)) == ROWS


@pytest.mark.parametrize(
    ("name", "content", "facts"),
    [
        # Empty lines count.
        ("rows.jsonl", "\n" + lines() + "\n\n{}\n", ", line 6: field 'message_id' is missing"),
        ("rows.jsonl", lines() + '{"message_id": "b", \n' + lines(), ", line 3: not valid JSON ("),
        ("rows.jsonl", lines([*ROWS, {"text": "hello"}]), ", line 3: field 'message_id'"),
        ("rows.jsonl", "[1]\n", ", row 1: expected an object, found int"),
        ("rows.jsonl", lines() + "[1]\n", ", line 3: expected an object, found list"),
        ("rows.jsonl", '{"text": 1, "text": 2}\n', ", line 1: not valid JSON (the key 'text' is"),
        ("rows.csv", "message_id,role,text\nq,prompter,a, b\n", ", line 2: 4 cells in 3 columns"),
        ("rows.csv", "message_id,role,text\nq,prompter\n", ", line 2: 2 cells in 3 columns"),
        ("rows.csv", "message_id,text,text\nq,a,b\n", " can't be read: the key 'text' is repeated"),
        ("rows.jsonl", b'{"text": "\xff"}\n', " is not UTF-8 (invalid start byte)"),
        ("rows.jsonl.gz", b"not compressed", " can't be read: Not a gzipped file"),
        ("rows.jsonl.gz", PACKED[:-20], " can't be read: Compressed file ended"),
        ("rows.jsonl.gz", PACKED[:20] + b"\xaa\xbb\xcc\xdd" + PACKED[24:], " can't be read: "),
        ("rows.jsonl.xz", b"not compressed", " can't be read: "),
    ],
)  # fmt: skip
def test_damaged_file_is_told_with_its_line(
    tmp_path: Path, name: str, content: str | bytes, facts: str
) -> None:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    told = problem(path)
    assert told.startswith(f"{path}{facts}")
    assert told.removeprefix(str(path)).count("line") <= 1  # jsonlines would count from 1 again


@pytest.mark.parametrize(
    ("form", "place"),
    [("jsonl", "line 3"), ("json", "row 3"), ("csv", "line 4"), ("parquet", "row 3")],
)
def test_bad_row_of_every_form_is_named_by_number(tmp_path: Path, form: str, place: str) -> None:
    # Line 1 of a csv file is its header.
    path = write_form(tmp_path / f"rows.{form}", [*ROWS, BAD_ROLE])
    assert problem(path) == f"{path}, {place}: field 'role' is 'user'"


def test_nulls_as_csv_has_them(tmp_path: Path) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(
        "message_id,parent_id,text,role,lang,rank,deleted\n"
        "1,None,None,prompter,en,NaN,false\n2,1.0,N/A,assistant,en,0.0,\n"
    )
    first, second = check(read_rows(path))
    assert (first["parent_id"], first["text"], first["rank"]) == (None, "None", None)
    assert (second["parent_id"], second["text"], second["rank"]) == ("1", "N/A", 0.0)


def test_types_and_columns_of_parquet_that_python_does_not_know(tmp_path: Path) -> None:
    columns = {
        "message_id": ["q", "a"], "parent_id": [None, "q"], "text": ["Q", "A"],
        "role": ["prompter", "assistant"], "lang": ["en", "en"], "rank": [None, Decimal("0.0")],
        "created_date": pyarrow.array([2**62, 5], pyarrow.timestamp("us")),
        "seen": pyarrow.array([1, 2], pyarrow.timestamp("s", tz="Nowhere/None")),
        "raw": pyarrow.array([b"\xff", b"\xfe"]).cast(pyarrow.binary()),
    }  # fmt: skip
    path = tmp_path / "rows.data"  # known by its content
    parquet.write_table(pyarrow.table(columns), path)
    first, second = check(read_rows(path))
    assert (first["created_date"], second["created_date"]) == (2**62, 5)
    assert (second["rank"], set(second)) == (0.0, set(ROWS[0]))
    dates = (date(2023, 2, 5), date(2023, 2, 6))
    rows = [row | {"created_date": day} for row, day in zip(ROWS, dates, strict=True)]
    first, second = check(read_rows(write_form(tmp_path / "rows.parquet", rows)))
    assert second["created_date"] - first["created_date"] == 86_400


@pytest.mark.parametrize("name", ["ok.parquet", "array.json"])
def test_shared_files_give_the_rows_of_their_json_lines(shared_cases: Path, name: str) -> None:
    assert check(read_rows(shared_cases / name)) == check(read_rows(shared_cases / "ok.jsonl"))


@pytest.mark.parametrize("name", ["nan_rank.jsonl", "epoch_dates.jsonl", "no_parent_key.jsonl"])
def test_shared_files_give_a_conversation(shared_cases: Path, name: str) -> None:
    corpus = build_conversations(check(read_rows(shared_cases / name)), None)
    assert corpus.conversations
    assert "BAD" not in str(corpus.conversations)


# --- damaged files: conversations or one line, in bounded time ------------------------------------


def random_rows(rng: random.Random) -> list[Row]:
    made: list[Row] = []
    for number in range(rng.randint(1, 6)):
        parent = rng.choice(made)["message_id"] if made and rng.random() < 0.8 else None
        made.append(
            {
                "message_id": f"m{number}",
                "parent_id": parent,
                "text": rng.choice(["Hi", "What?", "é\u2028", "x" * 300]),
                "role": rng.choice(["prompter", "assistant"]),
                "lang": rng.choice(["en", "de"]),
                "rank": rng.choice([None, 0, 1, 2.0]),
                "created_date": rng.choice([None, "2023-02-05T14:23:50+00:00", 1675607030983]),
                "deleted": rng.choice([None, False, True]),
                "review_result": rng.choice([None, True]),
            }
        )
    return made


def fuzz(folder: Path, seed: int, count: int) -> dict[str, int]:
    rng = random.Random(seed)
    reader = Reader()
    for number in range(count):
        form = rng.choice(FORMS)
        made = random_rows(rng)
        if rng.random() < 0.6 and form != "parquet":  # whose columns have one type
            made[rng.randrange(len(made))][rng.choice(list(made[0]))] = damaged_value(rng)
        try:
            path = write_form(folder / f"rows.{form}", made)
        except (ValueError, TypeError):
            continue  # no program can write such a file
        if rng.random() < 0.5:
            path.write_bytes(damaged_bytes(rng, path.read_bytes()))
        languages = rng.choice([None, ("en",)])
        reader.read(
            lambda path=path, languages=languages: build_conversations(  # type: ignore[misc]
                check(load_splits(str(path)).train.rows), languages
            ),
            (seed, number, form),
        )
        path.unlink()
    return reader.outcomes


def test_some_damaged_files(tmp_path: Path) -> None:
    outcomes = fuzz(tmp_path, seed=0, count=400)
    assert min(outcomes["read"], outcomes["refused"]) > 50


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("seed", range(1, 5))
def test_many_damaged_files(tmp_path: Path, seed: int) -> None:
    fuzz(tmp_path, seed=seed, count=10_000)


# --- folders --------------------------------------------------------------------------------------


def test_saved_datasets(tmp_path: Path) -> None:
    check_splits(save(tmp_path / "one"), ROWS)
    check_splits(save(tmp_path / "two", train=ROWS, validation=ROWS[:1]), ROWS, ROWS[:1])
    check_splits(save(tmp_path / "sft", train_gen=ROWS[:1], train_sft=ROWS), ROWS)
    bad = save(tmp_path / "bad", train=[ROWS[0], BAD_ROLE])
    assert problem(bad) == f"{bad}, split train, row 2: field 'role' is 'user'"
    other = save(tmp_path / "other", test=ROWS)
    told = problem(other)
    assert all(fact in told for fact in ("--dataset", str(other), "splits test", "'train'"))


def test_damaged_saved_dataset_is_one_line(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved", ROWS * 20)
    (arrow,) = folder.glob("*.arrow")
    content = arrow.read_bytes()
    at = content.index(b"How are you")
    arrow.write_bytes(content[:at] + b"\xff\xfe" + content[at + 2 :])
    assert str(folder) in problem(folder)


def test_files_of_a_folder_without_splits_in_their_names_are_one_split(tmp_path: Path) -> None:
    assert problem(tmp_path).startswith(f"--dataset: folder {tmp_path} can't be read: ")
    write_form(tmp_path / "a.jsonl", ROWS[:1])
    write_form(tmp_path / "b.csv", ROWS[1:])
    check_splits(tmp_path, ROWS)


# --- names ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "fact"),
    [
        *((name, "does not exist") for name in ("rows.jsonl", "rows.json", "rows.jsonl.gz")),
        *((name, "does not exist") for name in ("./rows", "~/rows", "~nosuchuser/x")),
        ("x" * 300, "File name too long"),
        ("/dev/null", "neither a file nor a folder"),
        ("pipe", "neither a file nor a folder"),
    ],
)
def test_what_can_be_no_data_set_is_not_looked_up_on_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, fact: str
) -> None:
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: pytest.fail("the Hub"))
    os.mkfifo(folder / "pipe")
    told = problem(name)
    assert told.startswith(f"--dataset: {name} ")
    assert fact in told


def test_home_folder_is_understood_as_it_is_for_models(folder: Path) -> None:
    write_form(folder / "rows.jsonl")
    assert read(load_splits("~/rows.jsonl").train) == ROWS


@pytest.mark.parametrize(
    ("name", "hub"),
    [*((name, known.hub) for name, known in KNOWN_SETS.items()), ("someone/rows", "someone/rows")],
)
def test_other_names_are_loaded_from_the_hub(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, hub: str
) -> None:
    requests = []

    def load_dataset(path: str, revision: str | None) -> dict[str, list[Row]]:
        requests.append((path, revision))
        return {"train": ROWS, "validation": ROWS[:1]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = load_splits(name, "abc")
    assert requests == [(hub, "abc")]
    assert (read(splits.train), read(splits.validation)) == (ROWS, ROWS[:1])
    assert splits.source == hub


def test_hub_that_cannot_be_reached_is_one_line(folder: Path) -> None:
    assert problem("someone/rows").startswith("--dataset: 'someone/rows' can't be loaded")


@pytest.mark.parametrize(
    ("name", "local", "hub"),
    [
        ("oasst1", "oasst1", "OpenAssistant/oasst1"),
        ("oasst2", "oasst2", "OpenAssistant/oasst2"),
        ("OpenAssistant/oasst1", "OpenAssistant/oasst1", "OpenAssistant/oasst1"),
        ("oasst1", "OpenAssistant/oasst1", "OpenAssistant/oasst1"),
    ],
)
@pytest.mark.parametrize("kind", ["folder", "file"])
def test_local_data_of_a_known_name_is_taken_and_said(
    folder: Path, caplog: pytest.LogCaptureFixture, name: str, local: str, hub: str, kind: str
) -> None:
    if kind == "folder":
        save(folder / local)
    else:
        (folder / local).parent.mkdir(exist_ok=True)
        (folder / local).write_text(lines(), encoding="utf-8")
    splits = load_splits(name)
    assert (read(splits.train), splits.source) == (ROWS, local)
    (said,) = caplog.messages
    facts = (f"--dataset {name}:", f"local {kind} {local},", f"not {hub} ", f"./{local}")
    assert all(fact in said for fact in facts)
    caplog.clear()
    assert read(load_splits(f"./{local}").train) == ROWS
    assert caplog.messages == []


def test_demo_is_the_embedded_set_also_beside_a_folder_of_that_name(
    folder: Path, caplog: pytest.LogCaptureFixture
) -> None:
    save(folder / "mine")
    write_form(folder / "rows.jsonl")
    for name in ("demo", "mine", "rows.jsonl"):  # which stand for one thing each
        load_splits(name)
    assert caplog.messages == []
    save(folder / "demo")
    splits = load_splits("demo")
    assert (len(list(splits.train.rows)), splits.source) == (291, "embedded oasst_demo.jsonl")
    (said,) = caplog.messages
    assert all(fact in said for fact in ("--dataset demo:", "embedded set", "./demo"))
    caplog.clear()
    assert read(load_splits("./demo").train) == ROWS
    assert caplog.messages == []


@pytest.mark.parametrize(
    ("name", "kind"),
    [("oasst1", "local folder"), ("rows.jsonl", "local file"), ("demo", "embedded set")],
)
def test_revision_of_what_is_not_on_the_hub_is_refused(folder: Path, name: str, kind: str) -> None:
    save(folder / "oasst1")
    write_form(folder / "rows.jsonl")
    told = problem(name, "abc")
    assert all(fact in told for fact in ("--dataset-revision abc", f"--dataset {name} ", kind))
