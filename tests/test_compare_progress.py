"""Answers from mmlu_progress_<model>_<arm>.json, where no samples of lm_eval are at hand."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jsonschema
import pytest
from compare_runs import (
    CATEGORY_OF,
    DATE,
    FAMILY,
    changed,
    edit,
    half,
    main,
    summary,
    table,
    texts,
    write,
    write_harness,
    write_run,
)

from qlora_harness.compare import report
from qlora_harness.compare.answers import Question
from qlora_harness.compare.comparison import compare
from qlora_harness.compare.report import Comparison
from qlora_harness.compare.runs import load_run
from qlora_harness.errors import ComparisonError, HarnessError, ResultsError
from qlora_harness.question_hashes import prompt_hash
from qlora_harness.score.evaluation_record import Family, ScoredQuestion, write_records

# A made-up data file: one subject after another. Each mark is a question: right (1), wrong (0),
# or right as the first of a tie (t).
SIZES = {"anatomy": 8, "philosophy": 6, "virology": 4}
ONE = {"anatomy": "11111100", "philosophy": "11t000", "virology": "1100"}
TWO = {"anatomy": "11110010", "philosophy": "11001t", "virology": "1100"}
CATEGORIES: dict[str, list[str]] = {}
for _name in SIZES:
    CATEGORIES.setdefault(CATEGORY_OF[_name], []).append(_name)
NAME = "mmlu_progress_llama_4bit_qlora.json"


@dataclass(frozen=True)
class Line:
    """A line of the data file."""

    index: int
    subject: str
    doc_id: int

    @property
    def place(self) -> int:
        return self.index % 3

    @property
    def prompt(self) -> str:
        return f"Shots.\n\nWhat is {self.subject} {self.doc_id}?\nA. w\nB. x\nC. y\nD. z\nAnswer:"

    def logprobs(self, mark: str) -> tuple[float, ...]:
        best = self.place + (mark == "0")
        values = [-2.0, -2.25, -2.5, -2.75]
        values[best] = -0.5
        if mark == "t":
            values[3] = -0.5
        return tuple(values)


def data_file(mixed: bool = False) -> list[Line]:
    places = [(subject, i) for subject, size in SIZES.items() for i in range(size)]
    if mixed:
        places.sort(key=lambda place: place[1])  # one question of each subject after another
    return [Line(index, *place) for index, place in enumerate(places)]


def write_answers(
    folder: Path,
    marks: Mapping[str, str],
    *,
    quant: str = "nf4",
    samples: bool = False,
    progress: bool = True,
    lines: list[Line] | None = None,
    adapter: bool = True,
) -> Path:
    """Writes a scored run: both records by their own writer, and the same answers as samples.

    A question without a mark is left out.
    """
    asked = [
        (line, mark)
        for line in lines or data_file()
        for mark in marks.get(line.subject, "")[line.doc_id : line.doc_id + 1]
        if mark != "-"
    ]
    questions = [
        ScoredQuestion(
            line.index,
            line.subject,
            prompt_hash(line.prompt),
            "ABCD"[line.place],
            line.logprobs(mark),
        )
        for line, mark in asked
    ]
    header = {
        "arm": "4bit" if quant == "nf4" else "16bit",
        "model": {"base": "llama", "quant": quant, "peft": "adapter" if adapter else None},
        "settings": {"batch_size": 8},
        "environment": {"device": "a GPU"},
    }
    scored = Family(questions, CATEGORIES, sum(SIZES.values()))
    write_records(folder, NAME, header, {FAMILY: scored})
    if not progress:
        (folder / NAME).unlink()
    if samples:
        write_samples(folder, asked)
    return folder


def write_samples(folder: Path, asked: list[tuple[Line, str]]) -> None:
    """Writes what lm_eval writes, with its own hashes."""

    def sha256(text: str) -> str:
        return hashlib.sha256(text.encode()).hexdigest()

    by_subject: dict[str, list[str]] = {}
    marks: dict[str, str] = {}
    for line, mark in asked:
        doc = {"index": line.index, "subject": line.subject, "input": line.prompt}
        sample = {
            "doc_id": line.doc_id,
            "doc": doc,
            "target": str(line.place),
            "filtered_resps": [[str(value), "False"] for value in line.logprobs(mark)],
            "doc_hash": sha256(json.dumps(doc)),
            "prompt_hash": sha256(line.prompt),
            "target_hash": sha256(str(line.place)),
            "acc": float(mark != "0"),
        }
        by_subject.setdefault(line.subject, []).append(json.dumps(sample) + "\n")
        marks[line.subject] = marks.get(line.subject, "") + mark.replace("t", "1")
    for subject, lines in by_subject.items():
        write(folder / "gpt2" / f"samples_{FAMILY}_{subject}_{DATE}.jsonl", "".join(lines))
    write_harness(folder, marks, samples=False)
    path = folder / "gpt2" / f"results_{DATE}.json"
    for subject, size in SIZES.items():
        if subject in marks:
            changed(path, edit(f"n-samples/{FAMILY}_{subject}/original", size))


def two(folder: Path, first: str, second: str, **options: Any) -> list[Path]:
    """Two runs, each with samples ("s"), the progress file ("p"), both or neither."""
    return [
        write_answers(
            folder / name,
            marks,
            quant=quant,
            samples="s" in kind,
            progress="p" in kind,
            **options,
        )
        for name, marks, quant, kind in (
            ("4bit", ONE, "nf4", first),
            ("16bit", TWO, "bf16", second),
        )
    ]


def numbers(comparison: Comparison) -> object:
    """Everything that follows from the answers."""
    flips = [{**vars(flip), "question": None} for flip in comparison.evidence.flips]
    return comparison.tables, comparison.details, comparison.verdict, flips


def sources(comparison: Comparison) -> list[str | None]:
    return [run.answers for run in comparison.runs]


def test_a_pair_without_samples_is_compared_question_by_question(tmp_path: Path) -> None:
    comparison = compare(two(tmp_path, "p", "p"))
    assert sources(comparison) == ["mmlu_progress", "mmlu_progress"]
    paired = {row.key: row.cells[0].value for row in table(comparison, "paired").rows}
    # anatomy: both 4, first 2, second 1, neither 1; philosophy 2, 1, 2, 1; virology 2, 0, 0, 2.
    counted = ("both", "only_first", "only_second", "neither")
    assert [paired[key] for key in counted] == [8, 3, 3, 4]
    assert paired["mcnemar_p"] == 1.0
    assert [row.name for row in comparison.details[0].rows] == [
        "anatomy (n = 8)",
        "philosophy (n = 6)",
        "virology (n = 4)",
    ]
    assert texts(comparison, "mmlu", "ties") == ["1", "1", "0"]
    flips = comparison.evidence.flips
    assert [(flip.subject, flip.doc_id, flip.better) for flip in flips] == [
        ("anatomy", 4, False),
        ("anatomy", 5, False),
        ("anatomy", 6, True),
        ("philosophy", 2, False),
        ("philosophy", 4, True),
        ("philosophy", 5, True),
    ]
    # Line 10: a tie of B and D counts as B, the right answer; the other run says C.
    assert (flips[3].first, flips[3].second, flips[3].answer) == ("B", "C", "B")
    assert {flip.question for flip in flips} == {None}


@pytest.mark.parametrize("kinds", [("p", "p"), ("sp", "p"), ("p", "sp"), ("s", "p"), ("p", "s")])
def test_both_sources_give_the_same_numbers(tmp_path: Path, kinds: tuple[str, str]) -> None:
    wanted = compare(two(tmp_path / "samples", "sp", "sp"))
    found = compare(two(tmp_path / "other", *kinds))
    assert numbers(found) == numbers(wanted)
    assert sources(wanted) == ["samples", "samples"]
    assert sources(found) == ["samples" if "s" in kind else "mmlu_progress" for kind in kinds]


def test_answers_have_the_places_of_the_samples(tmp_path: Path) -> None:
    logged = load_run(write_answers(tmp_path / "s", ONE, samples=True), "s").answers(FAMILY)
    ours = load_run(write_answers(tmp_path / "p", ONE), "p").answers(FAMILY)
    assert logged is not None and ours is not None
    assert list(ours.by_question) == list(logged.by_question)
    for question, answer in ours.by_question.items():
        sample = logged.by_question[question]
        assert answer.document is None
        assert answer.prompt == sample.prompt[:16]
        for name in ("target", "right", "tied", "choice", "answer"):
            assert getattr(answer, name) == getattr(sample, name), (question, name)
        assert answer.difference(sample) is None is sample.difference(answer)


def test_samples_win_and_the_progress_file_is_not_read(tmp_path: Path) -> None:
    runs = two(tmp_path, "sp", "sp")
    wanted = numbers(compare(runs))
    (runs[0] / NAME).write_text("{")
    assert numbers(compare(runs)) == wanted
    for path in runs[0].glob("gpt2/samples_*"):
        path.unlink()
    with pytest.raises(ResultsError, match=f"{NAME}, line 1: not valid JSON"):
        compare(runs)


def test_samples_that_contradict_a_newer_record_give_way_to_its_answers(tmp_path: Path) -> None:
    runs = two(tmp_path, "p", "p")
    wanted = numbers(compare(runs))
    write_harness(runs[1], {name: "1" * size for name, size in SIZES.items()})
    path = runs[1] / "gpt2" / f"results_{DATE}.json"
    write(path, json.loads(path.read_text()) | {"date": 1000.0})
    comparison = compare(runs)
    assert numbers(comparison) == wanted
    assert sources(comparison)[1] == "mmlu_progress"


def test_the_source_is_said(tmp_path: Path) -> None:
    runs = two(tmp_path, "s", "p")
    assert main(*runs, "--html", tmp_path / "page.html") == 0
    record = json.loads((tmp_path / "comparison.json").read_text())
    assert [run["answers"] for run in record["runs"]] == ["samples", "mmlu_progress"]
    note = (
        "Answers of 16bit from the mmlu_progress file, as no samples of lm_eval are there: their "
        "prompts (by 16 digits of the hash) and right answers were checked to be those of the "
        "other runs, the hashes of documents were not."
    )
    assert note in record["notes"]
    assert note in (tmp_path / "page.html").read_text()
    schema = json.loads(Path(report.__file__).with_name("comparison.schema.json").read_text())
    jsonschema.validate(record, schema)
    for wrong in (True, "progress"):
        record["runs"][0]["answers"] = wrong
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(record, schema)
    assert not any("mmlu_progress" in note for note in compare(two(tmp_path, "s", "s")).notes)


@pytest.mark.parametrize("kinds", [("s", "p"), ("p", "s")])
def test_text_of_a_changed_answer_is_that_of_the_run_that_has_it(
    tmp_path: Path, kinds: tuple[str, str]
) -> None:
    flips = compare(two(tmp_path, *kinds)).evidence.flips
    assert flips[0].question == "What is anatomy 4?\nA. w\nB. x\nC. y\nD. z"


def test_intersection_and_rescoring_need_no_samples(tmp_path: Path) -> None:
    runs = two(tmp_path, "p", "p")
    part = {"anatomy": "111100", "philosophy": "11001t"}
    shutil.rmtree(runs[1])
    write_answers(runs[1], part, quant="bf16")
    comparison = compare(runs, intersect=True, rescore=True)
    shown = table(comparison, "common")
    assert {row.name: [cell.value for cell in row.cells] for row in shown.rows} == {
        "All tasks": [12, 6, 0],
        "anatomy": [6, 2, 0],
        "virology": [0, 4, 0],
    }
    shutil.rmtree(runs[0])
    write_answers(runs[0], ONE, samples=True)
    assert numbers(compare(runs, intersect=True, rescore=True)) == numbers(comparison)


def test_four_runs_without_samples_are_paired(tmp_path: Path) -> None:
    runs = []
    for name, quant, adapter, marks in (
        ("base", "bf16", False, ONE),
        ("base4", "nf4", False, TWO),
        ("tuned", "bf16", True, TWO),
        ("tuned4", "nf4", True, ONE),
    ):
        runs.append(write_answers(tmp_path / name, marks, quant=quant, adapter=adapter))
        if adapter:
            write_run(runs[-1], summary(quant))
    shown = table(compare(runs), "design")
    assert "unpaired" not in shown.columns[0].heading and "paired" in shown.columns[0].heading


# Places


def test_with_all_questions_subjects_may_be_mixed_in_the_file(tmp_path: Path) -> None:
    found = numbers(compare(two(tmp_path / "mixed", "p", "s", lines=data_file(mixed=True))))
    assert found == numbers(compare(two(tmp_path / "s", "s", "s", lines=data_file(mixed=True))))


def test_first_questions_have_their_numbers(tmp_path: Path) -> None:
    first = {"anatomy": "110", "philosophy": "10t", "virology": "111"}
    other = {"anatomy": "100", "philosophy": "10t", "virology": "110"}
    runs = [
        write_answers(tmp_path / "4bit", first, samples=True),
        write_answers(tmp_path / "16bit", other, quant="bf16"),
    ]
    comparison = compare(runs, allow_limit=True)
    assert [(flip.subject, flip.doc_id) for flip in comparison.evidence.flips] == [
        ("anatomy", 1),
        ("virology", 2),
    ]


def test_a_single_subject_has_its_numbers(tmp_path: Path) -> None:
    answers = load_run(write_answers(tmp_path, {"philosophy": "110101"}), "x").answers(FAMILY)
    assert answers is not None
    assert list(answers.by_question) == [Question("philosophy", i) for i in range(6)]


def test_questions_with_a_gap_are_refused(tmp_path: Path) -> None:
    runs = two(tmp_path, "p", "p")
    for run in runs:
        shutil.rmtree(run)
        write_answers(run, {"anatomy": "11-1"})
    with pytest.raises(ResultsError) as caught:
        compare(runs, allow_limit=True)
    assert str(caught.value) == (
        f"{runs[0] / NAME}: tasks.{FAMILY}: anatomy has index 1 and 3 and none between them, so "
        "the number of each question in its subject can't be told. Score the first questions "
        "(--limit) or all, or log samples (--log_samples)."
    )


def test_questions_from_the_middle_are_never_paired_with_others(tmp_path: Path) -> None:
    runs = [
        write_answers(tmp_path / "4bit", ONE, samples=True),
        write_answers(tmp_path / "16bit", {"anatomy": "--111111"}, quant="bf16"),
    ]
    with pytest.raises(ComparisonError, match="anatomy, doc_id 0: the prompt hash differs"):
        compare(runs, intersect=True)


# What is refused


@pytest.mark.parametrize("kind", ["p", "s"])
@pytest.mark.parametrize("part", ["prompt", "target"])
def test_other_questions_are_refused(tmp_path: Path, kind: str, part: str) -> None:
    runs = two(tmp_path, kind, "p")
    # The third question of anatomy: the right letter is C, and the model says so.
    change: dict[str, Any] = {
        "prompt": {"prompt_sha256": prompt_hash("Another question")},
        "target": {
            "answer": "D",
            "prediction": "D",
            "logprobs": {"A": -2.0, "B": -2.0, "C": -2.0, "D": -1.0},
        },
    }[part]
    in_rows(lambda rows: rows[2].update(change))(runs[1])
    # A record that agrees with itself, and does not hold the hash over all prompts.
    changed(runs[1] / "evaluation_results.json", edit(f"tasks/{FAMILY}/prompts_sha256", None))
    with pytest.raises(ComparisonError) as caught:
        compare(runs)
    assert str(caught.value) == (
        f"4bit and 16bit answered different questions: anatomy, doc_id 2: the {part} hash differs. "
        "Score all runs with the same task, data folder and template."
    )


def in_progress(dotted: str, new: object) -> Callable[[Path], object]:
    return lambda folder: changed(folder / NAME, edit(dotted, new))


def in_row(dotted: str, new: object) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        def change(record: dict[str, Any]) -> None:
            edit(dotted, new)(record["tasks"][FAMILY][2])

        changed(folder / NAME, change)

    return spoil


def in_rows(change: Callable[[list[Any]], object]) -> Callable[[Path], object]:
    def spoil(folder: Path) -> None:
        def apply(record: dict[str, Any]) -> None:
            change(record["tasks"][FAMILY])

        changed(folder / NAME, apply)

    return spoil


def text(change: Callable[[str], str]) -> Callable[[Path], object]:
    return lambda folder: (folder / NAME).write_text(change((folder / NAME).read_text()))


ROW = rf"{NAME}: tasks.{FAMILY}\[2\]: "
REFUSALS: dict[str, tuple[Callable[[Path], object], str]] = {
    "half": (text(half), rf"{NAME}, line \d+: not valid JSON .*half written; make it anew"),
    "empty": (text(lambda _: ""), rf"{NAME}, line 1: not valid JSON"),
    "too deep": (text(lambda _: "[" * 100_000), rf"{NAME}: not valid JSON \(brackets too deep"),
    "too long a number": (
        text(lambda _: '{"n": ' + "1" * 5000 + "}"),
        rf"{NAME}: not valid JSON \(a num",
    ),
    "a list": (text(lambda _: "[]"), rf"{NAME}: expected a JSON object, found list"),
    "kind": (
        in_progress("kind", "evaluation_results"),
        rf'{NAME}: expected "kind": "mmlu_progress", found .evaluation_results.\.',
    ),
    "newer schema": (in_progress("schema_version", 2), r"schema_version 2 is newer .*Update"),
    "no tasks": (in_progress("tasks", ...), rf"{NAME}: tasks is missing"),
    "tasks is a list": (in_progress("tasks", []), rf"{NAME}: tasks is a list, not an object"),
    "rows are an object": (
        in_progress(f"tasks/{FAMILY}", {}),
        rf"{NAME}: tasks.{FAMILY} is a dict, not a list",
    ),
    "another arm": (
        in_progress("arm", "4bit"),
        rf"{NAME}: arm is not that of evaluation_results.json: the file belongs to another run\. "
        r"Remove it, or score again",
    ),
    "another model": (
        in_progress("model/base", "qwen"),
        rf"{NAME}: model is not that of evaluation_results.json",
    ),
    "a copy": (
        lambda folder: shutil.copy(folder / NAME, folder / "mmlu_progress_copy.json"),
        r"mmlu_progress_copy.json and .*mmlu_progress_llama_4bit_qlora.json are both of the model",
    ),
    "a row is a text": (in_rows(lambda rows: rows.insert(2, "x")), r"\[2\] is a str, not an obj"),
    "a row twice": (
        in_rows(lambda rows: rows.insert(2, rows[1])),
        ROW + r"index is 1, which is there twice",
    ),
    "an index too high": (in_row("index", 18), ROW + r"index is 18, but there are 18 questions"),
    "half an index": (in_row("index", 2.5), ROW + r"index is 2.5, not a whole number"),
    "no index": (in_row("index", ...), ROW + r"index is missing"),
    "NaN": (in_row("logprobs/C", math.nan), r"\.2\.logprobs\.C is nan, not a finite number"),
    "infinite": (in_row("logprobs/A", -math.inf), r"\.2\.logprobs\.A is -inf, not a finite number"),
    "three values": (in_row("logprobs/D", ...), ROW + r"logprobs.D is missing"),
    "five values": (in_row("logprobs/E", -9.0), ROW + r"logprobs holds more than A, B, C and D"),
    "a list of values": (in_row("logprobs", [-1, -2, -3, -4]), ROW + r"logprobs.A is missing"),
    "another letter": (in_row("answer", "E"), ROW + r"answer is 'E', not A, B, C or D"),
    "no answer": (in_row("answer", ...), ROW + r"answer is None, not A, B, C or D"),
    "prediction": (
        in_row("prediction", "A"),
        ROW + r"prediction is 'A', but logprobs and answer give 'C'",
    ),
    "correct": (in_row("correct", False), ROW + r"correct is False, but .* answer give True"),
    "no hash": (in_row("prompt_sha256", ...), ROW + r"prompt_sha256 is None, not 16 hexadecimal"),
    "a long hash": (in_row("prompt_sha256", "0" * 64), ROW + r"prompt_sha256 is '0{64}', not 16"),
    "no subject": (in_row("subject", ...), ROW + r"subject is missing"),
    "another subject": (
        in_row("subject", "law"),
        rf"{NAME}: tasks.{FAMILY}: anatomy has 4 right of 7 questions, but evaluation_results.json "
        r"says 5 of 8\. The file is half written or belongs to another run; score again",
    ),
    "a row less": (in_rows(lambda rows: rows.pop()), r"virology has 2 right of 3 q.*says 2 of 4"),
    "no rows": (in_rows(lambda rows: rows.clear()), r"anatomy has 0 right of 0 .* says 5 of 8"),
    "an answer less": (
        in_rows(lambda rows: rows[2].update(answer="B", correct=False)),
        r"anatomy has 4 right of 8 questions, but evaluation_results.json says 5 of 8",
    ),
    "another prompt": (
        in_row("prompt_sha256", "0" * 16),
        rf"{NAME}: tasks.{FAMILY}: its questions give prompts_sha256 [0-9a-f]{{12}}, but eval",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(tmp_path: Path, name: str) -> None:
    runs = two(tmp_path, "p", "p")
    spoil, message = REFUSALS[name]
    spoil(runs[1])
    with pytest.raises(HarnessError, match=message) as caught:
        main(*runs)
    assert type(caught.value) is ResultsError
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "comparison.json").exists()


def test_the_file_of_another_model_beside_ours_is_passed_over(tmp_path: Path) -> None:
    runs = two(tmp_path, "p", "p")
    wanted = numbers(compare(runs))
    other = runs[1] / "mmlu_progress_another_16bit_base.json"
    shutil.copy(runs[1] / NAME, other)
    changed(other, edit("model/base", "another"))
    assert numbers(compare(runs)) == wanted


@pytest.mark.parametrize("missing", ["file", "family"])
def test_without_answers_the_difference_is_unpaired(tmp_path: Path, missing: str) -> None:
    runs = two(tmp_path, "p", "p" if missing == "family" else "")
    if missing == "family":
        changed(runs[1] / NAME, edit(f"tasks/{FAMILY}", ...))
    comparison = compare(runs)
    assert sources(comparison) == ["mmlu_progress", None]
    assert (
        "No logged samples (lm_eval --log_samples) and no mmlu_progress file of 16bit: the "
        "difference is unpaired, which is usually too cautious for runs that answered the same "
        "questions."
    ) in comparison.notes
    assert not any(item.key == "paired" for item in comparison.tables)
    assert not any("Answers of" in note for note in comparison.notes)
