"""Broken, foreign and unequal files: one clear line each, and nothing is written."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path

import pytest
from compare_runs import (
    ANATOMY,
    FAMILY,
    FIRST,
    LESS,
    changed,
    evaluation,
    half,
    harness,
    in_evaluation,
    in_harness,
    in_sample,
    in_summary,
    in_text,
    main,
    rescored,
    summary,
    write,
    write_harness,
    write_run,
)

from qlora_harness.compare.comparison import compare
from qlora_harness.errors import ComparisonError, HarnessError, ResultsError

REFUSALS: dict[str, tuple[Callable[[Path], object], type[HarnessError], str]] = {
    # training_summary.json
    "failed": (
        lambda folder: changed(
            folder / "training_summary.json",
            lambda record: record.update(status="failed", failure={"problem": "loss is nan"}),
        ),
        ComparisonError,
        r'training_summary.json: status is "failed": loss is nan. Mend the cause',
    ),
    "running": (
        in_summary("status", "running"),
        ComparisonError,
        r'status is "running": the training has not ended',
    ),
    "status": (in_summary("status", "done"), ResultsError, r"status is 'done', not running"),
    "half a summary": (
        in_text("training_summary.json", half),
        ResultsError,
        r"training_summary.json, line 1: not valid JSON",
    ),
    "empty summary": (
        in_text("training_summary.json", lambda text: ""),
        ResultsError,
        r"training_summary.json, line 1: not valid JSON",
    ),
    "a list": (
        in_text("training_summary.json", lambda text: "[]"),
        ResultsError,
        r"expected a JSON object, found list",
    ),
    "kind": (
        in_summary("kind", "evaluation_results"),
        ResultsError,
        r"""expected "kind": "training_summary", found 'evaluation_results'""",
    ),
    "no kind": (in_summary("kind", ...), ResultsError, r'"training_summary", found None'),
    "newer schema": (
        in_summary("schema_version", 2),
        ResultsError,
        r"schema_version 2 is newer than this program knows \(1\). Update qlora-harness",
    ),
    "no schema": (in_summary("schema_version", ...), ResultsError, r"schema_version is None"),
    "missing loss": (
        in_summary("results/final_train_loss", None),
        ResultsError,
        r"training_summary.json: results.final_train_loss is missing",
    ),
    "NaN loss": (
        in_summary("results/eval_loss", math.nan),
        ResultsError,
        r"results.eval_loss is nan, not a finite number",
    ),
    "text for a number": (
        in_summary("runtime/train_seconds", "60"),
        ResultsError,
        r"runtime.train_seconds is '60', not a number",
    ),
    "number for a text": (
        in_summary("model/name", 7),
        ResultsError,
        r"model.name is 7, not a string",
    ),
    "a number too large": (
        in_summary("runtime/train_seconds", 10**400),
        ResultsError,
        r"not valid JSON \(a number of 401 digits\)",
    ),
    "environment is a text": (
        in_summary("environment", "Linux"),
        ResultsError,
        r"environment is a str, not an object",
    ),
    "no fingerprint": (
        in_summary("data/train/fingerprint", ...),
        ResultsError,
        r"data.train.fingerprint is missing",
    ),
    "training data": (
        in_summary("data/train/fingerprint", "sha256:" + "9" * 64),
        ComparisonError,
        r"different data: data.train.fingerprint is 4bit sha256:111111111111, 16bit sha256:9{12}.*"
        r"--allow-different-data",
    ),
    "evaluation data": (
        in_summary("data/eval/fingerprint", "sha256:" + "9" * 64),
        ComparisonError,
        r"different data: data.eval.fingerprint",
    ),
    # evaluation_results.json
    "half an evaluation": (
        in_text("evaluation_results.json", half),
        ResultsError,
        r"evaluation_results.json, line 1: not valid JSON",
    ),
    "evaluation kind": (
        in_evaluation("kind", "training_summary"),
        ResultsError,
        r'evaluation_results.json: expected "kind": "evaluation_results"',
    ),
    "NaN accuracy": (
        in_evaluation(f"tasks/{FAMILY}/acc", math.nan),
        ResultsError,
        rf"tasks.{FAMILY}.acc is nan, not a finite number",
    ),
    "missing macro": (
        in_evaluation(f"tasks/{FAMILY}/acc_macro", ...),
        ResultsError,
        rf"tasks.{FAMILY}.acc_macro is missing",
    ),
    "accuracy in percent": (
        in_evaluation(f"tasks/{FAMILY}/acc", 45.3),
        ResultsError,
        r"acc is 45.3, not between 0 and 1",
    ),
    "half a question": (
        in_evaluation(f"tasks/{FAMILY}/n", 19.5),
        ResultsError,
        r"n is 19.5, not a whole number",
    ),
    "subjects is a list": (
        in_evaluation(f"tasks/{FAMILY}/subjects", []),
        ResultsError,
        r"subjects is a list, not an object",
    ),
    "no subjects": (
        in_evaluation(f"tasks/{FAMILY}/subjects", {}),
        ResultsError,
        r"holds no answered question",
    ),
    "accuracy against its subjects": (
        in_evaluation(f"tasks/{FAMILY}/acc", 0.9),
        ResultsError,
        r"acc is 0.900000, but its subjects give 0.500000. The file contradicts itself",
    ),
    "macro against its subjects": (
        in_evaluation(f"tasks/{FAMILY}/acc_macro", 0.9),
        ResultsError,
        r"acc_macro is 0.900000, but its subjects give",
    ),
    "n against its subjects": (
        in_evaluation(f"tasks/{FAMILY}/n", 21),
        ResultsError,
        r"n is 21 of 20, but its subjects have 20 questions",
    ),
    "prompts": (
        in_evaluation(f"tasks/{FAMILY}/prompts_sha256", "d" * 64),
        ComparisonError,
        r"4bit and 16bit answered different questions: prompts_sha256 is c{12} and d{12}",
    ),
    # lm_eval's JSON
    "contradiction": (
        lambda folder: write_harness(folder, FIRST, seconds=1000.0),
        ResultsError,
        r"evaluation_results.json and .*results_2026-11-24T08-14-04.277787.json contradict each "
        r"other on mmlu_qlora_5shot: acc 0.500000 of 20 questions in 2 subjects, "
        r"and acc 0.600000 of 20 in 2. Remove",
    ),
    "other subjects in the harness": (
        in_text("results_*.json", lambda text: text.replace("_law", "_jurisprudence")),
        ResultsError,
        r"contradict each other",
    ),
    "half a results file": (
        in_text("results_*.json", half),
        ResultsError,
        r"results_2026.*.json, line 1: not valid JSON",
    ),
    "foreign results file": (
        lambda folder: write(folder / "x" / "results_1.json", {"accuracy": 1}),
        ResultsError,
        r'results_1.json: not a results file of lm_eval \(no object "results"\)',
    ),
    "NaN in the harness": (
        in_harness(f"{ANATOMY}/acc,none", math.nan),
        ResultsError,
        r"_anatomy.acc,none is nan",
    ),
    "metric missing in the harness": (
        in_harness(f"results/{FAMILY}/acc_macro,none", ...),
        ResultsError,
        rf"results.{FAMILY}.acc_macro,none is missing",
    ),
    "count missing in the harness": (
        in_harness(f"n-samples/{FAMILY}_law/effective", ...),
        ResultsError,
        rf"n-samples.{FAMILY}_law.effective is missing",
    ),
    "limit in the harness": (
        in_harness(f"n-samples/{FAMILY}_law/original", 100),
        ComparisonError,
        r"16bit answered only 20 of 110 questions of mmlu_qlora_5shot \(--limit or .*--allow-limit",
    ),
    # samples
    "half a sample": (
        in_text("samples_*_law_*.jsonl", lambda text: text[:-30]),
        ResultsError,
        r"samples_.*_law_.*.jsonl, line 10: not valid JSON",
    ),
    "half the samples": (
        in_text("samples_*_law_*.jsonl", lambda text: "".join(text.splitlines(True)[:4])),
        ResultsError,
        r"3 right of 4 samples, but the results file says 5 of 10",
    ),
    "a sample file missing": (
        lambda folder: next(folder.rglob("samples_*_law_*.jsonl")).unlink(),
        ResultsError,
        r"_law_.*jsonl is missing \(1 of 2 sample files are\)",
    ),
    "a sample twice": (
        in_sample("doc_id", 1),
        ResultsError,
        r"samples_.*_anatomy_.*, line 3: doc_id 1 is there twice",
    ),
    "no doc_id": (in_sample("doc_id", ...), ResultsError, r"line 3: doc_id is missing"),
    "no hash": (in_sample("doc_hash", ...), ResultsError, r"line 3: doc_hash is missing"),
    "NaN log-probability": (
        in_sample("filtered_resps", [["nan", "False"]] * 4),
        ResultsError,
        r"line 3: filtered_resps holds NaN",
    ),
    "generated text": (
        in_sample("filtered_resps", ["A"]),
        ResultsError,
        r"line 3: filtered_resps does not hold four",
    ),
    "another document": (
        in_sample("doc_hash", "x"),
        ComparisonError,
        r"4bit and 16bit answered different questions: anatomy, doc_id 2: the document hash diff",
    ),
    "another prompt": (
        in_sample("prompt_hash", "x"),
        ComparisonError,
        r"anatomy, doc_id 2: the prompt hash differs. Score all runs with the same task",
    ),
    "another place": (
        in_sample("doc_id", 99),
        ComparisonError,
        r"anatomy, doc_id 2 is in only one of them",
    ),
    # questions
    "fewer questions": (
        rescored(LESS),
        ComparisonError,
        r"4bit and 16bit answered different questions: law has 10 and 4 questions",
    ),
    "other subjects": (
        rescored({"anatomy": "1111111000"}),
        ComparisonError,
        r"answered different questions: subjects in only one of them: law",
    ),
    "limit": (
        rescored(LESS, n_total=20),
        ComparisonError,
        r"16bit answered only 14 of 20 questions of mmlu_qlora_5shot \(--limit or .*evaluation_res",
    ),
}


@pytest.mark.parametrize("name", REFUSALS)
def test_refused(pair: tuple[Path, Path], name: str) -> None:
    spoil, error, message = REFUSALS[name]
    spoil(pair[1])
    before = sorted(pair[0].parent.rglob("*"))
    with pytest.raises(error, match=message) as caught:
        main(*pair)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert sorted(pair[0].parent.rglob("*")) == before


def test_fewer_than_two_runs_are_refused(pair: tuple[Path, Path]) -> None:
    with pytest.raises(ComparisonError, match="two or more runs, found none"):
        main()
    with pytest.raises(ComparisonError, match="two or more runs, found only .*4bit"):
        main(pair[0])
    with pytest.raises(ComparisonError, match="the run .*4bit is named twice"):
        main(pair[0], pair[0])


def test_folders_without_records_are_refused(pair: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(ResultsError, match="nowhere does not exist"):
        main(pair[0], tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ComparisonError, match=r"empty holds no training_summary.json, no eval"):
        main(pair[0], tmp_path / "empty")
    with pytest.raises(ComparisonError, match=r"results is not a run but holds 2: 16bit, 4bit"):
        main(pair[0], tmp_path / "results")
    foreign = harness(FIRST)
    foreign["results"] = {"arc_easy": {"acc,none": 0.5}}
    write(tmp_path / "arc" / "results_1.json", foreign)
    with pytest.raises(ComparisonError, match="holds no whole MMLU family .* only arc_easy"):
        main(pair[0], tmp_path / "arc")


def test_a_trained_run_and_a_scored_model_have_nothing_to_compare(tmp_path: Path) -> None:
    runs = [
        write_run(tmp_path / "a", summary()),
        write_run(tmp_path / "b", None, evaluation(FIRST)),
    ]
    with pytest.raises(ComparisonError, match="no numbers of the same sort"):
        compare(runs)
