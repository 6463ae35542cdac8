"""What is stored of a scored run: exact rows, exact accuracies, and nothing lost by a later run."""

from __future__ import annotations

import hashlib
import json
import math
import os
import statistics
from pathlib import Path
from typing import Any

import pytest
from scoring_runs import read, refused

from qlora_harness.errors import ResultsError
from qlora_harness.results.scored import read_evaluation
from qlora_harness.schema.mmlu import prompt_hash
from qlora_harness.schema.scoring_records import QuestionRow, accuracy
from qlora_harness.score.evaluation_record import (
    Family,
    check_folder,
    model_slug,
    progress_rows,
    question_row,
    summarise,
    write_records,
)

CATEGORIES = {"stem": ["anatomy", "astronomy"], "humanities": ["philosophy"], "other": ["virology"]}
SAYS = {
    "A": (-0.5, -1.0, -2.0, -3.0),
    "B": (-2.5, -0.25, -2.0, -3.0),
    "C": (-2.5, -2.25, -1.0, -3.0),
    "D": (-2.5, -2.25, -2.0, -1.5),
}
PROGRESS = "mmlu_progress_smollm2_4bit_qlora.json"


def question(index: int, subject: str, *, says: str, answer: str) -> QuestionRow:
    return question_row(
        index=index, subject=subject, prompt_sha256=prompt_hash(f"Question {index}\nAnswer:"),
        answer=answer, logprobs=SAYS[says], truncated=index == 8,
    )  # fmt: skip


# anatomy 2 of 3 right, astronomy 1 of 4, philosophy 2 of 2; given out of order.
NINE = [
    question(8, "philosophy", says="D", answer="D"),
    question(0, "anatomy", says="A", answer="A"),
    question(1, "anatomy", says="B", answer="A"),
    question(2, "anatomy", says="C", answer="C"),
    question(3, "astronomy", says="A", answer="D"),
    question(4, "astronomy", says="A", answer="C"),
    question(5, "astronomy", says="A", answer="B"),
    question(6, "astronomy", says="A", answer="A"),
    question(7, "philosophy", says="B", answer="B"),
]


def stderr(values: list[int]) -> float:
    return statistics.stdev(values) / math.sqrt(len(values))


def summary_of(questions: list[QuestionRow], n_total: int = 9) -> dict[str, Any]:
    family = Family(questions, CATEGORIES, n_total)
    return summarise(family).model_dump(exclude_unset=True)


@pytest.mark.parametrize("values", [[1, 0], [1, 1, 0], [1, 1, 1, 1], [0, 0, 1, 0, 1, 1, 0]])
def test_accuracy_and_its_standard_error(values: list[int]) -> None:
    mean, error = accuracy([bool(value) for value in values])
    assert mean == pytest.approx(statistics.mean(values), abs=1e-15)
    assert error == pytest.approx(stderr(values), abs=1e-15)
    assert accuracy([True]) == (1.0, None)  # one value has no standard error


def test_summary_by_question_subject_and_category() -> None:
    summary = summary_of(NINE, n_total=20)
    anatomy, astronomy, philosophy = [1, 0, 1], [0, 0, 0, 1], [1, 1]
    assert {name: values["acc"] for name, values in summary["subjects"].items()} == {
        "anatomy": pytest.approx(2 / 3),
        "astronomy": 0.25,
        "philosophy": 1.0,
    }
    assert summary["subjects"]["astronomy"] == {
        "acc": 0.25,
        "acc_stderr": pytest.approx(stderr(astronomy), abs=1e-15),
        "n": 4,
        "correct": 1,
    }
    counts = ("n", "n_total", "truncated", "ties")
    assert [summary[name] for name in counts] == [9, 20, 1, 0]
    assert summary["acc"] == pytest.approx(5 / 9, abs=1e-15)
    assert summary["acc_macro"] == pytest.approx((2 / 3 + 1 / 4 + 1) / 3, abs=1e-15)
    squares = [statistics.variance(values) * (len(values) - 1) for values in (anatomy, astronomy)]
    assert statistics.variance(philosophy) == 0
    assert summary["acc_stderr"] == pytest.approx(math.sqrt(sum(squares) / (9 - 3) / 9), abs=1e-15)
    errors = [stderr(anatomy), stderr(astronomy), 0.0]
    assert summary["acc_macro_stderr"] == pytest.approx(math.hypot(*errors) / 3, abs=1e-15)
    assert list(summary["categories"]) == ["stem", "humanities"]  # no question on virology
    stem = summary["categories"]["stem"]
    assert (stem["acc"], stem["n"]) == (pytest.approx(3 / 7), 7)
    assert stem["acc_macro"] == pytest.approx((2 / 3 + 1 / 4) / 2)
    assert stem["acc_stderr"] == pytest.approx(math.sqrt(sum(squares) / (7 - 2) / 7), abs=1e-15)
    assert summary["categories"]["humanities"]["acc"] == 1.0


def test_pooled_errors_are_those_of_lm_eval() -> None:
    from lm_eval.api.metrics import aggregate_subtask_metrics, mean_stderr, pooled_sample_stderr

    summary = summary_of(NINE)
    values = {"anatomy": [1, 0, 1], "astronomy": [0, 0, 0, 1], "philosophy": [1, 1]}
    sizes = [len(v) for v in values.values()]
    errors = [mean_stderr(v) for v in values.values()]
    means = [sum(v) / len(v) for v in values.values()]
    assert summary["acc_stderr"] == pytest.approx(pooled_sample_stderr(errors, sizes), abs=1e-15)
    assert summary["acc"] == pytest.approx(aggregate_subtask_metrics(means, sizes), abs=1e-15)
    assert summary["acc_macro"] == pytest.approx(
        aggregate_subtask_metrics(means, sizes, weight_by_size=False), abs=1e-15
    )


def test_subject_with_one_question_leaves_the_error_unknown() -> None:
    summary = summary_of([q for q in NINE if q.index in (0, 3, 4)])
    assert summary["subjects"]["anatomy"]["acc_stderr"] is None
    assert summary["acc"] == pytest.approx(1 / 3)
    assert (summary["acc_stderr"], summary["acc_macro_stderr"]) == (None, None)


def test_ties_are_counted() -> None:
    logprobs = {"logprobs": dict(zip("ABCD", (-1.0, -1.0, -2.0, -2.0), strict=True))}
    tied = question(9, "virology", says="A", answer="B").model_copy(update=logprobs)
    summary = summary_of([*NINE, tied], n_total=10)
    assert summary["ties"] == 1
    assert summary["subjects"]["virology"]["acc"] == 0.0  # the first of a tie counts


def test_prompt_hash_tells_questions_apart_and_forgets_their_order() -> None:
    text = "".join(
        f"{q.index}\0{q.subject}\0{q.prompt_sha256}\0{q.answer}\0"
        for q in sorted(NINE, key=lambda q: q.index)
    )
    expected = hashlib.sha256(text.encode()).hexdigest()
    assert summary_of(NINE)["prompts_sha256"] == expected
    assert summary_of(NINE[::-1])["prompts_sha256"] == expected
    assert summary_of(NINE[1:])["prompts_sha256"] != expected


def test_progress_has_one_row_a_question_in_file_order() -> None:
    rows = [row.model_dump() for row in progress_rows(NINE[:3])]  # given out of order
    expected = []
    for index, subject, prediction, answer, running in (
        (0, "anatomy", "A", "A", 1.0),
        (1, "anatomy", "B", "A", 0.5),
        (8, "philosophy", "D", "D", 2 / 3),
    ):
        expected.append(
            {
                "index": index, "subject": subject,
                "logprobs": dict(zip("ABCD", SAYS[prediction], strict=True)),
                "prediction": prediction, "answer": answer, "correct": prediction == answer,
                "running_accuracy": running,
                "prompt_sha256": hashlib.sha256(b"Question %d\nAnswer:" % index).hexdigest()[:16],
                "truncated": index == 8,
            }
        )  # fmt: skip
    assert rows == expected
    assert [list(row) for row in rows] == [list(row) for row in expected]


@pytest.mark.parametrize(
    ("name", "slug"),
    [
        ("meta-llama/Llama-2-7b-hf", "llama2_7b"),
        ("meta-llama/Llama-2-7b-chat-hf", "llama2_7b_chat"),
        ("/models/Llama-2-7b-hf/", "llama2_7b"),
        ("smollm2", "smollm2"),
        ("HuggingFaceTB/SmolLM2-135M", "smollm2_135m"),
        ("Qwen/Qwen2.5-0.5B", "qwen2_5_0_5b"),
    ],
)
def test_model_name_in_file_names(name: str, slug: str) -> None:
    assert model_slug(name) == slug


# What is written


def header(**changes: Any) -> dict[str, Any]:
    return {
        "arm": "4bit",
        "model": {"base": "smollm2", "adapter_sha256": "0"},
        "settings": {"batch_size": 1},
        "environment": {"device": {"name": "a GPU"}},
    } | changes


def write(
    folder: Path, questions: list[QuestionRow], *, family: str = "mmlu_qlora_demo", **changes: Any
) -> list[str]:
    scored = Family(questions, CATEGORIES, 9)
    return write_records(folder, PROGRESS, header(**changes), {family: scored})


def test_both_files_say_what_was_scored(tmp_path: Path) -> None:
    folder = tmp_path / "results" / "4bit"
    assert write(folder, NINE) == ["mmlu_qlora_demo"]
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["evaluation_results.json", PROGRESS]
    evaluation = read(folder)
    created = evaluation.pop("created")
    assert evaluation == header() | {
        "schema_version": 1,
        "kind": "evaluation_results",
        "tasks": {"mmlu_qlora_demo": summary_of(NINE) | {"settings": {"batch_size": 1}}},
    }
    assert read(folder, PROGRESS) == {
        "schema_version": 1,
        "created": created,
        "kind": "mmlu_progress",
        "arm": "4bit",
        "model": {"base": "smollm2", "adapter_sha256": "0"},
        "tasks": {"mmlu_qlora_demo": [row.model_dump() for row in progress_rows(NINE)]},
    }


def test_other_task_families_stay(tmp_path: Path) -> None:
    write(tmp_path, NINE, family="mmlu_qlora_5shot")
    first = read(tmp_path)["tasks"]["mmlu_qlora_5shot"]
    write(tmp_path, NINE[:3], settings={"batch_size": 2})
    tasks = read(tmp_path)["tasks"]
    assert list(tasks) == ["mmlu_qlora_5shot", "mmlu_qlora_demo"]
    assert tasks["mmlu_qlora_5shot"] == first
    assert tasks["mmlu_qlora_5shot"]["settings"] == {"batch_size": 1}
    assert tasks["mmlu_qlora_demo"]["settings"] == {"batch_size": 2}
    progress = read(tmp_path, PROGRESS)["tasks"]
    assert {family: len(rows) for family, rows in progress.items()} == {
        "mmlu_qlora_5shot": 9,
        "mmlu_qlora_demo": 3,
    }


def test_a_smaller_run_does_not_replace_a_larger_record(tmp_path: Path) -> None:
    write(tmp_path, NINE)
    before = read(tmp_path)["tasks"]
    assert write(tmp_path, NINE[:2]) == ["mmlu_qlora_demo"]  # the same questions, scored again
    assert read(tmp_path)["tasks"] == before
    cpu = {"device": {"name": "cpu"}}
    assert write(tmp_path, NINE[:2], settings={"batch_size": 4}, environment=cpu) == []
    evaluation = read(tmp_path)
    assert evaluation["tasks"] == before
    assert evaluation["environment"] == {"device": {"name": "a GPU"}}
    assert evaluation["settings"] == {"batch_size": 1}
    progress = read(tmp_path, PROGRESS)["tasks"]
    assert len(progress["mmlu_qlora_demo"]) == 9


def test_a_run_of_the_same_size_replaces_the_record(tmp_path: Path) -> None:
    write(tmp_path, NINE)
    again = [question(q.index, q.subject, says="A", answer=q.answer) for q in NINE]
    assert write(tmp_path, again) == ["mmlu_qlora_demo"]
    assert read(tmp_path)["tasks"]["mmlu_qlora_demo"]["acc"] == pytest.approx(3 / 9)


def test_one_subject_after_another_loses_neither(tmp_path: Path) -> None:
    write(tmp_path, [q for q in NINE if q.subject == "anatomy"])
    write(tmp_path, [q for q in NINE if q.subject == "astronomy"])
    assert set(read(tmp_path)["tasks"]["mmlu_qlora_demo"]["subjects"]) == {"anatomy", "astronomy"}


@pytest.mark.parametrize(
    "change",
    [
        {"arm": "16bit"},
        {"model": {"base": "smollm2", "adapter_sha256": "1"}},
        {"model": {"base": "another", "adapter_sha256": "0"}},
    ],
)
def test_the_record_of_another_model_is_replaced(tmp_path: Path, change: dict[str, Any]) -> None:
    write(tmp_path, NINE)
    write(tmp_path, NINE, family="mmlu_qlora_5shot")
    assert write(tmp_path, NINE[:2], **change) == ["mmlu_qlora_demo"]
    evaluation = read(tmp_path)
    assert list(evaluation["tasks"]) == ["mmlu_qlora_demo"]
    assert evaluation["tasks"]["mmlu_qlora_demo"]["n"] == 2
    assert {key: evaluation[key] for key in change} == change


def test_a_damaged_record_is_named_and_not_overwritten(tmp_path: Path) -> None:
    path = tmp_path / "evaluation_results.json"
    path.write_text('{"tasks":')
    text = refused(lambda: write(tmp_path, NINE), ResultsError)
    assert text.startswith(f"{path}, line 1: not valid JSON")
    assert list(tmp_path.iterdir()) == [path]


def test_records_are_read_by_the_comparison(tmp_path: Path) -> None:
    write(tmp_path, NINE)
    scored = read_evaluation(tmp_path / "evaluation_results.json")["mmlu_qlora_demo"]
    assert (scored.n, scored.n_total, scored.value) == (9, 9, pytest.approx(5 / 9))
    assert scored.conditions["evaluation.settings.batch_size"] == 1


def test_leftovers_of_killed_writes_go_and_those_of_a_running_one_stay(tmp_path: Path) -> None:
    old, new = (tmp_path / f".evaluation_results.json.{name}.tmp" for name in ("old", "new"))
    for path in (old, new):
        path.write_text("{")
    os.utime(old, (1000, 1000))
    check_folder(tmp_path, PROGRESS)
    assert list(tmp_path.iterdir()) == [new]


@pytest.mark.parametrize("number", ["NaN", "Infinity", "1e400"])
def test_a_number_that_could_not_be_written_again_is_noticed_first(
    tmp_path: Path, number: str
) -> None:
    write(tmp_path, [question(0, "law", says="A", answer="A")])
    path = tmp_path / "evaluation_results.json"
    record = json.loads(path.read_text()) | {"environment": {"load": 12345.5}}
    path.write_text(json.dumps(record).replace("12345.5", number))
    with pytest.raises(ResultsError, match=r"environment\.load is"):
        check_folder(tmp_path, PROGRESS)
