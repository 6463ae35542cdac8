"""Broken, foreign and unequal files: one clear line each, and nothing is written."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from compare_runs import (
    DATE,
    FAMILY,
    FIRST,
    changed,
    edit,
    evaluation,
    half,
    in_evaluation,
    in_harness,
    in_progress,
    in_summary,
    in_text,
    main,
    spoil,
    summary,
    write,
    write_harness,
    write_run,
    write_scored,
)

from qlora_harness.errors import ComparisonError, HarnessError, ResultsError, SettingsError

Spoil = Callable[[Path], object]
OURS = f"results/{FAMILY}_anatomy"
CONTRADICTS = "line 3: filtered_resps, target and acc contradict"


def in_sample(key: str, new: object) -> Spoil:
    return lambda folder: spoil(next(folder.rglob("samples_*_anatomy_*.jsonl")), 2, **{key: new})


def in_log(key: str, new: object) -> Spoil:
    return lambda folder: changed(folder / "training_logs.json", edit(key, new))


def rescored(marks: dict[str, str], **changes: Any) -> Spoil:
    def damage(folder: Path) -> None:
        for path in folder.rglob("*"):
            if path.name.startswith(("results_", "samples_")):
                path.unlink()
        write_run(folder, None, evaluation(marks, **changes))

    return damage


def failed(folder: Path) -> None:
    change = {"status": "failed", "failure": {"problem": "loss is nan"}}
    changed(folder / "training_summary.json", lambda record: record.update(change))


# What is damaged, and what contradicts another file.
DAMAGED: dict[str, tuple[Spoil, str]] = {
    "status": (in_summary("status", "done"), r"json: status is 'done'"),
    "half": (in_text("training_summary.json", half), r"line 1: not valid JSON"),
    "a list": (in_text("training_summary.json", lambda t: "[]"), r"training_summary.json: .*list"),
    "kind": (in_summary("kind", "x"), r'"kind" is .?x.?, not "training_summary"'),
    "newer": (in_summary("schema_version", 2), r"schema_version 2 is newer"),
    "no loss": (in_summary("results/final_train_loss", None), r"results.final_train_loss"),
    "NaN": (in_summary("results/eval_loss", math.nan), r"results.eval_loss is nan"),
    "too large": (in_summary("results/eval_loss", 1e200), r"results.eval_loss is 1e"),
    "text": (in_summary("runtime/train_seconds", "60"), r"train_seconds is '60'"),
    "negative": (in_summary("runtime/train_seconds", -1.0), r"train_seconds is -1"),
    "digits": (in_summary("runtime/train_seconds", 10**400), r"401 digits"),
    "log steps": (in_log("steps", [{"step": 1, "loss": None}]), r"steps.0.loss is None"),
    "log short": (in_log("steps", [{"step": 1, "loss": 2.0}]), r"1 rows, .* 20 steps"),
    "log loss": (in_log("evaluation", {"nll": [4.0], "tokens": [2]}), r"2\.0000, .*1\.5000"),
    "log tokens": (
        in_log("evaluation", {"nll": [4.0, 5.0], "tokens": [2]}),
        r"evaluation .*2 and 0 losses for 1 conversations",
    ),
    "acc": (in_evaluation(f"tasks/{FAMILY}/acc", 45.3), rf"tasks.{FAMILY}.acc is 45"),
    "n": (in_evaluation(f"tasks/{FAMILY}/n", 19.5), rf"tasks.{FAMILY}.n is 19.5"),
    "no macro": (in_evaluation(f"tasks/{FAMILY}/acc_macro", ...), r"acc_macro .*requ"),
    "micro": (in_evaluation(f"tasks/{FAMILY}/acc", 0.9), r"acc is 0\.9.* give 0\.5"),
    "macro": (in_evaluation(f"tasks/{FAMILY}/acc_macro", 0.9), r"acc_macro is 0\.9"),
    "total": (in_evaluation(f"tasks/{FAMILY}/n", 21), r"its subjects have 20"),
    "contradiction": (
        lambda folder: write_harness(folder, FIRST),
        r"evaluation_results.json and .*results_.*.json contradict each other",
    ),
    "half a results file": (in_text("results_*.json", half), r"line 1: not valid"),
    "foreign results file": (
        lambda folder: write(folder / "x" / "results_1.json", {"accuracy": 1}),
        r"results_1.json: .*: results ",
    ),
    "two of a date": (
        lambda f: write(
            f / "x" / f"results_{DATE}.json",
            json.loads(next(f.rglob("results_*.json")).read_text()) | {"date": 1},
        ),
        r"have the same date in their names",
    ),
    "NaN in results": (in_harness(f"{OURS}/acc,none", math.nan), r"acc,none is nan"),
    "no metric": (in_harness(f"{OURS}/acc,none", ...), r"_anatomy"),
    "no count": (
        in_harness(f"n-samples/{FAMILY}_law/effective", ...),
        rf"n-samples.{FAMILY}_law.effective .*required",
    ),
    "a sample file": (
        lambda folder: next(folder.rglob("samples_*_law_*.jsonl")).unlink(),
        r"_law_.*jsonl is missing \(1 of 2 ",
    ),
    "generated text": (in_sample("filtered_resps", ["A"]), CONTRADICTS),
    "NaN of a choice": (in_sample("filtered_resps", [["nan", "False"]] * 4), CONTRADICTS),
    "target": (in_sample("target", "7"), CONTRADICTS),
    "other target": (in_sample("target", "3"), CONTRADICTS),
}
# What can be read, and not compared.
UNEQUAL: dict[str, tuple[Spoil, str]] = {
    "failed": (failed, r'status is "failed": loss is nan'),
    "running": (in_summary("status", "running"), r'status is "running"'),
    "training data": (
        in_summary("data/train/fingerprint", "sha256:" + "9" * 64),
        r"data.train.fingerprint is 4bit sha256:1{12}, 16bit sha256:9{12}.*--allow-different-data",
    ),
    "evaluation data": (
        in_summary("data/eval/fingerprint", "sha256:" + "9" * 64),
        r"data.eval.fingerprint",
    ),
    "prompts": (
        in_evaluation(f"tasks/{FAMILY}/prompts_sha256", "d" * 64),
        r"4bit and 16bit .*prompts_sha256 is c{12} and d{12}",
    ),
    "limit": (
        in_harness(f"n-samples/{FAMILY}_law/original", 100),
        r"16bit .* 20 of 110 questions of mmlu_qlora_5shot .*--allow-limit",
    ),
    "document": (in_sample("doc_hash", "x"), r"2 are in only one of them"),
    "prompt": (in_sample("prompt_hash", "x"), r"prompt hash differs in 1 of 20"),
    "fewer": (rescored({**FIRST, "law": "1111"}), r"differ in number or size"),
    "part": (rescored({**FIRST, "law": "1111"}, n_total=20), r"16bit .* 14 of 20 questions"),
}


@pytest.mark.parametrize(
    ("error", "damage", "message"),
    [
        pytest.param(error, *case, id=name)
        for error, cases in ((ResultsError, DAMAGED), (ComparisonError, UNEQUAL))
        for name, case in cases.items()
    ],
)
def test_refused(
    pair: tuple[Path, Path], error: type[HarnessError], damage: Spoil, message: str
) -> None:
    damage(pair[1])
    check_refused(pair, error, message)


def check_refused(runs: Sequence[Path], error: type[HarnessError], message: str) -> None:
    before = sorted(runs[0].parent.rglob("*"))
    with pytest.raises(error, match=message) as caught:
        main(*runs)
    assert type(caught.value) is error
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 500
    assert sorted(runs[0].parent.rglob("*")) == before


QUESTIONS = [("law", i % 4, [-1.0 - (i + k) % 4 for k in range(4)]) for i in range(12)]


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (in_progress(3, "prediction", "A"), r"\[3\]: prediction is A .*logprobs and answer give"),
        (in_progress(3, "correct", True), r"\[3\]: .*correct is True"),
        (in_progress(3, "index", 2), "an index is repeated"),
        (in_progress(3, "index", 99), "not below 12"),
        (in_progress(3, "answer", "E"), r"3.answer is 'E'"),
        (in_progress(3, "logprobs/A", 0.5), r"3.logprobs.A is 0.5"),
        (in_progress(3, "logprobs/A", ...), r"3.logprobs"),
        (in_progress(3, "prompt_sha256", "xyz"), r"prompt_sha256 is 'xyz'"),
        (in_progress(3, "prompt_sha256", "0" * 16), "its questions give prompts_sha256"),
        (in_progress(3, "subject", "art"), r"(law|art): acc is"),
        (in_text("mmlu_progress_*.json", half), "line 1: not valid JSON"),
        (in_text("mmlu_progress_*.json", lambda t: t.replace("4bit", "8bit")), "arm or model"),
        (
            lambda f: write(f / "mmlu_progress_b.json", next(f.glob("mmlu_p*")).read_text()),
            "are both of the model",
        ),
    ],
)
def test_spoilt_progress_is_refused(tmp_path: Path, damage: Spoil, message: str) -> None:
    runs = [write_scored(tmp_path / q, QUESTIONS, summary(q), q) for q in ("nf4", "bf16")]
    damage(runs[0])
    check_refused(runs, ResultsError, message)


def test_which_runs(pair: tuple[Path, Path], tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    trained, scored = tmp_path / "trained", tmp_path / "scored"
    write_run(trained, summary())
    write_run(scored, None, evaluation(FIRST))
    other = write_harness(tmp_path / "other", FIRST, family="mmlu_qlora_0shot").parents[1]
    cases: list[tuple[list[object], type[HarnessError], str]] = [
        ([], ComparisonError, "there is none"),
        ([pair[0]], ComparisonError, "there is only .*4bit"),
        ([pair[0], pair[0]], ComparisonError, "is named twice"),
        ([pair[0], tmp_path / "nowhere"], ResultsError, "nowhere does not exist"),
        ([pair[0], tmp_path / "empty"], ComparisonError, "empty holds no training_summary.json"),
        ([pair[0], tmp_path / "results"], ComparisonError, "not a run but holds 2: 16bit, 4bit"),
        ([trained, scored], ComparisonError, "no numbers of the same kind"),
        ([scored, other], ComparisonError, "no task in common"),
        ([*pair, "--task", "mmlu_qlora_0shot"], ComparisonError, "--task mmlu_qlora_0shot: .*4bit"),
        ([*pair, "--metric", "bleu"], ResultsError, "has no metric bleu, only acc"),
        ([*pair, "--baseline", "c"], SettingsError, "--baseline c is neither arm nor run"),
        ([*pair, "--margin", "0"], SettingsError, "--margin 0"),
        ([scored, trained, "--intersect"], ComparisonError, "no numbers of the same kind"),
    ]
    for words, error, message in cases:
        with pytest.raises(error, match=message):
            main(*words)


def test_equal_limits_and_different_data_where_allowed(pair: tuple[Path, Path]) -> None:
    for folder in pair:
        rescored(FIRST, n_total=40)(folder)
    with pytest.raises(ComparisonError, match="answered only 20 of 40"):
        main(*pair)
    main(*pair, "--allow-limit")
    in_summary("data/train/fingerprint", "sha256:" + "9" * 64)(pair[1])
    main(*pair, "--allow-limit", "--allow-different-data")
    markdown = (pair[0].parent / "comparison.md").read_text()
    assert "these differ: data" in markdown
    assert "Only 20 of 40 questions" in markdown
    rescored(FIRST, n_total=50)(pair[1])
    with pytest.raises(ComparisonError, match="different limits"):
        main(*pair, "--allow-limit", "--allow-different-data")
    with pytest.raises(ComparisonError, match=r"which questions .* is not recorded"):
        main(*pair, "--intersect", "--allow-different-data")
