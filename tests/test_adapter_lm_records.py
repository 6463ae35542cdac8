"""`qlora_adapter`: what a scored run records, and accuracies as the harness has them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import BOS, token_ids
from lm_eval.tasks import TaskManager
from scoring_runs import KNOWN, MakeLm, demo_prompts, evaluate, read, score

from qlora_harness.model.adapter_folder import adapter_digest
from qlora_harness.schema.mmlu import families, prompt_hash
from qlora_harness.score.mmlu_files import DEMO_FILE, load_questions


def model_record(base: Path, adapter: Path, **changes: Any) -> dict[str, Any]:
    recorded = json.loads((adapter / "qlora_harness.json").read_text())["base"]
    return {
        "base": str(base), "revision": None, "commit": None, "random_weights": True,
        "quant": "nf4", "double_quant": True, "peft": "adapter",
        "adapter_sha256": adapter_digest(adapter), "unquantised_share": 0.0, "attention": "sdpa",
        "weights_fingerprint": recorded["weights_fingerprint"],
    } | changes  # fmt: skip


def test_progress_file_holds_every_question_in_file_order(
    make_lm: MakeLm, manager: TaskManager, tiny_llama: Path, adapter: Path, tmp_path: Path,
    known_answers: list[str],
) -> None:  # fmt: skip
    evaluate(make_lm(peft=str(adapter)), manager)
    expected, right = [], 0
    for count, q in enumerate(load_questions(DEMO_FILE), start=1):
        right += q.answer == "C"
        expected.append(
            {
                "index": q.index,
                "subject": q.subject,
                "logprobs": {letter.strip(): value for letter, value in KNOWN.items()},
                "prediction": "C",
                "answer": q.answer,
                "correct": q.answer == "C",
                "running_accuracy": right / count,
                "prompt_sha256": prompt_hash(q.prompt),
                "truncated": False,
            }
        )
    progress = read(tmp_path / "records", "mmlu_progress_tiny_llama_4bit_qlora.json")
    created = progress.pop("created")
    assert len(created) == len("2026-11-24T10:00:00+00:00")
    assert progress == {
        "schema_version": 1, "kind": "mmlu_progress", "arm": "4bit",
        "model": model_record(tiny_llama, adapter), "tasks": {"mmlu_qlora_demo": expected},
    }  # fmt: skip


def test_evaluation_results_say_what_was_scored_and_how(
    make_lm: MakeLm, manager: TaskManager, tiny_llama: Path, adapter: Path, tmp_path: Path,
    known_answers: list[str],
) -> None:  # fmt: skip
    evaluate(make_lm(quant="bf16", max_length=1900), manager)
    record = read(tmp_path / "records")
    answers: dict[str, list[bool]] = {}
    for q in load_questions(DEMO_FILE):
        answers.setdefault(q.subject, []).append(q.answer == "C")
    environment = record.pop("environment")
    assert environment["device"] == {"name": "cpu"}
    assert {"python", "torch", "transformers", "peft", "lm_eval", "qlora-harness"} <= set(
        environment["versions"]
    )
    task = record.pop("tasks")["mmlu_qlora_demo"]
    settings = {
        "batch_size": 4, "dtype": "float32", "compute": "bf16", "softmax_dtype": "float32",
        "max_length": 1900, "leading_bos": [BOS], "scoring": "packed", "logits": "float32",
        "expanded_once": False, "fused_kernels": True, "processes": 1,
    }  # fmt: skip
    record.pop("created")
    of_4bit = ("double_quant", "peft", "adapter_sha256", "unquantised_share")
    assert record == {
        "schema_version": 1,
        "kind": "evaluation_results",
        "arm": "16bit",
        "model": model_record(tiny_llama, adapter, quant="bf16", **dict.fromkeys(of_4bit)),
        "settings": settings,
    }
    assert (task["n"], task["n_total"], task["ties"], task["truncated"]) == (96, 96, 0, 0)
    assert task["settings"] == settings
    assert task["acc"] == pytest.approx(sum(map(sum, answers.values())) / 96, abs=1e-12)
    assert {s: values["correct"] for s, values in task["subjects"].items()} == {
        s: sum(values) for s, values in answers.items()
    }
    assert (tmp_path / "records" / "mmlu_progress_tiny_llama_16bit_base.json").is_file()


def test_accuracies_are_those_of_the_harness(
    make_lm: MakeLm, manager: TaskManager, adapter: Path, tmp_path: Path
) -> None:
    """Over subjects of different sizes, so that the two means and their errors differ."""
    subjects = [s for c in families()["mmlu_qlora_demo"]["categories"].values() for s in c]
    chosen = {f"mmlu_qlora_demo_{s}": list(range(2 + n)) for n, s in enumerate(subjects)}
    theirs = evaluate(make_lm(peft=str(adapter)), manager, samples=chosen)["results"]
    ours = read(tmp_path / "records")["tasks"]["mmlu_qlora_demo"]
    assert (ours["n"], ours["n_total"]) == (sum(range(2, 10)), 96)
    assert ours["acc"] != ours["acc_macro"]

    def same(stored: dict[str, Any], expected: dict[str, Any], *metrics: str) -> None:
        for metric in metrics:
            for key in (metric, f"{metric}_stderr"):
                assert stored[key] == pytest.approx(expected[f"{key},none"], abs=1e-12), key

    same(ours, theirs["mmlu_qlora_demo"], "acc", "acc_macro")
    for category, stored in ours["categories"].items():
        same(stored, theirs[f"mmlu_qlora_demo_{category}"], "acc", "acc_macro")
    assert set(ours["subjects"]) == set(subjects)
    for subject, stored in ours["subjects"].items():
        same(stored, theirs[f"mmlu_qlora_demo_{subject}"], "acc")


def test_stored_logprobs_are_those_that_were_scored(
    make_lm: MakeLm, manager: TaskManager, adapter: Path, tmp_path: Path
) -> None:
    lm = make_lm(peft=str(adapter))
    evaluate(lm, manager, limit=1)
    rows = read(tmp_path / "records", "mmlu_progress_tiny_llama_4bit_qlora.json")["tasks"]
    questions = [q for q in load_questions(DEMO_FILE) if q.index % 12 == 0]
    expected = score(lm, [q.prompt for q in questions])
    stored = [row["logprobs"][letter] for row in rows["mmlu_qlora_demo"] for letter in "ABCD"]
    assert [row["index"] for row in rows["mmlu_qlora_demo"]] == [q.index for q in questions]
    assert stored == pytest.approx(expected, abs=1e-5)


def test_single_subject_is_recorded_as_a_part_of_its_family(
    make_lm: MakeLm, manager: TaskManager, tmp_path: Path, known_answers: list[str]
) -> None:
    evaluate(make_lm(), manager, "mmlu_qlora_demo_nutrition")
    task = read(tmp_path / "records")["tasks"]["mmlu_qlora_demo"]
    assert (task["n"], task["n_total"]) == (12, 96)
    assert list(task["subjects"]) == ["nutrition"]
    assert list(task["categories"]) == ["other"]


def test_prompts_longer_than_the_window_are_counted(
    make_lm: MakeLm, manager: TaskManager, tmp_path: Path
) -> None:
    questions = [q for q in load_questions(DEMO_FILE) if q.index % 12 < 2]
    # BOS and the prompt must fit; the answer itself is never fed to the model.
    lengths = sorted(1 + len(token_ids(f" {q.prompt}")) for q in questions)
    window = lengths[7]
    evaluate(make_lm(max_length=window), manager, limit=2)
    task = read(tmp_path / "records")["tasks"]["mmlu_qlora_demo"]
    assert task["truncated"] == sum(length > window for length in lengths)
    assert 0 < task["truncated"] < 16


def test_other_tasks_leave_no_record(make_lm: MakeLm, tmp_path: Path) -> None:
    score(make_lm(), demo_prompts(1))
    assert not (tmp_path / "records").exists()
