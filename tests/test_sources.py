"""Where rows come from: JSON Lines, also compressed, folders of `datasets`, the embedded set."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import json
import lzma
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from qlora_harness.data import sources
from qlora_harness.data.oasst1 import build_conversations
from qlora_harness.data.sources import load_splits, read_rows
from qlora_harness.errors import DataError

ROWS: list[dict[str, Any]] = [
    {
        "message_id": "q",
        "parent_id": None,
        "created_date": "2023-02-05T14:23:50.983374+00:00",
        "text": "How are you? é\u2028",
        "role": "prompter",
        "lang": "en",
        "review_result": True,
        "deleted": False,
        "rank": None,
    },
    {
        "message_id": "a",
        "parent_id": "q",
        "created_date": "2023-02-05T14:24:50.983374+00:00",
        "text": "Fine.",
        "role": "assistant",
        "lang": "en",
        "review_result": True,
        "deleted": False,
        "rank": 0,
    },
]


def lines(rows: Iterable[object] = ROWS) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def problem(path: Path) -> str:
    with pytest.raises(DataError) as caught:
        list(read_rows(path))
    assert "\n" not in str(caught.value)
    return caught.value.problem


# --- JSON Lines -----------------------------------------------------------------------------------


def test_rows_come_back_as_they_are(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", lines())
    splits = load_splits(str(path))
    assert (list(splits.train), splits.validation, splits.source) == (ROWS, None, str(path))


@pytest.mark.parametrize(("suffix", "compress"), [(".gz", gzip.compress), (".xz", lzma.compress)])
def test_compressed_files(tmp_path: Path, suffix: str, compress: Any) -> None:
    path = tmp_path / f"rows.jsonl{suffix}"
    path.write_bytes(compress(lines().encode("utf-8")))
    assert list(load_splits(str(path)).train) == ROWS


def test_empty_lines_are_skipped_but_counted(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", "\n" + lines() + "\n\n{}\n")
    assert problem(path) == f"{path}, line 6: field 'message_id' is missing; the fields are none"


def test_byte_order_mark_and_windows_line_ends(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + lines().replace("\n", "\r\n").encode("utf-8"))
    assert list(read_rows(path)) == ROWS


def test_broken_line_is_named_by_its_number_only(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", lines() + '{"message_id": "b", \n' + lines())
    found = problem(path)
    assert found.startswith(f"{path}, line 3: not valid JSON (")
    assert "line 1" not in found


def test_row_of_the_wrong_schema_is_named_by_its_number(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", lines([*ROWS, {"text": "hello"}]))
    assert problem(path) == (
        f"{path}, line 3: field 'message_id' is missing; the fields are text, as in plain text"
    )
    path = write(tmp_path / "list.jsonl", "[1]\n")
    assert problem(path) == f"{path}, row 1: expected an object, found int"
    path = write(tmp_path / "lists.jsonl", lines() + "[1]\n")
    assert problem(path) == f"{path}, line 3: expected an object, found list"


def test_good_rows_before_a_bad_one_are_not_silently_used(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", lines() + "oops\n")
    with pytest.raises(DataError):
        list(load_splits(str(path)).train)


@pytest.mark.parametrize("name", ["rows.jsonl", "rows.json", "rows.jsonl.gz", "./rows", "~/rows"])
def test_missing_file_is_not_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(DataError) as caught:
        load_splits(name)
    assert str(caught.value) == (
        f"--dataset: {name} does not exist. Name a file (.jsonl, .json, .csv or .parquet), a "
        "folder or a Hub id."
    )


def refusal(name: str) -> str:
    with pytest.raises(DataError) as caught:
        load_splits(name)
    return str(caught.value)


def test_names_that_no_file_can_have_are_one_line() -> None:
    remedy = "Name a file (.jsonl, .json, .csv or .parquet), a folder or a Hub id."
    assert refusal("~nosuchuser/x") == f"--dataset: ~nosuchuser/x does not exist. {remedy}"
    name = "x" * 300
    assert refusal(name) == f"--dataset: {name} can't be read: File name too long. {remedy}"


def test_what_is_neither_a_file_nor_a_folder(tmp_path: Path) -> None:
    pipe = tmp_path / "rows.jsonl"
    os.mkfifo(pipe)
    for path in (pipe, Path("/dev/null")):
        assert refusal(str(path)) == (
            f"--dataset: {path} is neither a file nor a folder. Name a file (.jsonl, .json, .csv "
            "or .parquet), a folder or a Hub id."
        )


def test_home_folder_is_understood_as_it_is_for_models(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write(tmp_path / "rows.jsonl", lines())
    assert list(load_splits("~/rows.jsonl").train) == ROWS


def test_unreadable_files_are_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"text": "\xff"}\n')
    assert problem(path) == f"{path} is not UTF-8 (invalid start byte)"
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(b"not compressed")
    assert problem(path).startswith(f"{path} can't be read: Not a gzipped file")
    path.write_bytes(gzip.compress(lines().encode())[:-20])
    assert problem(path).startswith(f"{path} can't be read: Compressed file ended")
    path = tmp_path / "rows.jsonl.xz"
    path.write_bytes(b"not compressed")
    assert problem(path).startswith(f"{path} can't be read: ")


def test_damaged_gzip_is_one_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    packed = bytearray(gzip.compress(lines().encode() * 50))
    packed[20:24] = b"\xaa\xbb\xcc\xdd"
    path.write_bytes(bytes(packed))
    assert problem(path).startswith(f"{path} can't be read: ")


# --- folders --------------------------------------------------------------------------------------


def test_saved_dataset(tmp_path: Path) -> None:
    import datasets

    datasets.Dataset.from_list(ROWS).save_to_disk(str(tmp_path / "saved"))
    splits = load_splits(str(tmp_path / "saved"))
    assert (list(splits.train), splits.validation) == (ROWS, None)


def test_saved_dataset_dict_with_a_validation_split(tmp_path: Path) -> None:
    import datasets

    datasets.DatasetDict(
        {
            "train": datasets.Dataset.from_list(ROWS),
            "validation": datasets.Dataset.from_list(ROWS[:1]),
        }
    ).save_to_disk(str(tmp_path / "saved"))
    splits = load_splits(str(tmp_path / "saved"))
    assert list(splits.train) == ROWS
    assert splits.validation is not None and list(splits.validation) == ROWS[:1]
    assert splits.source == str(tmp_path / "saved")


def test_saved_dataset_without_a_train_split(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(folder))
    with pytest.raises(DataError) as caught:
        load_splits(str(folder))
    assert str(caught.value) == (
        f"--dataset: {folder} has the splits test but no 'train'. Name a data set with a train "
        "split."
    )


def test_bad_row_of_a_saved_dataset_is_named_by_its_number(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    rows = [ROWS[0], ROWS[1] | {"role": "user"}]
    datasets.DatasetDict({"train": datasets.Dataset.from_list(rows)}).save_to_disk(str(folder))
    with pytest.raises(DataError) as caught:
        list(load_splits(str(folder)).train)
    assert caught.value.problem == f"{folder}, split train, row 2: field 'role' is 'user'"


# One reader for every form, alone or in a folder


def write_form(path: Path, rows: list[dict[str, Any]] = ROWS) -> Path:
    """Writes rows in the form that the file's name says."""
    import pyarrow
    from pyarrow import parquet

    name = path.name.split(".", 1)[1]
    if name == "parquet":
        parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    if name.startswith("csv"):
        out = io.StringIO()
        writer = csv.DictWriter(out, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
        content = out.getvalue().encode()
    else:
        content = (json.dumps(rows, indent=1) if name.startswith("json.") else lines(rows)).encode()
        if name == "json":
            content = json.dumps(rows).encode()
    if name.endswith(".zst"):
        with pyarrow.CompressedOutputStream(str(path), "zstd") as out:
            out.write(content)
        return path
    compress = {"gz": gzip.compress, "xz": lzma.compress, "bz2": bz2.compress}
    path.write_bytes(compress.get(name.rsplit(".", 1)[-1], bytes)(content))
    return path


FORMS = ["jsonl", "jsonl.gz", "jsonl.xz", "jsonl.bz2", "jsonl.zst", "json", "json.gz", "csv"]
FORMS += ["csv.zst", "parquet"]


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_rows_alone_and_in_a_folder(tmp_path: Path, form: str) -> None:
    alone = write_form(tmp_path / f"rows.{form}")
    assert list(load_splits(str(alone)).train) == ROWS
    folder = tmp_path / "folder"
    folder.mkdir()
    write_form(folder / f"train.{form}")
    write_form(folder / f"validation.{form}", ROWS[:1])
    (folder / "README.md").write_text("about")
    splits = load_splits(str(folder))
    assert list(splits.train) == ROWS
    assert splits.validation is not None and list(splits.validation) == ROWS[:1]


def test_files_of_a_folder_without_splits_in_their_names_are_one_split(tmp_path: Path) -> None:
    write_form(tmp_path / "a.jsonl", ROWS[:1])
    write_form(tmp_path / "b.csv", ROWS[1:])
    splits = load_splits(str(tmp_path))
    assert list(splits.train) == ROWS and splits.validation is None


def test_rows_of_every_form_are_named_by_number(tmp_path: Path) -> None:
    bad = [*ROWS, ROWS[1] | {"message_id": "b", "role": "user"}]
    for form, place in (
        ("jsonl", "line 3"),
        ("json", "row 3"),
        ("csv", "line 4"),
        ("parquet", "row 3"),
    ):
        path = write_form(tmp_path / f"rows.{form}", bad)
        assert problem(path) == f"{path}, {place}: field 'role' is 'user'"


def test_nulls_as_csv_has_them(tmp_path: Path) -> None:
    path = write(
        tmp_path / "rows.csv",
        "message_id,parent_id,text,role,lang,rank,deleted\n"
        "1,None,None,prompter,en,NaN,false\n2,1.0,N/A,assistant,en,0.0,\n",
    )
    first, second = read_rows(path)
    assert (first["parent_id"], first["text"], first["rank"]) == (None, "None", None)
    assert (second["parent_id"], second["text"], second["rank"]) == ("1", "N/A", 0.0)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("message_id,role,text\nq,prompter,Hello, how are you?\n", "line 2: 4 cells in 3 columns"),
        ("message_id,role,text\nq,prompter\n", "line 2: 2 cells in 3 columns"),
    ],
)
def test_csv_row_with_other_cells_than_columns(tmp_path: Path, text: str, reason: str) -> None:
    path = write(tmp_path / "rows.csv", text)
    assert problem(path) == f"{path}, {reason}"


def test_csv_column_that_stands_twice(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.csv", "message_id,role,text,text\nq,prompter,a,b\n")
    assert "the key 'text' is repeated" in problem(path)


def test_types_and_columns_of_parquet_that_python_does_not_know(tmp_path: Path) -> None:
    import decimal

    import pyarrow
    from pyarrow import parquet

    late = pyarrow.array([2**62, 5], pyarrow.timestamp("us"))
    columns = {
        "message_id": ["q", "a"],
        "parent_id": [None, "q"],
        "text": ["Q", "A"],
        "role": ["prompter", "assistant"],
        "lang": ["en", "en"],
        "rank": [None, decimal.Decimal("0.0")],
        "created_date": late,
        "seen": pyarrow.array([1, 2], pyarrow.timestamp("s", tz="Nowhere/None")),
        "raw": pyarrow.array([b"\xff", b"\xfe"]).cast(pyarrow.binary()),
    }
    path = tmp_path / "rows.data"  # known by its content
    parquet.write_table(pyarrow.table(columns), path)
    first, second = read_rows(path)
    assert (first["created_date"], second["created_date"]) == (2**62, 5)
    assert (second["rank"], set(second)) == (0.0, set(ROWS[0]))


def test_parquet_dates_are_moments(tmp_path: Path) -> None:
    import datetime

    rows = [
        row | {"created_date": datetime.date(2023, 2, day)}
        for row, day in zip(ROWS, (5, 6), strict=True)
    ]
    first, second = read_rows(write_form(tmp_path / "rows.parquet", rows))
    assert second["created_date"] - first["created_date"] == 86_400


def test_folder_whose_name_is_a_pattern(tmp_path: Path) -> None:
    folder = tmp_path / "rows[1]*"
    folder.mkdir()
    write_form(folder / "train.jsonl")
    assert list(load_splits(str(folder)).train) == ROWS


def test_damaged_saved_dataset_is_one_line(tmp_path: Path) -> None:
    import datasets

    folder = tmp_path / "saved"
    datasets.Dataset.from_list(ROWS * 20).save_to_disk(str(folder))
    (arrow,) = folder.glob("*.arrow")
    content = arrow.read_bytes()
    at = content.index(b"How are you")
    arrow.write_bytes(content[:at] + b"\xff\xfe" + content[at + 2 :])
    with pytest.raises(DataError):
        list(load_splits(str(folder)).train)


def test_keys_that_stand_twice_are_refused(tmp_path: Path) -> None:
    path = write(tmp_path / "rows.jsonl", '{"message_id": "a", "message_id": "b"}\n')
    assert problem(path) == f"{path}, line 1: not valid JSON (the key 'message_id' is repeated)"


@pytest.mark.parametrize("name", ["ok.parquet", "array.json"])
def test_shared_files_give_the_rows_of_their_json_lines(shared_cases: Path, name: str) -> None:
    assert list(read_rows(shared_cases / name)) == list(read_rows(shared_cases / "ok.jsonl"))


@pytest.mark.parametrize("name", ["nan_rank.jsonl", "epoch_dates.jsonl", "no_parent_key.jsonl"])
def test_shared_files_give_a_conversation(shared_cases: Path, name: str) -> None:
    corpus = build_conversations(read_rows(shared_cases / name), None)
    assert corpus.conversations
    assert "BAD" not in str(corpus.conversations)


@pytest.mark.parametrize("date", ["2023-02-05T14:23:50.983374+00:00", "2023-02-05T14:23:50"])
def test_folder_of_json_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, date: str) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    folder = tmp_path / "folder"
    folder.mkdir()
    rows = [row | {"created_date": date} for row in ROWS]
    write(folder / "train.jsonl", lines(rows))
    write(folder / "validation.jsonl", lines(rows[:1]))
    splits = load_splits(str(folder))
    assert [row["message_id"] for row in splits.train] == ["q", "a"]
    assert splits.validation is not None
    assert [row["message_id"] for row in splits.validation] == ["q"]


def test_folder_without_data(tmp_path: Path) -> None:
    with pytest.raises(DataError) as caught:
        load_splits(str(tmp_path))
    assert caught.value.problem.startswith(f"--dataset: folder {tmp_path} can't be read: ")


# --- names ----------------------------------------------------------------------------------------


def test_demo_is_the_embedded_set() -> None:
    splits = load_splits("demo")
    assert splits.source == "embedded oasst_demo.jsonl"
    assert len(list(splits.train)) == 291


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("oasst1", "OpenAssistant/oasst1"),
        ("oasst2", "OpenAssistant/oasst2"),
        ("someone/rows", "someone/rows"),
    ],
)
def test_other_names_are_asked_of_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, asked: str
) -> None:
    import datasets

    asked_for = []

    def load_dataset(path: str, revision: str | None) -> dict[str, list[dict[str, Any]]]:
        asked_for.append((path, revision))
        return {"train": ROWS, "validation": ROWS[:1]}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    splits = load_splits(name, "abc")
    assert asked_for == [(asked, "abc")]
    assert list(splits.train) == ROWS
    assert splits.validation is not None and list(splits.validation) == ROWS[:1]
    assert splits.source == asked


def shadow(tmp_path: Path, name: str) -> list[dict[str, Any]]:
    """Puts a folder of this name into the working folder; returns its rows."""
    import datasets

    rows = [row | {"lang": "de"} for row in ROWS]
    datasets.Dataset.from_list(rows).save_to_disk(str(tmp_path / name))
    return rows


@pytest.mark.parametrize(
    ("name", "folder", "hub"),
    [
        ("oasst1", "oasst1", "OpenAssistant/oasst1"),
        ("oasst2", "oasst2", "OpenAssistant/oasst2"),
        ("OpenAssistant/oasst1", "OpenAssistant/oasst1", "OpenAssistant/oasst1"),
        ("oasst1", "OpenAssistant/oasst1", "OpenAssistant/oasst1"),
    ],
)
def test_local_folder_of_a_known_name_is_taken_and_said(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    name: str,
    folder: str,
    hub: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = shadow(tmp_path, folder)
    splits = load_splits(name)
    assert (list(splits.train), splits.source) == (rows, folder)
    assert [record.getMessage() for record in caplog.records] == [
        f"--dataset {name}: the local folder {folder} is taken, not {hub} on the Hub; to take "
        f"the Hub's, rename the folder; to silence this, give ./{folder}"
    ]
    caplog.clear()
    assert list(load_splits(f"./{folder}").train) == rows
    assert caplog.records == []


def test_local_file_of_a_known_name_is_taken_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "oasst1", lines())
    assert list(load_splits("oasst1").train) == ROWS
    assert [record.getMessage() for record in caplog.records] == [
        "--dataset oasst1: the local file oasst1 is taken, not OpenAssistant/oasst1 on the Hub; "
        "to take the Hub's, rename the file; to silence this, give ./oasst1"
    ]


def test_demo_is_the_embedded_set_also_beside_a_folder_of_that_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    rows = shadow(tmp_path, "demo")
    assert load_splits("demo").source == "embedded oasst_demo.jsonl"
    assert [record.getMessage() for record in caplog.records] == [
        "--dataset demo: the embedded set is taken, not the local folder demo; give ./demo for that"
    ]
    caplog.clear()
    assert list(load_splits("./demo").train) == rows
    assert caplog.records == []


def test_names_that_stand_for_one_thing_need_no_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.chdir(tmp_path)
    shadow(tmp_path, "mine")
    write(tmp_path / "rows.jsonl", lines())
    for name in ("demo", "mine", "rows.jsonl"):
        load_splits(name)
    assert caplog.records == []


def test_revision_of_what_is_not_on_the_hub_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    shadow(tmp_path, "oasst1")
    write(tmp_path / "rows.jsonl", lines())
    for name, what in (
        ("oasst1", "a local folder"),
        ("rows.jsonl", "a local file"),
        ("demo", "the embedded set"),
    ):
        with pytest.raises(DataError) as caught:
            load_splits(name, "abc")
        assert str(caught.value) == (
            f"--dataset-revision abc: --dataset {name} is {what}, which has no revisions. Leave "
            "the revision out."
        )


def test_hub_that_cannot_be_reached_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError) as caught:
        load_splits("someone/rows")
    assert caught.value.problem.startswith(
        "--dataset: 'someone/rows' can't be loaded from the Hub: "
    )
    assert caught.value.remedy == (
        "Check the name, the network and your access, or give a local file or folder"
    )
    assert sources.HUB_NAMES["oasst1"] == "OpenAssistant/oasst1"
